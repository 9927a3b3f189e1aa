"""Latent pipelines for measurements: a network on latents, and real latents with their conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from atdiff.core.errors import UserError
from atdiff.data.captions import CaptionedImages, UncaptionedError, load_captioned
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.data.sources import ImageData
from atdiff.metrics.features.extractors import as_bytes
from atdiff.models.call import class_embeddings, predict
from atdiff.objectives.guided import guidance_embedding
from atdiff.pipelines.cache import batched, encoders_on
from atdiff.pipelines.families import Family, viewed
from atdiff.pipelines.latent_model import LatentPipeline
from atdiff.pipelines.model import TrainedModel, reading_of, reference_data, reference_name
from atdiff.pipelines.text_to_image import PIXELS, TextToImage
from atdiff.sampling.schedulers import make_scheduler
from atdiff.system.fingerprint import settings_fingerprint
from atdiff.system.quiet import quiet_libraries

__all__ = ["GuidedNetwork", "LatentRun", "TrueLatents", "check_classes", "latent_run", "prompted", "true_latents"]

ENCODED_AT_ONCE = 8  # images or prompts
# Options of reading captioned images.
READING = ("limit", "split", "caption_column", "crop", "background", "image_column", "labels", "unreadable")


class GuidedNetwork(nn.Module):
    """A network on latents, called as ``f(x_t, timesteps, **conditions)`` and guided like its pipeline.

    With ``null`` conditions (one row each), the output is ``null + scale (conditional - null)`` (`Ho and Salimans
    <https://arxiv.org/abs/2207.12598>`_), or another combination by :meth:`Family.guide`, from one evaluation at twice
    the batch size. It computes in the dtype of its weights, and takes and returns float32.
    """

    def __init__(
        self,
        network: Any,  # noqa: ANN401
        null: Mapping[str, Tensor] | None = None,
        scale: float = 1.0,
        family: Family | None = None,
    ) -> None:
        super().__init__()
        self.network, self.null, self.scale, self.family = network, null, scale, family or Family()

    @property
    def config(self) -> Any:  # noqa: ANN401
        """The config of the network."""
        return self.network.config

    def forward(self, x_t: Tensor, timesteps: Tensor, **conditions: Any) -> Tensor:  # noqa: ANN401
        """Return the prediction at latents ``(B, C, h, w)`` and timesteps ``(B,)``, ``(B, C or 2C, h, w)``."""
        flat = {name: value for name, value in conditions.items() if name != "added_cond_kwargs"}
        flat |= conditions.get("added_cond_kwargs", {})
        if self.null is None:
            return self._predicted(x_t, timesteps, flat)
        null_rows = {**flat, **{name: row.to(flat[name]).expand_as(flat[name]) for name, row in self.null.items()}}
        both = {name: torch.cat([value, null_rows[name]]) for name, value in flat.items()}
        given, null = self._predicted(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both).chunk(2)
        return self.family.guide(given, null, self.scale)

    def _predicted(self, x_t: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), x_t.dtype)
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in conditions.items()}
        return predict(self.network, x_t.to(dtype), timesteps, given).float()


@dataclass(frozen=True, kw_only=True)
class LatentRun(TrainedModel):
    """A text-to-image run viewed as a model of latents: ``model`` is a :class:`GuidedNetwork`, ``run`` the original."""

    run: TextToImage

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return self.run.family.latent_shape(self.run.pipeline, self.run.config.get("data", {}).get("image_size"))

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the run without the prompts, and without the guidance scale if the network does not use it."""
        ours = {name: value for name, value in self.run.recipe.items() if name != "prompts"}
        if self.model.null is None and not self.run.family.is_told_guidance(self.run.model):
            del ours["guidance_scale"]
        return {**ours, "images": "latents"}

    @property
    def most_at_once(self) -> int:
        """Batch size at which a float32 autoencoder fits on a common GPU."""
        _, height, width = self.run.image_shape
        return max(1, PIXELS // (height * width))

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of the run."""
        return self.run.fingerprints()

    def sampling_scheduler(self, sampler: str, steps: int) -> Any:  # noqa: ANN401  (any diffusers scheduler)
        """Return the scheduler with the pipeline's timesteps for latents of this size."""
        tokens = self.run.family.tokens(self.run.model, self.image_shape)
        return make_scheduler(sampler, self.scheduler, steps, tokens=tokens)

    def check_corrections(self, corrections: Any) -> None:  # noqa: ANN401
        """Check corrections as the run does."""
        self.run.check_corrections(corrections)


@dataclass(frozen=True)
class Pairs:
    """Images with captions, by index."""

    name: str
    captions: list[str]
    images: Callable[[list[int]], Iterable[Tensor]]  # yields the images at ascending indices, uint8 (C, H, W)
    fingerprint: Callable[[], str]  # depends on images, captions and size


def prompted(data: ImageData, prompts: Sequence[str]) -> Pairs:
    """Return the images with the prompt of their class as caption, or else with the prompts in turn."""
    one_per_class = data.labels is not None and data.num_classes == len(prompts)
    numbers = data.labels.tolist() if one_per_class and data.labels is not None else range(len(data))
    captions = [prompts[number % len(prompts)] for number in numbers]
    return Pairs(
        data.name,
        captions,
        lambda indices: (as_bytes(data.images[index]) for index in indices),
        lambda: settings_fingerprint(data.fingerprint(), captions),
    )


class TrueLatents:
    """Latents and conditions of captioned images, encoded on demand.

    Args:
        guidance: embedding of the guidance scale for a guidance-distilled U-Net, ``(1, D)``; None for other networks.
    """

    def __init__(self, pairs: Pairs, latent: LatentPipeline, guidance: Tensor | None = None) -> None:
        self.pairs, self.latent, self.name = pairs, latent, pairs.name
        self._guidance = guidance
        self._encoded: dict[str, dict[str, Tensor]] = {}  # by caption; each condition has one row

    def __len__(self) -> int:
        return len(self.pairs.captions)

    def fingerprint(self) -> str:
        """Return a hash of the images, captions and size."""
        return self.pairs.fingerprint()

    def x0(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Return latents at ``indices`` ``(B,)``, sampled from their posteriors: float32 ``(B, C, h, w)``, on the CPU.

        An image's posterior noise depends only on its index. Unreadable images raise a ``UserError``, unless they are
        skipped; then other drawn images take their place.
        """
        used, places = indices.unique(return_inverse=True)
        numbers = used.tolist()
        kept: list[Tensor] = []
        with encoders_on(device, self.latent), quiet_libraries():
            for pairs in batched(zip(self.pairs.images(numbers), numbers, strict=False), ENCODED_AT_ONCE):
                generators = [torch.Generator().manual_seed(number) for _, number in pairs]
                encoded = self.latent.encode_images(torch.stack([image for image, _ in pairs]), generators)
                kept.append(encoded.cpu())
        latents = torch.cat(kept)
        return latents[places % len(latents)]

    def conditions(self, indices: Tensor, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the network's conditions for the captions at ``indices`` ``(B,)``, on the CPU."""
        captions = [self.pairs.captions[int(i)] for i in indices]
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._encoded]
        with encoders_on(device, self.latent), quiet_libraries():
            for start in range(0, len(missing), ENCODED_AT_ONCE):
                part = missing[start : start + ENCODED_AT_ONCE]
                tables = {name: table.cpu() for name, table in self.latent.encode_prompts(part).items()}
                for row, caption in enumerate(part):
                    self._encoded[caption] = {name: table[row : row + 1] for name, table in tables.items()}
        rows = [self._encoded[caption] for caption in captions]
        found = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        if self._guidance is not None:
            found["timestep_cond"] = self._guidance.expand(len(rows), -1)
        return found


def latent_run(run: TextToImage, *, guided: bool, image_size: int | None = None) -> LatentRun:
    """Return a run viewed as a model of its latents.

    Args:
        guided: whether to apply guidance, as in sampling but not in training.
        image_size: side of its images in pixels, for networks that support several sizes.
    """
    if image_size is not None and run.family.any_size:
        run = replace(run, config={**run.config, "data": {**run.config.get("data", {}), "image_size": image_size}})
    network = viewed(run.model)
    run.family.tell_guidance(network, run.guidance_scale)
    null = _pipeline_of(run).encode_null() if guided and run.is_guided else None
    model = GuidedNetwork(network, null, run.guidance_scale, run.family).eval()
    return LatentRun(model, run.scheduler, run.source, run.config, run=run)


def true_latents(
    run: LatentRun, name: str | None, options: DataOptions = AS_TRAINED, prompts: tuple[str, ...] | None = None
) -> TrueLatents:
    """Return the real latents of a run, from the data set ``name`` or its training data, with captions or prompts.

    ``prompts`` are for images without captions, one per class or in turn; None for those of the training.

    Raises:
        UserError: the images cannot be loaded, have neither captions nor prompts, or do not fit the network's classes.
    """
    latent = _pipeline_of(run.run)
    if options.image_size not in (None, latent.image_size):
        raise UserError(
            f"--image-size {options.image_size} does not fit {run.source}, whose latents encode images of "
            f"{latent.image_size} pixels: leave it out."
        )
    dim = run.run.model.config.get("time_cond_proj_dim")
    scale = torch.tensor([run.run.guidance_scale - 1.0])
    return TrueLatents(_pairs(run, name, options, prompts), latent, guidance_embedding(scale, dim) if dim else None)


def _pairs(run: LatentRun, name: str | None, options: DataOptions, prompts: tuple[str, ...] | None) -> Pairs:
    latent, numbered = _pipeline_of(run.run), run.run.family.labelled
    try:
        own = None if numbered else _own(run, name, options)
    except UncaptionedError:
        own = None
        if not run.run.prompts and prompts is None:
            raise UserError(
                f"{reference_name(run, name)} has no captions: give --prompts, a text file with one prompt per "
                "line (one per class, or used in turn)."
            ) from None
    if own is not None:
        if prompts is not None:
            raise UserError(f"{own.name} has captions of its own: leave out --prompts.")
        source = own
        return Pairs(own.name, own.captions, lambda some: (image for image, _ in source.subset(some)), own.fingerprint)
    sized = replace(options, image_size=latent.image_size, channels=latent.image_channels)
    data = reference_data(run.run, name, sized)
    if not numbered:
        return prompted(data, prompts or run.run.prompts)
    check_classes(run.source, class_embeddings(run.run.model), data)
    assert data.labels is not None
    return prompted(data, [str(label) for label in range(int(data.labels.max()) + 1)])


def check_classes(source: str, classes: int, data: ImageData) -> None:
    """Raise a ``UserError`` for data without labels, or with more classes than the network has."""
    if data.labels is None or int(data.labels.max()) >= classes:
        found = "no labels" if data.labels is None else f"{data.num_classes} classes"
        raise UserError(
            f"{source} has {classes} classes but {data.name} has {found}; give the images that it was trained on "
            "with --data."
        )


def _own(run: LatentRun, name: str | None, options: DataOptions) -> CaptionedImages:
    """Load images that come with captions; raise an ``UncaptionedError`` if they have none."""
    latent = _pipeline_of(run.run)
    reading = {key: value for key, value in reading_of(run.run, name, options).items() if key in READING}
    size = {"image_size": latent.image_size, "channels": latent.image_channels}
    return load_captioned(reference_name(run, name), **{**reading, **size})


def _pipeline_of(run: TextToImage) -> LatentPipeline:
    data = run.config.get("data", {})
    size = data.get("image_size") if run.family.any_size else None
    return LatentPipeline(run.pipeline, run.source, size, data.get("caption_tokens"))
