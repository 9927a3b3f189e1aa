"""Checks of what a training loop passes to an objective: convert it if its meaning is clear, otherwise reject it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule

__all__ = [
    "FirstBatches",
    "check_conditions",
    "check_like",
    "check_output",
    "clean_samples",
    "one_each",
    "without_variance",
]

LARGEST = 16.0  # nonnegative data with values above this were not scaled; latents have both signs


def clean_samples(x0: Any) -> Tensor:  # noqa: ANN401
    """Return clean samples as floats: bytes are scaled from 0..255 to [-1, 1], half precision becomes float32.

    Raises:
        UserError: it is not a tensor, is empty, has channels last, or is of another integer type.
    """
    if not isinstance(x0, Tensor):
        raise UserError(
            f"x0 is of type {type(x0).__name__}, expected a tensor of images in [-1, 1], (B, C, H, W); unpack a "
            "loader that yields more than images: `for x0, labels in loader`."
        )
    if x0.ndim < 2 or x0.numel() == 0:
        raise UserError(f"x0 has the shape {tuple(x0.shape)}, expected (B, C, H, W) with one sample or more.")
    if x0.ndim == 4 and x0.shape[-1] == 3 and min(x0.shape[1:3]) > 4:
        raise UserError(f"x0 has the shape {tuple(x0.shape)}, with channels last; use x0.permute(0, 3, 1, 2).")
    if x0.dtype == torch.uint8:
        return x0.float() / 127.5 - 1.0
    if not x0.is_floating_point():
        raise UserError(f"x0 is of {x0.dtype}, expected floats in [-1, 1], or images of 0 to 255 as torch.uint8.")
    return x0.float() if x0.element_size() < 4 else x0


def check_like(name: str, value: Any, like: Tensor) -> None:  # noqa: ANN401
    """Check that a tensor has the shape of another.

    Raises:
        UserError: it does not; torch would broadcast some of these silently.
    """
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if shape != tuple(like.shape):
        raise UserError(f"{name} is {shape}, expected a tensor with the shape of the samples, {tuple(like.shape)}.")


def check_output(output: Tensor, x0: Tensor) -> None:
    """Check that a network returned one prediction per sample, of the same size; the caller checks the channels.

    Raises:
        UserError: it did not.
    """
    if output.ndim < 2 or (output.shape[0], *output.shape[2:]) != (x0.shape[0], *x0.shape[2:]):
        raise UserError(
            f"the network returned the shape {tuple(output.shape)} for samples of {tuple(x0.shape)}, expected one "
            "prediction per sample, of the same size."
        )


def without_variance(output: Tensor, x: Tensor, whose: str) -> Tensor:
    """Return a network's prediction in float32, shaped like ``x`` ``(B, C, ...)``, without any learned variance.

    Raises:
        UserError: the output has another size, or neither ``C`` nor ``2C`` channels.
    """
    check_output(output, x)
    channels = x.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise UserError(
            f"the {whose} returned {output.shape[1]} channels: expected {channels} like the samples, or {2 * channels} "
            "with a learned variance."
        )
    return output[:, :channels].float()


def one_each(name: str, value: Any, x0: Tensor) -> Tensor:  # noqa: ANN401
    """Return one number per sample, ``(B,)``; a single number is expanded to all samples.

    Raises:
        UserError: there are more or fewer.
    """
    found: Tensor = torch.as_tensor(value, device=x0.device)
    if found.ndim == 0:
        return found.expand(len(x0))
    if found.shape != x0.shape[:1]:
        raise UserError(f"{name} has the shape {tuple(found.shape)}, expected one number per sample, ({len(x0)},).")
    return found


def check_conditions(conditions: dict[str, Any], x0: Tensor) -> None:
    """Check that every condition is a tensor with one row per sample.

    Raises:
        UserError: one is not.
    """
    for name, value in conditions.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{name} is of type {type(value).__name__}, expected a tensor with one row per sample; bind an "
                "argument that is the same for all samples to the network, such as functools.partial(network, "
                f"{name}=...)."
            )
        if value.ndim == 0 or len(value) != len(x0):
            raise UserError(
                f"{name} has the shape {tuple(value.shape)}, expected one row for each of the {len(x0)} samples."
            )


LOOKS = 2  # number of first batches whose values are checked


class FirstBatches:
    """Checks the values of the first batches, which is enough to notice most mistakes.

    Later batches are not read, since reading values synchronises a GPU.

    Args:
        schedule: the forward process.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule, self.left, self._unsigned = schedule, LOOKS, 0

    def look(self, x0: Tensor, chosen: dict[str, Tensor]) -> None:
        """Check clean samples, and the timesteps that a caller chose, by name.

        Raises:
            UserError: values are not finite, not scaled, or outside the schedule.
        """
        if not self.left:
            return
        self.left, first = self.left - 1, self.left == LOOKS
        for name, timesteps in chosen.items():
            self.schedule.check_timesteps(name, timesteps)
        low, high = (float(value) for value in x0.detach().aminmax())
        # Also false for NaN. In later batches, skipping the update is up to the optimizer or gradient scaler.
        if first and not (low > -float("inf") and high < float("inf")):
            raise UserError(f"x0 ranges from {low:.4g} to {high:.4g}, expected finite values in [-1, 1].")
        if low >= 0 and high > LARGEST * self.schedule.sigma_data:
            raise UserError(
                f"x0 ranges from {low:.4g} to {high:.4g}, expected [-1, 1]; give images as torch.uint8, or as "
                "x0 / 127.5 - 1."
            )
        self._unsigned += 0.0 <= low < high <= 1.0
        if self._unsigned == LOOKS:
            warnings.warn(
                "no value in two batches was negative: if these are images in [0, 1], rescale them to [-1, 1] by "
                "2 * x0 - 1, as samplers expect.",
                stacklevel=4,
            )
