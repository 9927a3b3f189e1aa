"""The training loop: data, passes, optimizer, average, checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor

from atdiff.data.sources import ImageData, load_data
from atdiff.errors import UserError
from atdiff.files import write_text
from atdiff.models.presets import build_model
from atdiff.objectives.consistency import ConsistencyObjective
from atdiff.objectives.denoising import DenoisingObjective
from atdiff.runs import open_run, save_pipeline
from atdiff.sampling.generate import generate, save_images
from atdiff.sampling.schedulers import default_sampler
from atdiff.training.build import (
    build_adversary,
    build_objective,
    build_scheduler,
    build_teacher,
    load_initial_weights,
)
from atdiff.training.checkpoint import latest_checkpoint, load_checkpoint, passes_of, save_checkpoint
from atdiff.training.config import OptimizerConfig, TrainConfig
from atdiff.training.ema import EMA
from atdiff.training.progress import TrainingBar, training_progress

__all__ = ["Trainer", "make_trainer", "train"]


def make_trainer(config: TrainConfig) -> Trainer:
    """Return the trainer of a run: of pixels, or of a pipeline's latents.

    Raises:
        UserError: for settings, data or weights that do not fit.
    """
    if config.model.name not in ("pipeline", "tiny-sd"):
        return Trainer(config)
    from atdiff.latent.trainer import LatentTrainer  # transformers takes seconds to import

    return LatentTrainer(config)


def train(config: TrainConfig, out: Path, *, progress: bool = True) -> Path:
    """Train, or resume, the run that ``config`` describes in the folder ``out``; return ``out``.

    Writes ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``samples/`` and ``pipeline/``.

    Raises:
        UserError: before anything is computed or written, for settings, data, weights or a folder that do not fit.
    """
    trainer = make_trainer(config)
    trainer.open(out)
    trainer.run(progress=progress)
    return out


class Trainer:
    """All that one run holds. Building it checks the settings and writes nothing."""

    published = "pipeline"  # the folder that a finished run leaves

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        _check_training(config)
        self.adversary = build_adversary(config)
        torch.manual_seed(config.training.seed)
        self._prepare()
        self.passes_done = self.batches_done = 0
        self._bar = TrainingBar(None, None)

    def _prepare(self) -> None:
        """Build scheduler, data, network and objective, what may be wrong with the settings first."""
        config = self.config
        if config.lora.rank:
            raise UserError("lora.rank needs model.name='pipeline': only text-to-image pipelines are adapted.")
        self.scheduler: Any = build_scheduler(config)
        build_objective(config, self.scheduler)
        teacher = build_teacher(config)
        self.data: Any = load_data(config.data.name, split=config.data.split, image_size=config.data.image_size)
        num_classes = self._num_classes()
        self.objective: DenoisingObjective | ConsistencyObjective = build_objective(
            config, self.scheduler, num_classes, teacher
        )
        dropout = config.objective.label_dropout > 0
        self.network: Any = build_model(
            config.model.name,
            config.model.args,
            image_shape=self.image_shape,
            learned_variance=config.objective.variance == "learned_range",
            num_class_embeds=None if num_classes is None else num_classes + int(dropout),
        )
        if config.training.init is not None:
            load_initial_weights(self.network, config.training.init)

    def check_arm(self, config: TrainConfig) -> Any:  # noqa: ANN401  (any diffusers scheduler)
        """Find what is wrong with the settings of an arm that goes on from this run; return its scheduler.

        Raises:
            UserError: something is.
        """
        scheduler = build_scheduler(config)
        build_objective(config, scheduler)
        build_adversary(config)
        return scheduler

    @property
    def images(self) -> ImageData:
        """The images, as a reference for metrics."""
        images: ImageData = self.data
        return images

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        channels, height, width = self.data.images.shape[1:]
        return channels, height, width

    def _num_classes(self) -> int | None:
        if not self.config.data.class_conditional:
            return None
        if self.data.labels is None:
            raise UserError(
                f"data.class_conditional is set, but {self.config.data.name!r} has no labels; put each class into "
                "its own subfolder or unset it."
            )
        return int(self.data.labels.max()) + 1

    def open(self, out: Path) -> None:
        """Take the folder ``out``, put everything on its device, and resume from its newest checkpoint."""
        settings = self.config.training
        self.out = out
        self.accelerator = Accelerator(
            mixed_precision=settings.precision,
            gradient_accumulation_steps=settings.accumulate,
            log_with=settings.tracker,
            project_dir=str(out),
        )
        resumed = open_run(out, self.config) if self.accelerator.is_main_process else True
        self.accelerator.wait_for_everyone()
        checkpoint = latest_checkpoint(out / "checkpoints") if resumed else None
        self.finished = (
            checkpoint is not None and passes_of(checkpoint) >= settings.passes and (out / self.published).is_dir()
        )
        if self.finished:
            return
        device = self.accelerator.device
        self.network.to(device)
        self.ema = EMA(self.network, settings.ema_decay)
        self._place_objective(device)
        optimizer = self.config.optimizer
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(
                [parameter for parameter in self.network.parameters() if parameter.requires_grad],
                lr=optimizer.lr,
                betas=optimizer.betas,
                weight_decay=optimizer.weight_decay,
                fused=device.type in ("cpu", "cuda"),
            )
        )
        model: Any = torch.compile(self.network) if settings.compile else self.network
        self.model = self.accelerator.prepare(model)
        if settings.tracker:
            self.accelerator.init_trackers("atdiff")
        if checkpoint is not None:
            self._restore(checkpoint)

    def _place_objective(self, device: torch.device) -> None:
        """Give a consistency objective its target network, and put its teacher on the device."""
        self.target: EMA | None = None
        objective, decay = self.objective, self.config.consistency.target_decay
        if not isinstance(objective, ConsistencyObjective):
            return
        objective.autocast = self.accelerator.autocast
        if decay > 0:
            self.target = EMA(self.network, decay)
            objective.target = self.target.module
        if objective.teacher is not None and isinstance(objective.teacher.model, torch.nn.Module):
            objective.teacher.model.to(device)

    def run(self, *, progress: bool = True) -> None:
        """Train to the last pass and write the pipeline; nothing where that was done before."""
        settings, started_at = self.config.training, self.passes_done
        if self.finished:
            return
        show = progress and self.accelerator.is_main_process
        with training_progress(settings.passes, started_at, show) as self._bar:
            for _ in self.passes():
                self._bar.update(self.passes_done)
        self._finish()

    def passes(self) -> Iterator[None]:
        """Train to the last pass, with logs, checkpoints and samples on the way; yield after every weight update."""
        self.model.train()
        self.started, self.first_pass = time.perf_counter(), self.passes_done
        while self.passes_done < self.config.training.passes:
            before = self.passes_done
            yield from self._train_batch()
            self.batches_done += 1
            self._periodic(before)

    def _train_batch(self) -> Iterator[None]:
        """Run the passes of one batch; yield after every weight update."""
        settings = self.config.training
        rank = self.accelerator.process_index
        # A function of (seed, rank, batch) alone, so that a resumed run draws what an undisturbed one would.
        _seed(np.random.SeedSequence([settings.seed, rank, self.batches_done]))
        x0, conditions = self._load(self.batches_done)
        cost = self.adversary.num_passes // self.adversary.updates_per_batch
        self._set_progress()
        for loss in self.adversary.passes(self.objective, self.model, x0, accumulate=settings.accumulate, **conditions):
            if self.passes_done >= settings.passes:
                break  # The last batch has more passes than are left.
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.config.optimizer.grad_clip:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.last_loss = loss.detach()
            if self.accelerator.sync_gradients:
                self.ema.update()
                if self.target is not None:
                    self.target.update()
                self.passes_done += cost
                self._set_progress()
                yield

    def _indices(self, batch: int) -> Tensor:
        """Return which samples of the data this process takes for a batch."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.config.training.batch_size * world
        return batch_indices(self.config.training.seed, batch, size, len(self.data))[rank::world]

    def _load(self, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images in [-1, 1] and the conditions of a batch, on the device."""
        indices, device = self._indices(batch), self.accelerator.device
        x0 = self.data.x0(indices).to(device, non_blocking=True)
        if self.config.data.flip:
            mirrored = torch.rand(len(x0), device=device) < 0.5
            x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)
        if not self.config.data.class_conditional:
            return x0, {}
        assert self.data.labels is not None
        return x0, {"class_labels": self.data.labels[indices].to(device, non_blocking=True)}

    def _set_progress(self) -> None:
        """Set what depends on how many passes are behind: the learning rate, and a curriculum of timesteps."""
        total = self.config.training.passes
        if isinstance(self.objective, ConsistencyObjective):
            self.objective.progress = self.passes_done / total
        factor = learning_rate_factor(self.config.optimizer, self.passes_done, total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor

    def _periodic(self, before: int) -> None:
        settings, now = self.config.training, self.passes_done

        def due(every: int) -> bool:
            return every > 0 and (now // every > before // every or now >= settings.passes)

        if due(settings.log_every):
            self._log()
        if not self.accelerator.is_main_process:
            return
        if due(settings.checkpoint_every):
            self._save()
        if due(settings.sample_every):
            self._sample()

    def _log(self) -> None:
        output = self.adversary.output
        assert output is not None
        seconds = time.perf_counter() - self.started
        values = {
            "pass": self.passes_done,
            "epoch": round(self.batches_done * self.config.training.batch_size / len(self.data), 4),
            "loss": self.last_loss.item(),
            **{name: term.detach().mean().item() for name, term in output.terms.items()},
            "delta_norm": self.adversary.mean_norm().item(),
            "nonfinite_deltas": int(self.adversary.nonfinite),
            "lr": self.optimizer.param_groups[0]["lr"],
            "passes_per_second": round((self.passes_done - self.first_pass) / max(seconds, 1e-9), 2),
        }
        if not math.isfinite(values["loss"]):
            checkpoint = latest_checkpoint(self.out / "checkpoints")
            raise UserError(
                f"the loss is {values['loss']} at pass {self.passes_done}; lower optimizer.lr or the adversary's "
                f"step_size; the last good checkpoint is {checkpoint or 'none yet'}."
            )
        if self.accelerator.is_main_process:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(values) + "\n")
            self._bar.describe(values)
        self.accelerator.log(values, step=self.passes_done)

    def _save(self) -> None:
        state = {
            "passes": self.passes_done,
            "batches": self.batches_done,
            "optimizer": self.optimizer.state_dict(),
            "adversary": self.adversary.state_dict(),
            "objective": self.objective.state_dict(),
        }
        if self.target is not None:
            state["target"] = self._weights(self.target.module)
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        weights, ema = self._weights(self.network), self._weights(self.ema.module)
        save_checkpoint(self.out / "checkpoints", self.passes_done, weights, ema, state)

    def _restore(self, checkpoint: Path) -> None:
        weights, ema, state = load_checkpoint(checkpoint)
        self._load_weights(self.network, weights)
        self._load_weights(self.ema.module, ema)
        self.optimizer.load_state_dict(state["optimizer"])
        self.adversary.load_state_dict(state["adversary"], self.accelerator.device, self.objective.batch_type)
        self.objective.load_state_dict(state["objective"])
        if self.target is not None:
            self._load_weights(self.target.module, state["target"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.passes_done, self.batches_done = state["passes"], state["batches"]
        metrics = self.out / "metrics.jsonl"
        if metrics.is_file() and self.accelerator.is_main_process:
            lines = metrics.read_text().splitlines()
            kept = [line for line in lines if _pass_of(line) <= self.passes_done]
            write_text(metrics, "".join(f"{line}\n" for line in kept))

    def _sample(self) -> None:
        """Write a grid of pictures of the average."""
        folder = self.out / "samples"
        path = folder / f"pass-{self.passes_done:09d}.png"
        if path.exists():
            return
        folder.mkdir(exist_ok=True)
        self._draw_samples(path)

    def _draw_samples(self, path: Path) -> None:
        labels = None
        if self.config.data.class_conditional:
            labels = torch.arange(64) % (self._num_classes() or 1)
        few = isinstance(self.objective, ConsistencyObjective)
        sampler = default_sampler(self.scheduler)
        if sampler == "consistency" and not few:
            sampler = "edm-euler"
        images = generate(
            self.ema.module,
            self.scheduler,
            sampler=sampler,
            steps=4 if few else 20,
            num=64,
            shape=self.image_shape,
            class_labels=labels,
            device=self.accelerator.device,
        )
        save_images(images, path)

    def _finish(self) -> None:
        if self.accelerator.is_main_process:
            self._publish()
            self._sample()
        self.accelerator.end_training()

    def _publish(self) -> None:
        save_pipeline(self.out / self.published, self.ema.module, self.scheduler)

    def _weights(self, network: Any) -> dict[str, Tensor]:  # noqa: ANN401  (any module)
        """Return what a checkpoint holds of a network."""
        weights: dict[str, Tensor] = network.state_dict()
        return weights

    def _load_weights(self, network: Any, weights: dict[str, Tensor]) -> None:  # noqa: ANN401
        network.load_state_dict(weights)


def _pass_of(line: str) -> float:
    """Return the pass of a line of the log; infinity for one that a killed process has not finished."""
    try:
        return float(json.loads(line)["pass"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _check_training(config: TrainConfig) -> None:
    settings = config.training
    for name in ("passes", "batch_size", "accumulate", "log_every", "checkpoint_every"):
        if getattr(settings, name) < 1:
            raise UserError(f"training.{name}={getattr(settings, name)} must be at least 1.")
    if not 0 <= settings.ema_decay < 1:
        raise UserError(f"training.ema_decay={settings.ema_decay} must lie in [0, 1); 0.999 is usual.")
    if settings.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("training.precision='fp16' needs a GPU; use 'bf16' or 'no' on this machine.")
    if settings.tracker is not None:
        _check_tracker(settings.tracker)


def _check_tracker(name: str) -> None:
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    if name not in installed:
        raise UserError(
            f"training.tracker={name!r} is not installed; installed are: {', '.join(installed) or 'none'}; "
            "`pip install 'atdiff[trackers]'` brings tensorboard and wandb."
        )


def _seed(entropy: np.random.SeedSequence) -> None:
    seed = int(entropy.generate_state(1, np.uint64)[0]) >> 1
    # torch.manual_seed formats a stack trace for every device that is not there, at 0.6 ms a call.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def learning_rate_factor(settings: OptimizerConfig, passes: int, total: int) -> float:
    """Return what the learning rate is multiplied by after ``passes`` of ``total`` passes."""
    if passes < settings.warmup_passes:
        return (passes + 1) / (settings.warmup_passes + 1)
    if settings.decay == "constant":
        return 1.0
    progress = min(1.0, (passes - settings.warmup_passes) / max(1, total - settings.warmup_passes))
    return 1.0 - progress if settings.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def batch_indices(seed: int, batch: int, batch_size: int, num_images: int) -> Tensor:
    """Return the images of a batch: consecutive places in a row of epochs, each shuffled by ``(seed, epoch)``."""
    start = batch * batch_size
    first, last = start // num_images, (start + batch_size - 1) // num_images
    shuffled = torch.cat([_epoch_order(seed, epoch, num_images) for epoch in range(first, last + 1)])
    return shuffled.narrow(0, start - first * num_images, batch_size)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(num_images, generator=generator)
