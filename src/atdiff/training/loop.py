"""The training loop: data, passes, optimizer, average, checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch import Tensor
from torch.nn.utils import get_total_norm

from atdiff.adversary.scale import default_scale
from atdiff.core.errors import RunError, Stopped, UserError
from atdiff.core.noise import NoiseSchedule, flow_shift
from atdiff.data.labels import class_line
from atdiff.data.sources import ImageData, load_data
from atdiff.models.call import image_tokens
from atdiff.models.classes import remember_classes
from atdiff.models.ema import EMA
from atdiff.models.presets import build_model
from atdiff.objectives.consistency import ConsistencyObjective
from atdiff.objectives.denoising import DenoisingObjective
from atdiff.pipelines.model import data_options, save_pipeline
from atdiff.pipelines.record import classes_of, stored_data
from atdiff.sampling.generate import generate, save_images
from atdiff.sampling.schedulers import default_sampler
from atdiff.system.files import write_json
from atdiff.system.locks import one_writer
from atdiff.system.processes import from_main, uses_cpu
from atdiff.training.build import build_adversary, build_objective, build_scheduler, build_teacher
from atdiff.training.card import has_card, write_card
from atdiff.training.checkpoint import latest_checkpoint, load_checkpoint, passes_of, save_checkpoint
from atdiff.training.checks import check_config, check_machine
from atdiff.training.config import LATENT_MODELS, OptimizerConfig, TrainConfig
from atdiff.training.finite import FiniteSteps
from atdiff.training.folder import as_begun, open_run
from atdiff.training.interrupt import StopRequest
from atdiff.training.log import MetricsLog
from atdiff.training.progress import TrainingBar, training_progress
from atdiff.training.start import Start, check_agreement, check_weights, load_start, load_teacher, settled

__all__ = ["Trainer", "make_trainer", "train"]

UPDATES_BETWEEN_AGREEMENTS = 10  # of many processes on whether to stop


def make_trainer(config: TrainConfig) -> Trainer:
    """Return the trainer of a run: of pixels, or of a pipeline's latents.

    Raises:
        UserError: for settings, data or weights that do not fit.
    """
    if config.model.name not in LATENT_MODELS:
        return Trainer(config)
    from atdiff.training.latents import LatentTrainer  # transformers takes seconds to import

    return LatentTrainer(config)


@one_writer("folder")
def train(config: TrainConfig, out: Path, *, progress: bool = True, stop: StopRequest | None = None) -> Path:
    """Train, or resume, the run that ``config`` describes in the folder ``out``; return ``out``.

    Writes ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``samples/`` and ``pipeline/``.

    Args:
        config: of the run.
        out: a new folder, or that of an earlier start of the same run.
        progress: show a progress bar.
        stop: when to save and stop before the last pass.

    Raises:
        UserError: before anything is computed or written, for settings, data, weights or a folder that do not fit.
        RunError: the disk failed, or too many steps were not finite; the last good checkpoint is left as it was.
        Stopped: ``stop`` asked for it.
    """
    trainer = make_trainer(as_begun(config, out))
    trainer.open(out)
    trainer.run(progress=progress, stop=stop)
    return out


class Trainer:
    """All that one run holds. Building it checks the settings and writes nothing."""

    published = "pipeline"  # the folder that a finished run leaves
    _beside_pixels = "labels"  # what else its data are made of
    sharding: Any  # splits the weights over processes, where asked to

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        check_config(config)
        check_machine(config)
        self.adversary = build_adversary(config)
        torch.manual_seed(config.training.seed)
        self._prepare()
        self.config = _scaled(self.config, NoiseSchedule(self.scheduler).kind)
        self.passes_done = 0
        self._saved_at = -1  # passes behind at the newest checkpoint
        self._finite = FiniteSteps()
        self._bar = TrainingBar(None, None)

    def _prepare(self) -> None:
        """Build scheduler, data, network and objective, what may be wrong with the settings first."""
        config = self.config
        start = load_start(config)
        teacher = load_teacher(config, start)
        # What the settings leave out is that of the start, and written down as such.
        self.config = config = settled(config, start or teacher)
        self.scheduler: Any = self._agreed_scheduler(config, start, teacher)
        self.data: Any = load_data(config.data.name, **data_options(asdict(config)))
        num_classes = self._num_classes()
        if num_classes is not None:
            self._warn_of_empty_classes(num_classes)
        self.objective: DenoisingObjective | ConsistencyObjective = build_objective(
            config, self.scheduler, num_classes, build_teacher(config, teacher)
        )
        self.network: Any = self._network_of(config)
        sampler: Any = getattr(self.objective, "timestep_sampler", None)
        if hasattr(sampler, "shift"):  # which may depend on the size of the images
            sampler.shift = flow_shift(self.scheduler, image_tokens(self.network, self.image_shape))
        if start is not None:
            self.network.load_state_dict(check_weights(self.network, start.network.state_dict(), start.name))

    @staticmethod
    def _agreed_scheduler(config: TrainConfig, start: Start | None, teacher: Start | None) -> Any:  # noqa: ANN401
        """Return the scheduler of a run, which agrees with what it starts and learns from."""
        scheduler = build_scheduler(config, start or teacher)
        build_objective(config, scheduler)
        if start is not None:
            check_agreement(scheduler, config.objective.prediction_type, start)
        if teacher is not None and teacher is not start:
            remedy = None if start is None else f"give a teacher that agrees with {start.name}"
            check_agreement(scheduler, config.objective.prediction_type, teacher, remedy)
        return scheduler

    def _network_of(self, config: TrainConfig) -> Any:  # noqa: ANN401  (any diffusers model)
        """Return the untrained network of these settings, for the classes of this run's data."""
        num_classes = self._num_classes(config)
        dropout = config.objective.label_dropout > 0
        return build_model(
            config.model.name,
            config.model.args,
            image_shape=self.image_shape,
            learned_variance=config.objective.variance == "learned_range",
            num_class_embeds=None if num_classes is None else num_classes + int(dropout),
        )

    def check_arm(self, config: TrainConfig, *, from_here: bool = True) -> Any:  # noqa: ANN401
        """Find what is wrong with the settings of an arm; return its diffusers scheduler.

        Args:
            config: of the arm.
            from_here: whether it starts from this run; else from what its own ``training.init`` names.

        Raises:
            UserError: something is.
        """
        start = Start("the base run", self.scheduler, self.network) if from_here else load_start(config)
        teacher = load_teacher(config, start)
        scheduler = self._agreed_scheduler(config, start, teacher)
        build_adversary(config)
        alike = all(getattr(config.data, name) == getattr(self.config.data, name) for name in ("name", "image_size"))
        if start is not None and alike:
            with torch.random.fork_rng(devices=[]), init_empty_weights():
                network = self._network_of(config)
            check_weights(network, start.network.state_dict(), start.name)
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

    def _num_classes(self, config: TrainConfig | None = None) -> int | None:
        if not (config or self.config).data.class_conditional:
            return None
        if self.data.labels is None:
            raise UserError(
                f"data.class_conditional is set, but {self.config.data.name!r} has no labels; put each class into "
                "its own subfolder or unset it."
            )
        return int(self.data.labels.max()) + 1

    def _warn_of_empty_classes(self, count: int) -> None:
        """Say which classes have no image: the network is told of them, and learns nothing."""
        empty = (torch.bincount(self.data.labels, minlength=count) == 0).nonzero().flatten().tolist()
        if empty:
            names = [str(label) if self.classes is None else repr(self.classes[label]) for label in empty[:5]]
            warnings.warn(
                f"{len(empty)} of the {count} classes of {self.data.name} have no image ({', '.join(names)}"
                f"{', ...' if len(empty) > 5 else ''}): their samples will be meaningless.",
                stacklevel=3,
            )

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes of the data, in the order of their labels; None where they have none."""
        classes: tuple[str, ...] | None = self.data.classes
        return classes

    def _count(self, classes: tuple[str, ...]) -> None:
        """Count the classes in another order."""
        self.data = self.data.with_classes(classes)

    def open(self, out: Path) -> None:
        """Take the folder ``out``, put everything on its device, and resume from its newest checkpoint."""
        settings = self.config.training
        self.out, self._log_file = out, MetricsLog(out / "metrics.jsonl")
        self.accelerator = Accelerator(
            mixed_precision=settings.precision,
            # Each said in full: what is left out, Accelerate takes from the environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.accumulate),
            dynamo_backend="no",
            cpu=uses_cpu(),
            log_with=settings.tracker,
            project_dir=str(out),
        )
        self._take_folder(look_only=True)
        self._count_as_begun()
        if not (out / self.published).is_dir():
            self._read_data()  # What is wrong with it is found before anything is written.
        checkpoint = self._take_folder()
        self.finished = (
            checkpoint is not None and passes_of(checkpoint) >= settings.passes and (out / self.published).is_dir()
        )
        if self.finished:
            return
        self._read_data()
        self._store_data()
        device = self.accelerator.device
        self.network.to(device)
        self.ema = EMA(self.network, settings.ema_decay, warmup=settings.ema_warmup)
        self.sharding = None
        self._place_objective(device)
        if settings.shard:
            self._shard(device)
        optimizer = self.config.optimizer
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(
                [parameter for parameter in self.network.parameters() if parameter.requires_grad],
                lr=optimizer.lr,
                betas=optimizer.betas,
                weight_decay=optimizer.weight_decay,
                fused=True,  # skips steps on the device: see FiniteSteps
            )
        )
        model: Any = torch.compile(self.network) if settings.compile else self.network
        # Split weights exchange their gradients themselves.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=settings.shard)
        if settings.tracker:
            self.accelerator.init_trackers("atdiff")
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.accelerator.is_main_process:
            self._log_file.cut(self.passes_done)  # What came after the checkpoint, or before the first, is done again.

    def _read_data(self) -> None:
        """Read what is too large to read before the folder is known to be good; nothing of images."""

    def _count_as_begun(self) -> None:
        """Count the classes as the run did when it was begun: earlier versions took numbers for text."""
        before = classes_of(stored_data(self.out), self.classes)
        if before is not None and self.classes is not None and sorted(before) == sorted(self.classes):
            self._count(before)

    def _store_data(self) -> None:
        """Write which data these are, or find in all processes that the run had other ones."""
        found: UserError | None = None
        if self.accelerator.is_main_process:
            try:
                self._check_stored_data()
            except UserError as error:
                found = error
        found = from_main(found)
        if found is not None:
            raise found

    def _check_stored_data(self) -> None:
        stored, classes = stored_data(self.out), self.classes
        found = {
            "name": self.data.name,
            "images": len(self.data),
            "skipped": [list(one) for one in self.data.skipped],
            "fingerprint": self.data.fingerprint(),
            "classes": None if classes is None else {name: label for label, name in enumerate(classes)},
        }
        remedy = "put the data back as they were, or choose another --out."
        if stored and (stored["images"], len(stored["skipped"])) != (found["images"], len(self.data.skipped)):
            raise UserError(
                f"{self.out} was trained on {stored['images']} images of {stored['name']}, and now there are "
                f"{found['images']}: {remedy}"
            )
        if stored.get("classes", found["classes"]) != found["classes"]:
            before = ", ".join(stored["classes"] or ["none"])
            raise UserError(
                f"{self.out} was trained on the classes {before} of {stored['name']}, and now they are "
                f"{', '.join(classes or ['none'])}: {remedy}"
            )
        if stored.get("fingerprint", found["fingerprint"]) != found["fingerprint"]:
            raise UserError(
                f"{self.out} was trained on {stored['images']} images of {stored['name']}, and now as many have other "
                f"pixels, {self._beside_pixels} or another order: {remedy}"
            )
        if stored != found:
            write_json(self.out / "data.json", {**stored, **found})

    def _take_folder(self, *, look_only: bool = False) -> Path | None:
        """Open the folder in one process, and return in all of them the checkpoint to go on from, or raise in all."""
        found: Path | UserError | None = None
        if self.accelerator.is_main_process:
            try:
                resumed = open_run(self.out, self.config, look_only=look_only)
                if resumed and not look_only:
                    found = self._newest_between_batches()
            except UserError as error:
                found = error
        found = from_main(found)
        if isinstance(found, UserError):
            raise found
        return found

    def _newest_between_batches(self) -> Path | None:
        """Return the newest checkpoint to resume from, or that of the last pass.

        A shorter run, and one of an earlier version, may have ended within the passes of a batch.
        """
        total, cost = self.config.training.passes, self.adversary.num_passes
        folder = self.out / "checkpoints"
        newest = latest_checkpoint(folder, lambda passes: passes >= total or passes % cost == 0)
        if newest is None and (other := latest_checkpoint(folder)) is not None:
            raise UserError(
                f"{other} lies within the {cost} passes of a batch, and no checkpoint between two batches is left to "
                "resume from: remove it to begin again, or name the run as --training.init of another --out."
            )
        return newest

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

    def _shard(self, device: torch.device) -> None:
        """Split the weights, the averages and so the optimizer's state over the processes."""
        from atdiff.training.sharding import Sharding  # takes a second to import

        self.sharding = Sharding(self.network, device)
        self.sharding.split(self.network)
        for average in (self.ema, self.target):
            if average is not None:
                self.sharding.split(average.module)
                average.follow(self.network)

    def _average(self) -> Any:  # noqa: ANN401  (any diffusers model)
        """Return the average, whole; every process takes part."""
        return self.sharding.whole(self.ema.module) if self.sharding else self.ema.module

    def run(self, *, progress: bool = True, stop: StopRequest | None = None) -> None:
        """Train to the last pass and write the pipeline; nothing where that was done before.

        Raises:
            RunError: the disk failed, or too many steps were not finite.
            Stopped: ``stop`` asked for it; everything is saved.
        """
        settings, started_at = self.config.training, self.passes_done
        if self.finished:
            if self.accelerator.is_main_process and not has_card(self.out):  # killed just before it was written
                write_card(self.out)
            return
        stop = stop or StopRequest()
        show = progress and self.accelerator.is_main_process
        if show:
            left_out = f", {len(self.data.skipped):,} unreadable ones left out" if self.data.skipped else ""
            mapped = getattr(self.data, "mapped", None)
            where = f", read from {mapped.folder}" if mapped is not None else ""
            print(f"{len(self.data):,} images of {self.data.name}{left_out}{where}")
            if self.classes is not None:
                print(class_line(self.classes))
        with self._disk_errors():
            with stop, training_progress(settings.passes, started_at, show) as self._bar:
                for updates, _ in enumerate(self.passes(), 1):
                    self._bar.update(self.passes_done)
                    reason = self._reason_to_stop(stop, updates) if self.between_batches else None
                    if reason and self.passes_done < settings.passes:
                        self._stop(reason)
            self._finish()

    def _reason_to_stop(self, stop: StopRequest, updates: int) -> str | None:
        """Return why to stop, the same in every process; now and then where that takes a message."""
        reason = stop.reason
        if self.accelerator.num_processes == 1:
            return reason
        if updates % UPDATES_BETWEEN_AGREEMENTS >= self.adversary.updates_per_batch:
            return None
        asked: Any = self.accelerator.reduce(torch.tensor(float(reason is not None), device=self.accelerator.device))
        return (reason or "another process was asked to stop") if asked.item() else None

    def _stop(self, reason: str) -> NoReturn:
        self._save()
        self.accelerator.end_training()
        raise Stopped(
            f"{reason}: pass {self.passes_done} of {self.config.training.passes} is saved in {self.out}, and the same "
            "command resumes there."
        )

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Say in a sentence what the disk did not do."""
        try:
            yield
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            raise RunError(
                f"training ended at pass {self.passes_done} ({what}); {self._last_good()}: free space, or make the "
                "folder writable, and run the same command again."
            ) from error

    def _last_good(self) -> str:
        return f"the last good checkpoint is {latest_checkpoint(self.out / 'checkpoints') or 'none yet'}"

    def passes(self) -> Iterator[None]:
        """Train to the last pass, with logs, checkpoints and samples on the way; yield after every weight update."""
        self.model.train()
        self.started, self.first_pass = time.perf_counter(), self.passes_done
        # Of the passes since the last checkpoint.
        self._loss_sum, self._loss_count = torch.zeros((), device=self.accelerator.device), 0
        while self.passes_done < self.config.training.passes:
            yield from self._train_batch()

    def _train_batch(self) -> Iterator[None]:
        """Run the passes of one batch; yield after every weight update."""
        cost, before, losses = self._passes_an_update, self.passes_done, self._losses()
        for loss in losses:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss)
                self._note(loss)
                if self.accelerator.sync_gradients:
                    self._skip_unless_finite(self.passes_done + cost)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not self.accelerator.sync_gradients:
                continue
            self.ema.update()
            if self.target is not None:
                self.target.update()
            self.passes_done += cost
            if self.between_batches:
                next(losses, None)  # The batch is done: the adversary takes note of its last pass.
            self._set_progress()
            self._periodic(self.passes_done - cost, before)
            yield
            if self.passes_done >= self.config.training.passes:
                return  # The last batch may have more passes than were left.

    @property
    def batches_done(self) -> int:
        """How many batches have had all their passes."""
        return self.passes_done // self.adversary.num_passes

    @property
    def between_batches(self) -> bool:
        """Whether no batch has had a part of its passes: only then a run is saved, or stopped."""
        return self.passes_done % self.adversary.num_passes == 0

    @property
    def _passes_an_update(self) -> int:
        return self.adversary.num_passes // self.adversary.updates_per_batch

    def _losses(self) -> Iterator[Tensor]:
        settings = self.config.training
        self._set_progress()
        # A function of (seed, rank, batch) alone, so that a resumed run draws what an undisturbed one would.
        rank = self.accelerator.process_index
        _seed(np.random.SeedSequence([settings.seed, rank, self.batches_done]))
        x0, conditions = self._load(self.batches_done)
        return self.adversary.passes(self.objective, self.model, x0, accumulate=settings.accumulate, **conditions)

    def _note(self, loss: Tensor) -> None:
        """Keep what is told of a pass, unread: reading would wait for the device."""
        batch, output = self.adversary.batch, self.adversary.output
        assert batch is not None
        assert output is not None
        self._finite.note(output, batch.timesteps)
        self.last_loss = loss.detach()
        self._loss_sum += self.last_loss
        self._loss_count += 1

    def _skip_unless_finite(self, passes: int) -> None:
        """Clip the gradient, and have the optimizer skip its step if it is not finite."""
        clip = self.config.optimizer.grad_clip
        norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), clip) if clip else None
        if self.accelerator.scaler is not None:  # which skips steps itself
            self._finite.judge(passes, None)
            return
        if norm is None:
            norm = get_total_norm([weight.grad for weight in self.model.parameters() if weight.grad is not None])
        if self.sharding and hasattr(norm, "full_tensor"):  # of the part that each process has
            norm = norm.full_tensor()
        self.optimizer.optimizer.found_inf = self._finite.judge(passes, norm)

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

    def _periodic(self, before: int, batch: int) -> None:
        """Log, save and draw what is due since so many passes; a save waits for the end of the batch."""
        settings, now = self.config.training, self.passes_done

        def due(every: int, before: int) -> bool:
            return every > 0 and (now // every > before // every or now >= settings.passes)

        if due(settings.log_every, before):
            self._log()
        # The last batch may be cut short, and a longer run resumes before it.
        cut = self.adversary.updates_per_batch > 1 and now + self.adversary.num_passes > settings.passes
        if now >= settings.passes or (self.between_batches and (cut or due(settings.checkpoint_every, batch))):
            self._save()
        if due(settings.sample_every, before):
            self._sample()

    def _log(self) -> None:
        self._check_finite()
        output = self.adversary.output
        assert output is not None
        seconds = time.perf_counter() - self.started
        seen = self.batches_done * self.config.training.batch_size * self.accelerator.num_processes
        measured = {
            "loss": self.last_loss.item(),
            **{name: term.detach().mean().item() for name, term in output.terms.items()},
            "delta_norm": self.adversary.mean_norm().item(),
        }
        values = {
            "pass": self.passes_done,
            "epoch": round(seen / len(self.data), 4),
            **{name: value if math.isfinite(value) else None for name, value in measured.items()},
            "nonfinite_deltas": int(self.adversary.nonfinite),
            "skipped_steps": self._finite.skipped,
            "lr": self.optimizer.param_groups[0]["lr"],
            "ema_decay": self.ema.last,
            "passes_per_second": round((self.passes_done - self.first_pass) / max(seconds, 1e-9), 2),
        }
        if self.accelerator.is_main_process:
            self._log_file.append(values)
            self._bar.describe(values)
        known = {name: value for name, value in values.items() if value is not None}
        self.accelerator.log(known, step=self.passes_done)

    def _check_finite(self) -> None:
        """Count the steps that were skipped; end the run where they are too many, or all that was left of it."""
        nothing_else, limit = self._finite.collect(), self.config.training.max_skipped
        if self._finite.skipped > limit or (nothing_else and self.passes_done >= self.config.training.passes):
            raise RunError(
                f"{self._finite.newest}; {self._finite.skipped} steps were skipped for it, and training.max_skipped is "
                f"{limit}: lower optimizer.lr or the adversary's step_size; {self._last_good()}."
            )

    def _save(self) -> None:
        """Write a checkpoint, of the main process's weights and the state of every process."""
        if self._saved_at == self.passes_done:
            return
        self._check_finite()
        # What differs from process to process. The gathering goes through pickle, between these processes alone.
        mine = {
            "adversary": self.adversary.state_dict(),
            "objective": self.objective.state_dict(),
            "rng": self._random_states(),
        }
        state = {**self._state(), "ranks": gather_object([mine])}
        weights, ema = self._weights(self.network), self._weights(self.ema.module)
        if self.accelerator.is_main_process:
            self._write_checkpoint(weights, ema, state)
        self._saved_at = self.passes_done
        self._loss_sum.zero_()
        self._loss_count = 0

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside weights and what differs between processes; all of them take part."""
        state = {
            "passes": self.passes_done,
            "batches": self.batches_done,
            "optimizer": (
                self.sharding.optimizer(self.network, self.optimizer.optimizer)
                if self.sharding
                else self.optimizer.state_dict()
            ),
            "finite": self._finite.state_dict(),
        }
        if self.target is not None:
            state["target"] = self._weights(self.target.module)
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return state

    def _write_checkpoint(self, weights: dict[str, Tensor], ema: dict[str, Tensor], state: dict[str, Any]) -> None:
        # Not finite where a single loss was not: such passes are never the best.
        loss = self._loss_sum.item() / max(self._loss_count, 1)
        keep = self.config.training.keep_checkpoints
        save_checkpoint(self.out / "checkpoints", self.passes_done, weights, ema, state, loss=loss, keep=keep)

    def _random_states(self) -> list[Tensor]:
        device = self.accelerator.device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def _restore(self, checkpoint: Path) -> None:
        weights, ema, state = load_checkpoint(checkpoint)
        processes = len(state["ranks"])
        if processes != self.accelerator.num_processes:
            raise UserError(
                f"{self.out} was trained by {processes} process(es), and now there are "
                f"{self.accelerator.num_processes}: resume it with as many, or choose another --out."
            )
        mine = state["ranks"][self.accelerator.process_index]
        self._load_weights(self.network, weights)
        self._load_weights(self.ema.module, ema)
        if self.sharding:
            self.sharding.load_optimizer(self.network, self.optimizer.optimizer, state["optimizer"])
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.adversary.load_state_dict(mine["adversary"], self.accelerator.device)
        self.objective.load_state_dict(mine["objective"])
        self._finite.load_state_dict(state["finite"])
        if self.target is not None:
            self._load_weights(self.target.module, state["target"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for set_state, value in zip((torch.set_rng_state, torch.cuda.set_rng_state), mine["rng"], strict=False):
            set_state(value)
        self.passes_done = state["passes"]
        self._saved_at = self.passes_done
        self.ema.updates = self.passes_done // self._passes_an_update

    def _sample(self) -> None:
        """Write a grid of pictures of the average; every process takes part."""
        path = self.out / "samples" / f"pass-{self.passes_done:09d}.png"
        if from_main(path.exists()):
            return
        device = self.accelerator.device
        # Training goes on as if nothing had been drawn.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            images = self._draw_samples()
        if self.accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            save_images(images, path)

    def _draw_samples(self) -> Tensor:
        labels = None
        if self.config.data.class_conditional:
            labels = torch.arange(64) % (self._num_classes() or 1)
        few = isinstance(self.objective, ConsistencyObjective)
        sampler = default_sampler(self.scheduler)
        if sampler == "consistency" and not few:
            sampler = "edm-euler"
        return generate(
            self._average(),
            self.scheduler,
            sampler=sampler,
            steps=4 if few else 20,
            num=64,
            shape=self.image_shape,
            class_labels=labels,
            device=self.accelerator.device,
        )

    def _finish(self) -> None:
        average = self._average()
        if self.accelerator.is_main_process:
            self._publish(average)
            write_card(self.out)
        self._sample()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _publish(self, average: Any) -> None:  # noqa: ANN401  (any diffusers model)
        classes = self._num_classes()
        if classes is not None:
            null = classes if self.config.objective.label_dropout > 0 else None
            remember_classes(average, None if self.classes is None else self.classes[:classes], null)
        save_pipeline(self.out / self.published, average, self.scheduler)

    def _weights(self, network: Any) -> dict[str, Tensor]:  # noqa: ANN401  (any module)
        """Return what a checkpoint holds of a network."""
        if self.sharding:
            return self.sharding.weights(network)
        weights: dict[str, Tensor] = network.state_dict()
        return weights

    def _load_weights(self, network: Any, weights: dict[str, Tensor]) -> None:  # noqa: ANN401
        if self.sharding:
            self.sharding.load_weights(network, weights)
        else:
            network.load_state_dict(weights)


def _scaled(config: TrainConfig, kind: str) -> TrainConfig:
    """Return the settings with the scale that is in effect; it has none where nothing is perturbed."""
    adversary = config.adversary
    if adversary.scale is not None:
        return config
    perturbs = adversary.passes > 1 and adversary.step_size > 0
    scale: Any = default_scale(kind) if perturbs else "constant"
    return replace(config, adversary=replace(adversary, scale=scale))


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
