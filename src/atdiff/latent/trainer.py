"""Training on the latents of a text-to-image pipeline: denoising, and latent consistency distillation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor

from atdiff.data.captions import load_captioned
from atdiff.data.sources import ImageData, load_data
from atdiff.errors import UserError
from atdiff.files import write_text
from atdiff.latent.cache import LatentData, latent_data
from atdiff.latent.generate import PROMPTS_FILE, text_to_image_run
from atdiff.latent.lora import TARGET_MODULES, add_lora, load_lora_state, lora_state, save_lora
from atdiff.latent.pipeline import LatentPipeline, load_latent_pipeline, make_student, save_student
from atdiff.objectives.latent_consistency import GuidedTeacher, LatentConsistencyObjective
from atdiff.quiet import quiet_libraries
from atdiff.sampling.schedulers import default_sampler
from atdiff.training.build import build_adversary, build_objective, consistency_options, consistency_scheduler
from atdiff.training.config import SchedulerConfig, TrainConfig
from atdiff.training.loop import Trainer

__all__ = ["LatentTrainer"]

GUIDANCE_DIM = 256  # of the embedded guidance scale, as in the published LCMs
SHOWN = 16  # pictures of a grid of samples


class LatentTrainer(Trainer):
    """Trains the U-Net, or adapters of it, of the pipeline that ``training.init`` names.

    With ``consistency.mode="distillation"`` that pipeline is the teacher and the start of the student, and the result
    is a pipeline (or LoRA weights, in ``lora/``) for ``LCMScheduler``. Otherwise its U-Net is trained as the denoiser
    that it is.
    """

    data: LatentData

    def _prepare(self) -> None:
        config = self.config
        self.published = "lora" if config.lora.rank else "pipeline"
        self._check(config)
        size = config.data.image_size
        self.latent = load_latent_pipeline(self._source())
        if size not in (None, self.latent.image_size):
            raise UserError(
                f"data.image_size={size} does not fit {self.latent.source}, whose latents are those of pictures of "
                f"{self.latent.image_size} pixels; set it to that, or leave it out."
            )
        scheduler = self.latent.scheduler
        self._check_prediction_type(config.objective.prediction_type)
        self.distils = config.consistency.mode == "distillation"
        with quiet_libraries():  # it remarks on options of the scheduler's own class
            intervals = config.consistency.intervals
            self.scheduler = consistency_scheduler(scheduler, intervals) if self.distils else scheduler
        embeds = config.consistency.embed_guidance and not config.lora.rank
        # A pipeline that was distilled before keeps its own embedding.
        self.guidance_dim = self.latent.unet.config.time_cond_proj_dim or (GUIDANCE_DIM if embeds else None)
        self.objective: Any = self._objective()
        self.network = self._network()
        self.captioned = load_captioned(
            config.data.name,
            split=config.data.split,
            image_size=self.latent.image_size,
            channels=self.latent.image_channels,
            captions=config.data.captions,
            caption_column=config.data.caption_column,
            limit=config.data.limit,
            unreadable=config.data.unreadable,
        )

    def _check(self, config: TrainConfig) -> None:
        """Find the mistakes that the settings alone show, before anything is loaded."""
        if config.consistency.mode == "training":
            raise UserError("consistency.mode='training' needs a network of pixels: latents are distilled.")
        if config.model.name == "pipeline" and config.training.init is None:
            raise UserError(
                "model.name='pipeline' trains the U-Net of a pipeline: name its folder or hub id as --training.init."
            )
        if config.training.init is None and config.lora.rank:
            raise UserError(
                "lora.rank adapts a pipeline that is kept apart from the run: name its folder or hub id as "
                "--training.init."
            )
        if config.data.class_conditional:
            raise UserError("data.class_conditional is for networks of pixels: a pipeline is told captions.")
        if config.data.flip:
            raise UserError("data.flip is for networks of pixels: each image is encoded once; leave it out.")
        if config.scheduler != SchedulerConfig():
            raise UserError("scheduler is for networks of pixels: a pipeline brings its own; leave it out.")
        if config.objective.variance != "fixed":
            raise UserError(
                f"objective.variance={config.objective.variance!r} is for networks of pixels: the U-Net of a pipeline "
                "predicts no variance; leave it out."
            )
        if config.consistency.mode == "distillation":
            self._check_distillation(config)

    @staticmethod
    def _check_distillation(config: TrainConfig) -> None:
        settings = config.consistency
        if settings.teacher is None and config.training.init is None:
            raise UserError(
                "consistency.mode='distillation' needs a teacher, and the U-Net of model.name='tiny-sd' is untrained: "
                "give a trained pipeline as --training.init (or --consistency.teacher)."
            )
        # The scheduler's defaults are Stable Diffusion's noise; the pipeline's own comes later.
        LatentConsistencyObjective(LCMScheduler(), guidance=settings.guidance, **consistency_options(config))

    def _source(self) -> str:
        """Return the pipeline to start from; a tiny one is made of the data."""
        config = self.config
        if config.model.name == "pipeline" or config.training.init is not None:
            assert config.training.init is not None
            return config.training.init
        if not config.data.captions:
            raise UserError("model.name='tiny-sd' needs data.captions, a prompt for each class of the data.")
        from atdiff.latent.tiny_sd import tiny_stable_diffusion

        return str(tiny_stable_diffusion(self.images, config.data.captions, **config.model.args))

    def check_arm(self, config: TrainConfig) -> Any:  # noqa: ANN401  (any diffusers scheduler)
        """Find what is wrong with the settings of an arm that goes on from this run; return its scheduler."""
        build_adversary(config)
        if config.consistency.mode != "distillation":
            return self.latent.scheduler
        with quiet_libraries():
            scheduler = consistency_scheduler(self.latent.scheduler, config.consistency.intervals)
        guidance = config.consistency.guidance
        LatentConsistencyObjective(scheduler, guidance=guidance, **consistency_options(config))
        return scheduler

    @property
    def images(self) -> ImageData:
        """The images, as a reference for metrics."""
        data = self.config.data
        size = data.image_size or (self.latent.image_size if hasattr(self, "latent") else None)
        return load_data(data.name, split=data.split, image_size=size, unreadable=data.unreadable)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the pictures."""
        return self.latent.image_channels, self.latent.image_size, self.latent.image_size

    def _check_prediction_type(self, asked: str | None) -> None:
        if asked not in (None, self.latent.prediction_type):
            raise UserError(
                f"objective.prediction_type={asked!r} does not fit {self.latent.source}, which predicts "
                f"{self.latent.prediction_type!r}; leave it out."
            )

    def _objective(self) -> Any:  # noqa: ANN401  (either objective)
        settings = self.config.consistency
        if not self.distils:
            return build_objective(self.config, self.scheduler)
        teacher = self._teacher()
        return LatentConsistencyObjective(
            self.scheduler,
            teacher=GuidedTeacher(teacher.unet, teacher.scheduler, self.latent.encode_null(), solver=settings.solver),
            guidance=settings.guidance,
            guidance_dim=self.guidance_dim,
            **consistency_options(self.config),
        )

    def _teacher(self) -> LatentPipeline:
        source = self.config.consistency.teacher
        teacher = self.latent if source is None else load_latent_pipeline(source)
        if isinstance(teacher.scheduler, LCMScheduler) or teacher.unet.config.time_cond_proj_dim:
            raise UserError(
                f"the teacher {teacher.source} is a distilled pipeline itself: give the one that it was distilled from "
                "as --consistency.teacher."
            )
        if teacher.latent_shape != self.latent.latent_shape:
            raise UserError(
                f"the teacher {source} has latents {teacher.latent_shape} and {self.latent.source} "
                f"{self.latent.latent_shape}: give one of the same size and channels."
            )
        if teacher.prediction_type != self.latent.prediction_type:
            raise UserError(
                f"the teacher {source} predicts {teacher.prediction_type!r} and {self.latent.source} "
                f"{self.latent.prediction_type!r}: give one of the same prediction type."
            )
        if teacher is not self.latent and not _same_conditions(teacher, self.latent):
            raise UserError(
                f"the teacher {source} makes other embeddings of a prompt than {self.latent.source}: captions are "
                "encoded once for both, so give one with the same text encoders."
            )
        return teacher

    def _network(self) -> Any:  # noqa: ANN401  (a UNet2DConditionModel)
        config = self.config
        network = make_student(self.latent.unet, guidance_dim=self.guidance_dim if self.distils else None)
        if config.lora.rank:
            targets = TARGET_MODULES if config.lora.targets is None else config.lora.targets
            add_lora(network, rank=config.lora.rank, alpha=config.lora.alpha, target_modules=targets)
        if config.model.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def open(self, out: Path) -> None:
        """Take the folder as every trainer does, and encode the images and captions that the cache does not have.

        The first captions are written to ``prompts.txt``, which samples of the run are drawn of.
        """
        super().open(out)
        if self.finished:
            return
        if self.accelerator.is_main_process and not self.config.data.captions:
            lines = (" ".join(caption.split()) for caption in self.data.captions[:SHOWN])
            write_text(out / PROMPTS_FILE, "".join(f"{line}\n" for line in lines))

    def _read_data(self) -> None:
        if not hasattr(self, "data"):
            with self.accelerator.main_process_first():
                self.data = latent_data(self.captioned, self.latent, device=self.accelerator.device)

    def _load(self, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        indices, device = self._indices(batch), self.accelerator.device
        conditions = {name: value.to(device) for name, value in self.data.conditions(indices).items()}
        share = self.config.objective.label_dropout
        if share > 0:
            dropped = torch.rand(len(indices), device=device) < share
            for name, null in self.data.null_conditions(len(indices)).items():
                where = dropped.view(-1, *[1] * (null.ndim - 1))
                conditions[name] = torch.where(where, null.to(device), conditions[name])
        return self.data.x0(indices).to(device), conditions

    def _weights(self, network: Any) -> dict[str, Tensor]:  # noqa: ANN401
        return lora_state(network) if self.config.lora.rank else super()._weights(network)

    def _load_weights(self, network: Any, weights: dict[str, Tensor]) -> None:  # noqa: ANN401
        if self.config.lora.rank:
            load_lora_state(network, weights)
        else:
            super()._load_weights(network, weights)

    def _draw_samples(self) -> Tensor:
        pipeline = copy.copy(self.latent.pipeline)
        pipeline.register_modules(unet=self._average(), scheduler=self.scheduler)
        settings: dict[str, Any] = {"consistency": {"sample_guidance": self.config.consistency.sample_guidance}}
        settings["data"] = {"captions": self.config.data.captions or self.data.captions[:SHOWN]}
        run = text_to_image_run(pipeline, str(self.out), settings)
        drawn = run.pictures(
            sampler=default_sampler(self.scheduler),
            steps=4 if self.distils else 20,
            num=SHOWN,
            seed=0,
            device=self.accelerator.device,
        )
        images = torch.cat(list(drawn))
        for part in (self.latent.vae, *self.latent.text_encoders):
            part.to("cpu")
        return images

    def _publish(self, average: Any) -> None:  # noqa: ANN401
        save = save_lora if self.config.lora.rank else save_student
        save(self.out / self.published, self.latent, average, self.scheduler)


def _same_conditions(one: LatentPipeline, other: LatentPipeline) -> bool:
    first, second = (pipeline.encode_prompts(["a photo of a cat"]) for pipeline in (one, other))
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.allclose(first[name], second[name], rtol=1e-2, atol=1e-2)
        for name in first
    )
