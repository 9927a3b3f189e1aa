"""Training on a pipeline's latents: denoising with U-Nets or transformers, and latent consistency distillation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import LCMScheduler
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data.buckets import bucket_line
from atdiff.data.captions import StreamedImages
from atdiff.data.sources import ImageData, load_data
from atdiff.models.classes import remember_classes
from atdiff.objectives.guided import GuidedTeacher, LatentConsistencyObjective
from atdiff.pipelines.cache import LatentData, latent_data
from atdiff.pipelines.encoded import check_contents
from atdiff.pipelines.latent_model import make_frozen, make_student, save_student
from atdiff.pipelines.lora import add_lora, frozen_fingerprint, load_lora_state, lora_state, save_lora
from atdiff.pipelines.maker import find_maker
from atdiff.pipelines.model import data_options
from atdiff.pipelines.text_to_image import PROMPTS_FILE
from atdiff.system.files import write_text
from atdiff.system.quiet import quiet_libraries
from atdiff.training.build import build_adversary, build_objective, consistency_options, consistency_scheduler
from atdiff.training.config import SMALL_PIPELINES, TrainConfig
from atdiff.training.encoded import encoded_folder
from atdiff.training.memory_estimate import MemoryEstimate, estimate_memory, tell_memory
from atdiff.training.order import bucket_indices
from atdiff.training.start import noise_scheduler
from atdiff.training.tasks.base import Task
from atdiff.training.tasks.latent_checks import (
    as_start,
    check_buckets,
    check_classes,
    check_distillable,
    check_fits,
    check_parametrisation,
    check_settings,
    load_latent_teacher,
)
from atdiff.training.tasks.latent_drawing import SHOWN, LatentDrawing
from atdiff.training.tasks.latent_source import open_captioned, open_pipeline

__all__ = ["LatentTask"]

GUIDANCE_DIM = 256  # of the embedded guidance scale, as in the published LCMs


class LatentTask(Task):
    """Trains the network of the pipeline in ``training.init``, or adapters of it.

    With ``consistency.mode="distillation"`` the pipeline is the teacher and initialises the student, and the result is
    a pipeline (or LoRA weights, in ``lora/``) for ``LCMScheduler``; ``"training"`` has no teacher. Otherwise the
    network is trained as a denoiser.
    """

    data: LatentData
    beside_pixels = "captions"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.published = "lora" if config.lora.rank else "pipeline"
        check_settings(config)
        self.latent = open_pipeline(config, self._source())
        check_fits(config, self.latent)
        if config.objective.prediction_type == "v":
            predicts: Any = self.latent.prediction_type
            self.config = config = replace(config, objective=replace(config.objective, prediction_type=predicts))
        self.scheduler = self._scheduler_of(config)
        distils = config.consistency.mode != "training"
        embeds = config.consistency.embed_guidance and distils and not config.lora.rank
        # A pipeline that is already distilled keeps its own embedding.
        own = self.latent.network.config.get("time_cond_proj_dim")
        self.guidance_dim = own or (GUIDANCE_DIM if embeds else None)
        self.objective: Any = self._objective()
        self.network = self._network()
        self._drawing = LatentDrawing(config, self.latent, self.scheduler)
        self._drawing.check(self.network)
        self.captioned = open_captioned(config, self.latent)
        if not isinstance(self.captioned, StreamedImages) and self.latent.family.labelled:
            check_classes(config, self.latent, self.captioned)
        check_buckets(config, self.latent, self.captioned)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names of labelled data, in label order; None for other data."""
        return self.captioned.classes

    def count(self, classes: tuple[str, ...]) -> None:
        """Number the classes in the given order."""
        if classes != self.classes:
            self.captioned = open_captioned(self.config, self.latent, classes)

    def _source(self) -> str:
        """Return the pipeline to start from, building one for the data if ``model.name`` is not ``pipeline``."""
        config = self.config
        if config.model.name == "pipeline" or config.training.init is not None:
            assert config.training.init is not None
            return config.training.init
        if config.data.latents is not None:
            raise UserError(
                f"data.latents were encoded by a saved pipeline, but model.name={config.model.name!r} would make "
                "another one: give that pipeline as --training.init."
            )
        if config.model.name in SMALL_PIPELINES and not config.data.captions:
            raise UserError(
                f"model.name={config.model.name!r} needs data.captions, a prompt for each class of the data."
            )
        every = self._images(limit=None).everything
        return str(find_maker(config.model.name)(every, config.data.captions, **config.model.args))

    def check_arm(self, config: TrainConfig, *, from_here: bool = True) -> Any:  # noqa: ANN401
        """Check the settings of an arm; see :meth:`Task.check_arm`."""
        build_adversary(config)
        check_settings(config)
        if not from_here and config.training.init != self.config.training.init:
            return LatentTask(config).scheduler
        check_parametrisation(config, self.latent)
        if config.data == self.config.data:  # otherwise checked when the arm starts
            check_buckets(config, self.latent, self.captioned)
        scheduler = self._scheduler_of(config)
        if config.consistency.mode != "none":
            self._teacher_of(config)
            guidance = config.consistency.guidance
            LatentConsistencyObjective(scheduler, guidance=guidance, **consistency_options(config))
        return scheduler

    def _scheduler_of(self, config: TrainConfig) -> Any:  # noqa: ANN401  (any diffusers scheduler)
        """Return the scheduler to train with and publish, which has the pipeline's noise schedule."""
        scheduler = self.latent.scheduler
        with quiet_libraries():  # diffusers warns about options specific to the original class
            if config.consistency.mode != "none":
                check_distillable(self.latent)
                return consistency_scheduler(scheduler, config.consistency.intervals)
            if isinstance(scheduler, LCMScheduler):  # not for denoisers
                return noise_scheduler(config, as_start(self.latent))
        return scheduler

    @property
    def base(self) -> str | None:
        """See :attr:`Task.base`; None for weights below 16 bits, which devices quantise differently."""
        comparable = self.config.lora.base_precision in ("float32", "bf16")
        return frozen_fingerprint(self.network) if self.config.lora.rank and comparable else None

    @property
    def encoders(self) -> str | None:
        """See :attr:`Task.encoders`."""
        return self.data.encoders

    @property
    def own_scheduler(self) -> dict[str, Any] | None:
        """See :attr:`Task.own_scheduler`."""
        return dict(json.loads(self.scheduler.to_json_string()))

    @property
    def images(self) -> ImageData:
        """The images, as a reference for metrics."""
        return self._images(self.config.data.limit)

    def _images(self, limit: int | None) -> ImageData:
        options = data_options(asdict(self.config))
        if limit is not None:
            options |= {"limit": limit, "caption_column": self.config.data.caption_column}
        if hasattr(self, "latent"):
            options |= {"image_size": self.latent.image_size, "channels": self.latent.image_channels}
        return load_data(self.config.data.name, **options)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self.latent.image_channels, self.latent.image_size, self.latent.image_size

    def _objective(self) -> Any:  # noqa: ANN401  (either objective)
        if not self.is_consistency:
            objective: Any = build_objective(self.config, self.scheduler)
            self._shift(objective, self.latent.latent_shape)
            return objective
        return LatentConsistencyObjective(
            self.scheduler,
            teacher=self._teacher_of(self.config),
            guidance=self.config.consistency.guidance,
            guidance_dim=self.guidance_dim,
            **consistency_options(self.config),
        )

    def _shift(self, objective: Any, latent_shape: tuple[int, int, int]) -> None:  # noqa: ANN401
        """Shift the timestep sampler as the pipeline shifts its sampling steps for latents of this shape."""
        shift = self.latent.family.timestep_shift(self.scheduler, latent_shape, self.latent.network)
        if shift is not None and hasattr(objective.timestep_sampler, "shift"):
            objective.timestep_sampler.shift = shift

    def _teacher_of(self, config: TrainConfig) -> GuidedTeacher | None:
        """Return the teacher for distillation; None for consistency training, which learns from the data."""
        if config.consistency.mode == "training":
            return None
        teacher = load_latent_teacher(config, self.latent)
        null = self.latent.encode_null()
        return GuidedTeacher(teacher.network, teacher.scheduler, null, solver=config.consistency.solver)

    def _network(self) -> Any:  # noqa: ANN401  (a U-Net or a transformer)
        config = self.config
        if not config.lora.rank:
            network = make_student(self.latent.network, guidance_dim=self.guidance_dim if self.is_consistency else None)
        else:
            network = make_frozen(self.latent.network)
            usual = self.latent.family.lora_targets
            targets = usual if config.lora.targets is None else config.lora.targets
            add_lora(network, rank=config.lora.rank, alpha=config.lora.alpha, target_modules=targets)
            # Every rank loaded the same frozen weights, and DDP cannot broadcast quantised ones.
            frozen = [name for name, weight in network.named_parameters() if not weight.requires_grad]
            network._ddp_params_and_buffers_to_ignore = frozen
        if config.model.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def note_in(self, out: Path) -> None:
        """Write the first captions to ``prompts.txt``, the prompts for sampling from the run."""
        if not self.config.data.captions:
            lines = (" ".join(caption.split()) for caption in self.data.captions[:SHOWN])
            write_text(out / PROMPTS_FILE, "".join(f"{line}\n" for line in lines))

    def read_data(self, accelerator: Accelerator) -> None:
        """Encode the images and captions missing from the cache, or verify every file of ``data.latents``."""
        if not hasattr(self, "data"):
            with accelerator.main_process_first():
                flip = self.config.data.flip
                if isinstance(self.captioned, LatentData):
                    check_contents(encoded_folder(self.config.data))
                    self.data = self.captioned
                else:
                    self.data = latent_data(self.captioned, self.latent, device=accelerator.device, flip=flip)
            self._groups = self.data.groups
            if self.latent.buckets:
                self.told = bucket_line(self.data.sizes(self.latent.image_size // self.latent.latent_shape[-1]))

    def indices(self, batch: int, batch_size: int) -> Tensor:
        """Return the indices of a batch over all processes, all from one bucket."""
        return bucket_indices(self.config.training.seed, batch, batch_size, self._groups)

    @property
    def alike(self) -> Tensor:
        """Indices of the samples in the largest bucket."""
        return max(self._groups, key=len)

    def prepare(self, out: Path, accelerator: Accelerator, *, progress: bool) -> None:
        """Print the estimated training memory, unless ``training.shard`` splits it over processes."""
        if progress and accelerator.is_main_process and not self.config.training.shard:
            try:
                found = self.memory()
            except RuntimeError as error:  # from torch, such as for reading the values of a meta tensor
                print(f"the memory for training could not be estimated ({str(error).splitlines()[0]})")
            else:
                tell_memory(found, accelerator.device)

    def memory(self) -> MemoryEstimate:
        """Return an estimate of the training memory; requires :meth:`read_data`."""
        one = torch.zeros(1, dtype=torch.int64)
        teacher = getattr(getattr(self.objective, "teacher", None), "model", None)
        return estimate_memory(self.network, self.data.x0(one), self.data.conditions(one), self.config, teacher)

    def load(self, indices: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the latents and embeddings of a batch, dropping prompts at rate ``objective.label_dropout``."""
        conditions = {name: value.to(device) for name, value in self.data.conditions(indices).items()}
        share = self.config.objective.label_dropout
        if share > 0:
            dropped = torch.rand(len(indices), device=device) < share
            for name, null in self.data.null_conditions(len(indices)).items():
                where = dropped.view(-1, *[1] * (null.ndim - 1))
                conditions[name] = torch.where(where, null.to(device), conditions[name])
        x0 = self.data.x0(indices)
        if self.config.data.flip:
            flipped = (torch.rand(len(indices)) < 0.5).view(-1, 1, 1, 1)
            x0 = torch.where(flipped, self.data.mirrored(indices), x0)
        if self.latent.buckets and not self.is_consistency:
            _, channels, height, width = x0.shape
            self._shift(self.objective, (channels, height, width))
        return x0.to(device), conditions

    def weights(self, network: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Return the weights to checkpoint: only the LoRA if one is trained."""
        return lora_state(network) if self.config.lora.rank else super().weights(network)

    def load_weights(self, network: Any, weights: dict[str, Tensor]) -> None:  # noqa: ANN401
        """Load weights returned by :meth:`weights`."""
        if self.config.lora.rank:
            load_lora_state(network, weights)
        else:
            super().load_weights(network, weights)

    def samples(self, out: Path, average: Any, device: torch.device) -> Tensor:  # noqa: ANN401
        """Return samples for the first prompts."""
        captions = self.config.data.captions or self.data.captions[:SHOWN]
        return self._drawing.samples(str(out), average, captions, device)

    def validation(self, out: Path, average: Any, device: torch.device) -> Iterator[tuple[int, Tensor]]:  # noqa: ANN401
        """Yield ``(steps, images)`` for each validation step count, all from the same noise."""
        return self._drawing.validation(str(out), average, device)

    def publish(self, out: Path, average: Any) -> None:  # noqa: ANN401
        """Write the pipeline or the LoRA."""
        if self.latent.family.labelled:
            remember_classes(average, self.classes, None)
        save = save_lora if self.config.lora.rank else save_student
        save(out / self.published, self.latent, average, self.scheduler)
