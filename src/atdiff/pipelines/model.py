"""Where results live: training folders and diffusers pipelines."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

import atdiff.models.mlp  # noqa: F401  (diffusers loads only classes of modules that are imported)
from atdiff.core.choices import WHITE
from atdiff.core.errors import UserError
from atdiff.data.labels import class_line
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.data.sources import ImageData, load_data
from atdiff.models.call import class_embeddings, image_tokens
from atdiff.models.classes import class_names, null_label, says_null
from atdiff.models.ema import average_name
from atdiff.models.inference import DTYPES, prepare_inference
from atdiff.pipelines.plain import pipeline_class
from atdiff.pipelines.record import BEFORE, classes_of, stored_data
from atdiff.sampling.corrections import Correction
from atdiff.sampling.generate import iter_generate
from atdiff.sampling.schedulers import make_scheduler
from atdiff.system.files import written_aside
from atdiff.system.fingerprint import network_fingerprint, scheduler_fingerprint, settings_fingerprint
from atdiff.system.locate import check_local, hub_failure, hub_location, run_config
from atdiff.system.quiet import quiet_libraries

__all__ = [
    "Denoiser",
    "check_shape",
    "data_options",
    "load_denoiser",
    "reading_of",
    "reference_data",
    "reference_name",
    "run_config",
    "save_pipeline",
]

# Embeddings of networks of CIFAR and ImageNet with a null label, which plain diffusers has no place to say.
USUAL_WITH_NULL = (11, 101, 1001)


@dataclass(frozen=True)
class Denoiser:
    """A trained network with the scheduler that it was trained under.

    Attributes:
        model: the network.
        scheduler: of its training.
        source: the run, as the user named it.
        config: the settings of a training folder; empty for others.
        prompts: one a class, where they are known; of no consequence to the pictures of this class.
        precision: in which the network runs; see :meth:`prepared`.
        variant: of a pipeline's weights, where one was asked for.
    """

    model: Any
    scheduler: Any
    source: str
    config: dict[str, Any]
    prompts: tuple[str, ...] = ()
    precision: str = "no"
    variant: str | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        config = self.model.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def weights_name(self) -> str:
        """Which weights these are, for the recipe of a figure."""
        return average_name(self.config) if "training" in self.config else "as published"

    @property
    def dtype_name(self) -> str:
        """The precision, for the recipe of a figure."""
        return DTYPES[self.precision]

    def prepared(self, *, precision: str = "no", compile: bool = False, device: torch.device | str = "cpu") -> Self:
        """Return the run with its network set up to draw in another precision, or compiled; once a network.

        Args and errors: see :func:`atdiff.models.inference.prepare_inference`.
        """
        prepare_inference(self.model, precision=precision, compile=compile, device=device)
        return replace(self, precision=precision)

    @property
    def recipe(self) -> dict[str, Any]:
        """What a figure depends on besides sampler, steps, seed and weights."""
        return {} if self.variant is None else {"variant": self.variant}

    def guided(self, scale: float) -> Self:
        """Return the run with another scale of guidance, for the networks that know guidance.

        Raises:
            UserError: this one does not, or the scale is out of range.
        """
        raise UserError(
            f"{self.source} is a network of pixels, which knows no guidance; leave out --guidance-scale {scale:g}."
        )

    def fingerprints(self) -> dict[str, str]:
        """Return hashes of what its pictures depend on, computed now: before :meth:`prepared`, which wraps the network.

        ``weights`` of all networks with their configurations, ``scheduler`` of its class and configuration, and
        ``settings`` of the size and the classes of its pictures.
        """
        return {
            "weights": network_fingerprint(self.model),
            "scheduler": scheduler_fingerprint(self.scheduler),
            "settings": self._settings_fingerprint(),
        }

    def _settings_fingerprint(self) -> str:
        labels = self.class_labels(class_embeddings(self.model) + 1)
        return settings_fingerprint(self.image_shape, labels)

    def evaluations(self, sampler: str, steps: int) -> int:
        """Return how often a picture takes the network.

        Raises:
            UserError: the sampler or the number of steps does not fit the network.
        """
        return len(self.sampling_scheduler(sampler, steps).timesteps)

    def sampling_scheduler(self, sampler: str, steps: int) -> Any:  # noqa: ANN401  (any diffusers scheduler)
        """Return the scheduler of a sampler, with its timesteps set.

        Raises:
            UserError: as :func:`atdiff.sampling.make_scheduler`.
        """
        tokens = image_tokens(self.model, self.image_shape)
        return make_scheduler(sampler, self.scheduler, steps, tokens=tokens)

    def check_corrections(self, corrections: Sequence[str]) -> None:
        """Find out whether this run can be sampled with corrections at all; every network of pixels can.

        Raises:
            UserError: it cannot, and one of ``corrections`` is not ``none``.
        """

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their labels; None where they are not known."""
        return class_names(self.model) or classes_of(stored_data(self.source), None)

    @property
    def num_classes(self) -> int:
        """Number of classes that the network knows, a null label not among them; 0 if it is unconditional."""
        return class_embeddings(self.model) - int(self._null() is not None)

    def _training(self) -> dict[str, Any]:
        """Return the settings of the training, of a run's ``pipeline`` folder too; empty for those of others."""
        folder = Path(self.source)
        return self.config or (run_config(str(folder.parent)) if folder.name == "pipeline" else {})

    def _null(self) -> int | None:
        if says_null(self.model):
            return null_label(self.model)
        # Runs of earlier versions say it nowhere else.
        dropped = self._training().get("objective", {}).get("label_dropout", 0.0) > 0
        return class_embeddings(self.model) - 1 if dropped else None

    def _may_have_null(self) -> bool:
        if says_null(self.model) or self._training():
            return False
        return self.model.config.get("num_class_embeds") in USUAL_WITH_NULL

    def label_of(self, text: str) -> int:
        """Return the label of a class, by name or else by number.

        Raises:
            UserError: there is no such class.
        """
        names = self._names()
        if text in names:
            return names.index(text)
        if re.fullmatch(r"[0-9]+", text):
            return int(text)
        known = f"expected one of its {class_line(names)}" if names else "its classes have no names, so give a number"
        raise UserError(f"{text!r} is no class of {self.source}: {known}.")

    def _names(self) -> Sequence[str]:
        return self.classes or ()

    def class_labels(self, num: int, label: int | None = None) -> Tensor | None:
        """Return labels for ``num`` pictures, all classes in turn or ``label`` for each; None if unconditional.

        The null label is no class. A network of others that does not say whether it has one is taken to have, as its
        last label, if it has 10, 100 or 1,000 labels and one more; a warning says so.

        Raises:
            UserError: a label is asked of an unconditional network, or there is no such class.
        """
        embeds, null = class_embeddings(self.model), self._null()
        if not embeds:
            if label is not None:
                raise UserError(f"{self.source} is not class-conditional; leave out the class label {label}.")
            return None
        drawn = torch.tensor([i for i in range(embeds) if i != null])
        if label is not None:
            if label not in drawn.tolist():
                raise UserError(f"class label {label} is not one of {self.source}'s 0 to {int(drawn[-1])}.")
            return torch.full((num,), label)
        if self._may_have_null():
            warnings.warn(
                f"{self.source} has {embeds} class labels and does not say whether the last is a null label: it is "
                f'taken for one and not drawn. If it is a class, write "_null_label": null into the '
                "network's config.json.",
                stacklevel=2,
            )
            drawn = drawn[:-1]
        return drawn[torch.arange(num) % len(drawn)]

    def pictures(
        self,
        *,
        sampler: str,
        steps: int,
        num: int,
        seed: int,
        batch_size: int = 256,
        label: int | None = None,
        correction: Correction | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[Tensor]:
        """Return batches of pictures in [-1, 1], float32 on the CPU, ``(up to batch_size, C, H, W)``.

        Picture ``i`` depends on ``seed``, ``i`` and its class alone.

        Args:
            sampler: one of :data:`atdiff.sampling.SAMPLERS`.
            steps: of the sampler.
            num: pictures.
            seed: see :func:`atdiff.sampling.generate.image_generators`.
            batch_size: pictures at once.
            label: the class of all pictures; None for all classes in turn.
            correction: of the sampler.
            device: where to run, and the network is moved; default: where it is.
            progress: show a progress bar.

        Raises:
            UserError: an option is out of range or does not fit the network.
            FloatingPointError: the pictures are not finite.
        """
        return iter_generate(
            self.model,
            self.scheduler,
            sampler=sampler,
            steps=steps,
            num=num,
            shape=self.image_shape,
            seed=seed,
            batch_size=batch_size,
            class_labels=self.class_labels(max(num, 0), label),
            correction=correction,
            device=device,
            progress=progress,
        )


def save_pipeline(folder: Path, model: nn.Module, scheduler: Any) -> None:  # noqa: ANN401
    """Write a pipeline that plain diffusers opens and draws with; the folder appears once it is complete."""
    with written_aside(folder) as aside:
        pipeline = pipeline_class(model, scheduler)(unet=model, scheduler=scheduler)
        pipeline.save_pretrained(aside)


def load_denoiser(
    run: str, *, text_to_image: bool = True, variant: str | None = None, guidance_scale: float | None = None
) -> Denoiser:
    """Load the (EMA) network of a training folder, a diffusers pipeline folder, or a hub id, in float32.

    Args:
        run: which of them.
        text_to_image: take pipelines with an autoencoder too, as a :class:`atdiff.pipelines.text_to_image.TextToImage`.
        variant: of a pipeline's weights, such as ``fp16``; a training folder knows its own.
        guidance_scale: see :meth:`Denoiser.guided`; None for that of the run's training, or the usual one.

    Raises:
        UserError: there is nothing of the kind, the download failed, it is a pipeline of a class that is not taken, or
            a text-to-image pipeline and those are not taken; or the scale does not fit.
    """
    config = run_config(run)
    is_lora = (config.get("lora") or {}).get("rank")
    options: dict[str, Any] = {} if config or variant is None else {"variant": variant}
    pipeline = _lora_pipeline(run, config) if is_lora else _pipeline(run, **options)
    from atdiff.pipelines.families import FAMILIES, known_class

    if known_class(type(pipeline), FAMILIES) is None:
        pipeline.unet.eval()
        denoiser = Denoiser(pipeline.unet, pipeline.scheduler, run, config, **options)
        return denoiser if guidance_scale is None else denoiser.guided(guidance_scale)
    if not text_to_image:
        what = "pipeline of latents" if getattr(pipeline, "text_encoder", None) is None else "text-to-image pipeline"
        raise UserError(
            f"{run} is a {what} ({type(pipeline).__name__}), whose network works on latents: this "
            "needs a network of pixels; `atdiff sample`, `evaluate` and `compare` take both."
        )
    from atdiff.pipelines.text_to_image import text_to_image_run  # imports this module

    drawing = replace(text_to_image_run(pipeline, run, config), **options)
    drawing.model.eval()
    return drawing if guidance_scale is None else drawing.guided(guidance_scale)


def _pipeline(run: str, variant: str | None = None) -> Any:  # noqa: ANN401  (any diffusers pipeline)
    check_local(run)
    folder = Path(run).expanduser()
    if (folder / "config.yaml").is_file():
        folder = folder / "pipeline"
    from atdiff.pipelines.loading import load_pipeline

    try:
        return load_pipeline(run, str(folder) if folder.exists() else hub_location(run, "model"), variant=variant)
    except UserError:
        raise
    except Exception as error:
        reason = hub_failure(" ".join(str(error).split())[:300])
        raise UserError(
            f"{run!r} could not be loaded as a folder or downloaded as a hub id ({reason}); give the path of a "
            "training folder or of a saved diffusers pipeline."
        ) from None


def _lora_pipeline(run: str, config: dict[str, Any]) -> Any:  # noqa: ANN401
    """Return the pipeline that a LoRA was trained from, with the LoRA on it and the scheduler of its training."""
    check_local(run)
    from atdiff.pipelines.lora import saved_scheduler  # imports this module

    base, folder = config["training"]["init"], Path(run) / "lora"
    variant = None if run_config(base) else (config.get("model") or {}).get("variant")
    try:
        pipeline = _pipeline(base, variant=variant)
    except UserError as error:
        raise UserError(f"{run} holds a LoRA of the pipeline {base!r}, which training.init names: {error}") from None
    try:
        with quiet_libraries():
            pipeline.load_lora_weights(folder)
            pipeline.to(torch.float32)
            pipeline.scheduler = saved_scheduler(folder / "scheduler")
    except Exception as error:  # of peft, safetensors and the loaders
        reason = " ".join(str(error).split())[:300]
        if importlib.util.find_spec("peft") is None:
            raise UserError(f"{run} holds a LoRA, which needs the package peft: pip install 'atdiff[lcm]'.") from None
        raise UserError(f"the LoRA {folder} does not load on the pipeline {base!r} ({reason}).") from None
    return pipeline


def reference_name(denoiser: Denoiser, name: str | None = None, options: DataOptions = AS_TRAINED) -> str:
    """Return the name of the images that a network is measured against: ``name``, or what it was trained on.

    Whatever is read in another way than in training follows the name, so that figures against the same images in two
    sizes stand beside each other.

    Raises:
        UserError: neither is known.
    """
    found = name or denoiser.config.get("data", {}).get("name")
    if not found:
        raise UserError(f"{denoiser.source} does not say which images it was trained on; name them with --data.")
    asked = ", ".join(f"{key} {value}" for key, value in options.asked.items())
    return f"{found} ({asked})" if asked else str(found)


def reference_data(denoiser: Denoiser, name: str | None = None, options: DataOptions = AS_TRAINED) -> ImageData:
    """Load those images, read as in training but for ``options``, and with the labels that the network knows.

    Raises:
        UserError: they cannot be loaded, are of another size than the network's, or of a class that it does not know.
    """
    reading = reading_of(denoiser, name, options)
    del reading["caption_column"]
    data = load_data(reference_name(denoiser, name), **reading)
    check_shape(denoiser, tuple(data.images.shape[1:]), data.name)
    return _with_trained_classes(data, denoiser, of_others=name is not None)


def check_shape(denoiser: Denoiser, found: tuple[int, ...], name: str) -> None:
    """Find out whether images of a shape ``(C, H, W)`` are of the size that a network makes.

    Raises:
        UserError: they are not; it says how to read them so.
    """
    channels, height, width = denoiser.image_shape
    if found == (channels, height, width):
        return
    remedies = [f"--image-size {height}"] if found[1:] != (height, width) and height == width else []
    if found[0] != channels and channels in (1, 3):
        remedies.append(f"--channels {channels}")
    how = f"read them with {' '.join(remedies)}, or name" if remedies else "name"
    raise UserError(
        f"the images of {name} have shape {found} but those of {denoiser.source} {(channels, height, width)}: {how} "
        "images of its size with --data."
    )


def data_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :func:`atdiff.data.load_data` that the settings of a run tell; defaults without any."""
    settings = config.get("data", {})
    return {
        "split": settings.get("split", "train"),
        "image_size": settings.get("image_size"),
        "channels": settings.get("channels"),
        "crop": settings.get("crop", "bicubic"),
        "background": settings.get("background", BEFORE["data"]["background"] if settings else WHITE),
        "image_column": settings.get("image_column"),
        "label_column": settings.get("label_column"),
        "unreadable": settings.get("unreadable", "refuse"),
    }


def reading_of(denoiser: Denoiser, name: str | None = None, options: DataOptions = AS_TRAINED) -> dict[str, Any]:
    """Return how images are read: as asked for, and for the rest as in training; columns of the same data alone.

    The names are those of :class:`atdiff.data.reading.DataOptions`.
    """
    settings = denoiser.config.get("data", {})
    known = {**data_options(denoiser.config), "caption_column": settings.get("caption_column")}
    if name not in (None, settings.get("name")):
        known |= {key: None for key in known if key.endswith("_column")}
    if hasattr(denoiser, "pipeline"):  # it is trained on images that are converted to what its autoencoder takes
        known["channels"] = denoiser.image_shape[0]
    return {**known, **options.asked}


def _with_trained_classes(data: ImageData, denoiser: Denoiser, *, of_others: bool) -> ImageData:
    """Return the images with labels as the network counts classes, or without, where others do not have these."""
    if data.classes is None:
        return data
    classes = denoiser.classes or classes_of(stored_data(denoiser.source), data.classes)
    if classes is None:
        return data
    try:
        return data.with_classes(classes)
    except UserError as error:
        if not of_others:
            raise
        warnings.warn(f"the labels of {data.name} are not used: {error}", stacklevel=3)
        return replace(data, labels=None, classes=None)
