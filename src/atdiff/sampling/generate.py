"""Sampling from any denoiser with any diffusers scheduler, and saving the images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, network_time
from atdiff.core.prediction import resolve_prediction_type, to_clean
from atdiff.data.mixture import density_picture
from atdiff.data.sources import to_uint8
from atdiff.models.call import class_embeddings, image_tokens, predict
from atdiff.models.inference import evaluating
from atdiff.sampling.corrections import Correction, realign
from atdiff.sampling.schedulers import make_scheduler
from atdiff.system.files import check_images_path, written_aside
from atdiff.system.processes import draw_in_turn, num_processes
from atdiff.system.progress import Bars

__all__ = [
    "check_request",
    "denoise_steps",
    "finite_images",
    "generate",
    "image_generators",
    "iter_generate",
    "save_images",
]

Denoiser = Callable[..., Any]

_SEED_STRIDE = 1_000_000


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """Return one CPU generator per image: image ``i`` of seed ``S`` uses the seed ``S * 1_000_000 + i``.

    An image thus depends only on its seed and index, not on its batch, and a diffusers pipeline with this list of
    generators gives the same images.

    Raises:
        UserError: seed or index is out of range; torch's CPU generator uses only 32 bits of its seed.
    """
    generators = []
    for index in indices:
        number = seed * _SEED_STRIDE + index
        if seed < 0 or not 0 <= index < _SEED_STRIDE or number >= 2**32:
            raise UserError(
                f"seed={seed} with sample {index} is out of range; use a seed from 0 to "
                f"{2**32 // _SEED_STRIDE - 1} and at most {_SEED_STRIDE} samples per seed."
            )
        generators.append(torch.Generator().manual_seed(number))
    return generators


def denoise_steps(
    model: Denoiser,
    scheduler: Any,  # noqa: ANN401  (any diffusers scheduler)
    x: Tensor,
    *,
    generators: list[torch.Generator] | None = None,
    model_kwargs: Mapping[str, Tensor] | None = None,
    correction: Correction | None = None,
) -> Iterator[Tensor]:
    """Yield ``x`` after each step, in the scheduler's own coordinates (``alpha = 1`` for heun and EDM).

    Args:
        model: ``f(x_t, timesteps, **model_kwargs)``; see :func:`atdiff.models.call.predict`. Timesteps are ``(B,)``. If
            it outputs ``2C`` channels, the second half is a learned variance, passed only to schedulers that use it.
        scheduler: a fresh scheduler with its timesteps set; use a new one for each call.
        x: initial noise ``(B, C, H, W)``, times the scheduler's ``init_noise_sigma``.
        generators: one per image, for stochastic schedulers.
        model_kwargs: further arguments of the network, such as ``class_labels`` ``(B,)``.
        correction: of the sampler; None for none.

    Raises:
        UserError: the network's channels do not fit the images and ``variance_type``, or the correction does not fit
            the schedule.
    """
    schedule = NoiseSchedule(scheduler)
    correction = correction or Correction()
    correction.check(schedule)
    prediction_type = resolve_prediction_type(schedule, scheduler)
    step_kwargs = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for index, t in enumerate(scheduler.timesteps):
        inputs = _scaled(scheduler, x, t)
        x_t = x if schedule.traits.variance_exploding else inputs
        timesteps = t.to(x.device).expand(len(x))
        seen = correction.shift(x_t, timesteps, schedule) if index else timesteps
        begins = getattr(scheduler, "state_in_first_order", True)  # a second-order solver may be mid-step
        output = predict(model, inputs, network_time(scheduler, seen), model_kwargs)
        prediction, variance = _split_variance(output, x.shape[1], scheduler)
        prediction = correction(prediction, x_t, seen, schedule, prediction_type)
        if seen is not timesteps:
            prediction, x_t = realign(prediction, x_t, seen, timesteps, schedule, prediction_type)
            x = x_t / _scaled(scheduler, torch.ones_like(x[:1]), t)
        if correction.moves_steps and begins:
            x0_hat = to_clean(prediction, x_t, timesteps, schedule, prediction_type)
            begun = _clipped(x0_hat, scheduler), timesteps
        if variance is not None:
            prediction = torch.cat([prediction, variance], dim=1)
        x = scheduler.step(prediction, t, x, **step_kwargs, return_dict=False)[0]
        if correction.moves_steps and getattr(scheduler, "state_in_first_order", True):
            x = correction.after_step(x, *begun, schedule)
        yield x


def _clipped(x0_hat: Tensor, scheduler: Any) -> Tensor:  # noqa: ANN401
    """Return ``x0_hat`` as the scheduler clips it, if it does."""
    config, largest = scheduler.config, scheduler.config.get("clip_sample_range", 1.0)
    clips = config.get("clip_sample") or config.get("thresholding")
    return x0_hat.clamp(-largest, largest) if clips else x0_hat


def _scaled(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:  # noqa: ANN401
    scaled: Tensor = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    return scaled


def _split_variance(output: Tensor, channels: int, scheduler: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    variance_type = scheduler.config.get("variance_type") or ""
    learned = isinstance(scheduler, DDPMScheduler) and variance_type.startswith("learned")
    if output.shape[1] not in ((2 * channels,) if learned else (channels, 2 * channels)):
        raise UserError(
            f"the network returned {output.shape[1]} channels for images of {channels}, expected "
            f"{2 * channels if learned else channels}; check the network's out_channels and the scheduler's "
            f"variance_type={variance_type or None!r}."
        )
    return output[:, :channels], output[:, channels:] if learned else None


def generate(model: Denoiser, training_scheduler: Any, *, num: int, **options: Any) -> Tensor:  # noqa: ANN401
    """Return ``num`` images in [-1, 1], float32, ``(num, C, H, W)``; options as for :func:`iter_generate`."""
    return torch.cat(list(iter_generate(model, training_scheduler, num=num, **options)))


@torch.no_grad()
def iter_generate(
    model: Denoiser,
    training_scheduler: Any,  # noqa: ANN401
    *,
    sampler: str,
    steps: int,
    num: int,
    shape: tuple[int, int, int],
    seed: int = 0,
    batch_size: int = 256,
    class_labels: Tensor | None = None,
    correction: Correction | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Yield batches of images in [-1, 1], float32 on the CPU, ``(up to batch_size, C, H, W)``.

    Image ``i`` depends only on ``i`` and ``seed`` (:func:`image_generators`), even if processes share the work.

    Args:
        model: see :func:`denoise_steps`; a class-conditional one needs ``class_labels``.
        training_scheduler: the network's; ``sampler`` and ``steps`` as in :func:`atdiff.sampling.make_scheduler`.
        num: number of images of ``shape`` ``(C, H, W)``, sampled ``batch_size`` at a time; ``seed`` is 0 to 4293.
        class_labels: one label per image, ``(num,)``.
        device: where to move the model; default: its current device.

    Raises:
        UserError: an option is out of range or does not fit the model.
        FloatingPointError: the images are not finite.
    """
    check_request(model, num, shape, batch_size, class_labels)
    device, dtype = _placed(model, device)
    scheduler_of = partial(make_scheduler, sampler, training_scheduler, steps, tokens=image_tokens(model, shape))
    evaluations = len(scheduler_of().timesteps)
    image_generators(seed, [num - 1])
    with evaluating(model), Bars(disable=not progress) as bar:
        task = bar.add_task(f"{sampler}, {steps} steps", total=num * evaluations)

        def draw(indices: range) -> Tensor:
            scheduler = scheduler_of()
            options: dict[str, Any] = {"generators": image_generators(seed, indices), "correction": correction}
            if class_labels is not None:
                options["model_kwargs"] = {"class_labels": class_labels[indices.start : indices.stop].to(device)}
            x = randn_tensor((len(indices), *shape), generator=options["generators"], device=device, dtype=dtype)
            x = x * getattr(scheduler, "init_noise_sigma", 1.0)
            for x in denoise_steps(model, scheduler, x, **options):  # noqa: B007, B020  (the last x is the image)
                bar.advance(task, len(indices) * num_processes())
            return finite_images(x, indices.start, f"{sampler} at {steps} steps")

        yield from draw_in_turn(num, batch_size, draw)


