"""The training loop: data, passes, optimizer, average, checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

from atdiff.adversary import Adversary
from atdiff.data.sources import load_data
from atdiff.errors import UserError
from atdiff.files import write_text
from atdiff.models.presets import build_model
from atdiff.objectives.denoising import DenoisingObjective
from atdiff.runs import load_denoiser, open_run, save_pipeline
from atdiff.sampling.generate import generate, save_images
from atdiff.sampling.schedulers import default_sampler
from atdiff.timesteps import make_timestep_sampler
from atdiff.training.checkpoint import latest_checkpoint, load_checkpoint, passes_of, save_checkpoint
from atdiff.training.config import OptimizerConfig, SchedulerConfig, TrainConfig
from atdiff.training.ema import EMA
from atdiff.training.progress import training_progress

__all__ = ["Trainer", "train"]


def train(config: TrainConfig, out: Path, *, progress: bool = True) -> Path:
    """Train, or resume, the run that ``config`` describes in the folder ``out``; return ``out``.

    Writes ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``samples/`` and ``pipeline/``.

    Raises:
        UserError: before anything is computed or written, for settings, data, weights or a folder that do not fit.
    """
    trainer = Trainer(config)
    trainer.open(out)
    trainer.run(progress=progress)
    return out


class Trainer:
    """All that one run holds. Building it checks the settings and writes nothing."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
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
        self.scheduler = build_scheduler(config)
        self.objective = build_objective(config, self.scheduler, None)
        self.adversary = build_adversary(config)
        self.data = load_data(config.data.name, split=config.data.split, image_size=config.data.image_size)
        num_classes = self._num_classes()
        if num_classes is not None:
            self.objective = build_objective(config, self.scheduler, num_classes)
        torch.manual_seed(settings.seed)
        dropout = config.objective.label_dropout > 0
        self.network = build_model(
            config.model.name,
            config.model.args,
            image_shape=self.image_shape,
            learned_variance=config.objective.variance == "learned_range",
            num_class_embeds=None if num_classes is None else num_classes + int(dropout),
        )
        if settings.init is not None:
            _load_initial_weights(self.network, settings.init)
        self.passes_done = self.batches_done = 0

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
            checkpoint is not None and passes_of(checkpoint) >= settings.passes and (out / "pipeline").is_dir()
        )
        if self.finished:
            return
        device = self.accelerator.device
        self.network.to(device)
        self.ema = EMA(self.network, settings.ema_decay)
        optimizer = self.config.optimizer
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(
                self.network.parameters(),
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

    def run(self, *, progress: bool = True) -> None:
        """Train to the last pass and write the pipeline; nothing where that was done before."""
        settings, started_at = self.config.training, self.passes_done
        if self.finished:
            return
        self.model.train()
        self.started, self.first_pass = time.perf_counter(), started_at
        show = progress and self.accelerator.is_main_process
        with training_progress(settings.passes, started_at, show) as bar:
            while self.passes_done < settings.passes:
                before = self.passes_done
                for _ in self._train_batch():
                    bar.update(self.passes_done)
                self.batches_done += 1
                self._periodic(before, bar)
        self._finish()

    def _train_batch(self) -> Iterator[None]:
        """Run the passes of one batch; yield after every weight update."""
        settings = self.config.training
        rank = self.accelerator.process_index
        # A function of (seed, rank, batch) alone, so that a resumed run draws what an undisturbed one would.
        _seed(np.random.SeedSequence([settings.seed, rank, self.batches_done]))
        x0, conditions = self._load(self.batches_done)
        cost = self.adversary.num_passes // self.adversary.updates_per_batch
        self._set_learning_rate()
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
                self.passes_done += cost
                self._set_learning_rate()
                yield

    def _load(self, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images in [-1, 1] and the conditions of a batch, on the device."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.config.training.batch_size * world
        indices = batch_indices(self.config.training.seed, batch, size, len(self.data.images))[rank::world]
        device = self.accelerator.device
        x0 = self.data.x0(indices).to(device, non_blocking=True)
        if self.config.data.flip:
            mirrored = torch.rand(len(x0), device=device) < 0.5
            x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)
        if not self.config.data.class_conditional:
            return x0, {}
        assert self.data.labels is not None
        return x0, {"class_labels": self.data.labels[indices].to(device)}

    def _set_learning_rate(self) -> None:
        factor = learning_rate_factor(self.config.optimizer, self.passes_done, self.config.training.passes)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor

    def _periodic(self, before: int, bar: Any) -> None:  # noqa: ANN401
        settings, now = self.config.training, self.passes_done

        def due(every: int) -> bool:
            return every > 0 and (now // every > before // every or now >= settings.passes)

        if due(settings.log_every):
            self._log(bar)
        if not self.accelerator.is_main_process:
            return
        if due(settings.checkpoint_every):
            self._save()
        if due(settings.sample_every):
            self._sample()

    def _log(self, bar: Any) -> None:  # noqa: ANN401
        output = self.adversary.output
        assert output is not None
        seconds = time.perf_counter() - self.started
        values = {
            "pass": self.passes_done,
            "epoch": round(self.batches_done * self.config.training.batch_size / len(self.data.images), 4),
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
            bar.describe(values)
        self.accelerator.log(values, step=self.passes_done)

    def _save(self) -> None:
        state = {
            "passes": self.passes_done,
            "batches": self.batches_done,
            "optimizer": self.optimizer.state_dict(),
            "adversary": self.adversary.state_dict(),
            "timestep_sampler": self.objective.timestep_sampler.state_dict(),
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        weights, ema = self.network.state_dict(), self.ema.module.state_dict()
        save_checkpoint(self.out / "checkpoints", self.passes_done, weights, ema, state)

    def _restore(self, checkpoint: Path) -> None:
        weights, ema, state = load_checkpoint(checkpoint)
        self.network.load_state_dict(weights)
        self.ema.module.load_state_dict(ema)
        self.optimizer.load_state_dict(state["optimizer"])
        self.adversary.load_state_dict(state["adversary"], self.accelerator.device)
        self.objective.timestep_sampler.load_state_dict(state["timestep_sampler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.passes_done, self.batches_done = state["passes"], state["batches"]
        metrics = self.out / "metrics.jsonl"
        if metrics.is_file() and self.accelerator.is_main_process:
            lines = metrics.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["pass"] <= self.passes_done]
            write_text(metrics, "".join(f"{line}\n" for line in kept))

    def _sample(self) -> None:
        """Write a grid of pictures of the average, at most 64."""
        folder = self.out / "samples"
        path = folder / f"pass-{self.passes_done:09d}.png"
        if path.exists():
            return
        folder.mkdir(exist_ok=True)
        labels = None
        if self.config.data.class_conditional:
            labels = torch.arange(64) % (self._num_classes() or 1)
        images = generate(
            self.ema.module,
            self.scheduler,
            sampler=default_sampler(self.scheduler),
            steps=20,
            num=64,
            shape=self.image_shape,
            class_labels=labels,
            device=self.accelerator.device,
        )
        save_images(images, path)

    def _finish(self) -> None:
        if self.accelerator.is_main_process:
            save_pipeline(self.out / "pipeline", self.ema.module, self.scheduler)
            self._sample()
        self.accelerator.end_training()


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


def build_scheduler(config: TrainConfig) -> Any:  # noqa: ANN401
    """Build the diffusers scheduler of a run, with the objective's prediction and variance types.

    Raises:
        UserError: diffusers has no such scheduler, or its arguments do not fit.
    """
    settings: SchedulerConfig = config.scheduler
    factory = getattr(diffusers, settings.name, None)
    if factory is None or not settings.name.endswith("Scheduler"):
        raise UserError(f"scheduler.name={settings.name!r} is no scheduler of diffusers; try 'DDPMScheduler'.")
    args = dict(settings.args)
    if config.objective.prediction_type in ("epsilon", "sample", "v_prediction"):
        args["prediction_type"] = config.objective.prediction_type
    if config.objective.variance == "learned_range":
        args["variance_type"] = "learned_range"
    try:
        return factory(**args)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"scheduler {settings.name} cannot be built from {args}: {error}") from None


def build_objective(config: TrainConfig, scheduler: Any, num_classes: int | None) -> DenoisingObjective:  # noqa: ANN401
    """Build the objective of a run; the null label of label dropout comes after the classes."""
    settings = config.objective
    objective = DenoisingObjective(
        scheduler,
        settings.prediction_type,
        variance=settings.variance,
        weighting=settings.weighting,
        snr_gamma=settings.snr_gamma,
        label_dropout=settings.label_dropout if num_classes is not None else 0.0,
        null_label=num_classes,
        input_perturbation=settings.input_perturbation,
    )
    if not (objective.schedule.kind == "edm" and settings.timestep_sampler == "uniform"):
        objective.timestep_sampler = make_timestep_sampler(settings.timestep_sampler, objective.schedule)
    return objective


def build_adversary(config: TrainConfig) -> Adversary:
    """Build the adversary of a run."""
    settings = config.adversary
    return Adversary(
        settings.norm,
        settings.step_size,
        settings.passes,
        radius=settings.radius,
        scale=settings.scale,
        noise_levels=settings.noise_levels,
        method=settings.method,
        direction=settings.direction,
        order=settings.order,
        target=settings.target,
    )


def _load_initial_weights(network: nn.Module, init: str) -> None:
    weights = load_denoiser(init).model.state_dict()
    own = network.state_dict()
    for name in {**own, **weights}:
        if name not in weights or name not in own or own[name].shape != weights[name].shape:
            theirs = tuple(weights[name].shape) if name in weights else "nothing"
            ours = tuple(own[name].shape) if name in own else "nothing"
            raise UserError(
                f"training.init={init!r} does not fit the network: {name} is {theirs} there and {ours} here; give "
                "the model settings that it was trained with."
            )
    network.load_state_dict(weights)


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
    places = torch.arange(batch * batch_size, (batch + 1) * batch_size)
    first, last = int(places[0]) // num_images, int(places[-1]) // num_images
    shuffled = torch.cat([_epoch_order(seed, epoch, num_images) for epoch in range(first, last + 1)])
    return shuffled[places - first * num_images]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(num_images, generator=generator)