def check_request(
    model: Denoiser, num: int, shape: tuple[int, int, int], batch_size: int, class_labels: Tensor | None
) -> None:
    """Raise UserError for a number or shape out of range, or class labels that do not fit the network."""
    if num < 1 or batch_size < 1:
        raise UserError(f"num={num} and batch_size={batch_size} must be 1 or more.")
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"shape={tuple(shape)} must be (channels, height, width), each 1 or more.")
    if class_labels is not None and class_labels.shape != (num,):
        raise UserError(f"class_labels of shape {tuple(class_labels.shape)} must hold one label per sample, ({num},).")
    classes = class_embeddings(model)
    if class_labels is None and classes:
        raise UserError(f"the network is conditional on {classes} classes; give class_labels, one per sample.")


def _placed(model: Denoiser, device: torch.device | str | None) -> tuple[torch.device, torch.dtype]:
    """Return a model's device and dtype, after moving a module to ``device`` if one is given."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    home, dtype = (torch.device("cpu"), torch.float32) if parameter is None else (parameter.device, parameter.dtype)
    device = home if device is None else torch.device(device)
    if isinstance(model, nn.Module):
        model.to(device)
    return device, dtype


def finite_images(x: Tensor, start: int, run: str) -> Tensor:
    """Return a sampler's final ``x`` ``(B, C, H, W)`` as float32 on the CPU, clamped to [-1, 1].

    Raises:
        FloatingPointError: some are not finite. The first image is number ``start``; ``run`` describes the sampler.
    """
    images = x.float().cpu()
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        bad = (start + (~finite).nonzero().flatten()).tolist()
        raise FloatingPointError(
            f"{len(bad)} samples of {run} are not finite (first: number {bad[0]}); the network's weights or "
            "its noise schedule are broken."
        )
    return images.clamp(-1.0, 1.0)


def save_images(images: Tensor | Iterable[Tensor], path: str | Path) -> Path:
    """Save images in [-1, 1], ``(N, C, H, W)`` or batches of them, in the format of the path's suffix; return the path.

    - ``.png``: one grid, with tiny images enlarged by whole factors up to 64 pixels; points in the plane,
      ``(N, 2, 1, 1)``, become one plot of their density;
    - ``.npz``: uint8 array ``arr_0`` ``(N, H, W, C)``, the format of guided-diffusion's evaluator;
    - none: a folder of ``000000.png``, ``000001.png``, ...; each batch is written while the next is sampled.

    Raises:
        UserError: the path exists or has another suffix, or images to be saved as PNG do not have 1 or 3 channels.
    """
    path = Path(path)
    writers = {".png": _write_grid, ".npz": _write_array, "": _write_folder}
    check_images_path(path)
    batches = [images] if isinstance(images, Tensor) else images
    with written_aside(path) as partial:
        writers[path.suffix](batches, partial)
    return path


def _write_grid(batches: Iterable[Tensor], path: Path) -> None:
    images = torch.cat(list(batches))
    pixels = _pixels(density_picture(images)[None] if images.shape[1:] == (2, 1, 1) else images)
    factor = max(1, 64 // max(pixels.shape[2:]))
    enlarged = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    columns = int(np.ceil(len(pixels) ** 0.5))
    _write_image(make_grid(enlarged, nrow=columns, padding=2, pad_value=255), path)


def _write_array(batches: Iterable[Tensor], path: Path) -> None:
    pixels = torch.cat([to_uint8(batch.detach().cpu()) for batch in batches])
    np.savez(path, arr_0=pixels.permute(0, 2, 3, 1).numpy())


def _write_folder(batches: Iterable[Tensor], path: Path) -> None:
    path.mkdir()
    start, written = 0, None
    with ThreadPoolExecutor(1) as writer:  # PIL releases the GIL while it compresses.
        for batch in batches:
            if written is not None:
                written.result()
            written = writer.submit(_write_images, _pixels(batch), path, start)
            start += len(batch)
        if written is not None:
            written.result()


def _pixels(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise UserError(f"images with {images.shape[1]} channels cannot be saved as PNG; save them as .npz.")
    return to_uint8(images.detach().cpu())


def _write_images(pixels: Tensor, path: Path, start: int) -> None:
    for index, image in enumerate(pixels, start):
        _write_image(image, path / f"{index:06d}.png")


def _write_image(image: Tensor, path: Path) -> None:
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(path)
