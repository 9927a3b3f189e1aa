"""The training loop: data, passes, optimizer, EMA, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor

from atdiff.core.charge import charge_of
from atdiff.core.errors import Stopped
from atdiff.core.noise import NoiseSchedule
from atdiff.pipelines.record import note
from atdiff.system.locate import published_passes, run_config
from atdiff.system.locks import one_writer
from atdiff.system.processes import from_main, in_main, uses_cpu
from atdiff.training.agreement import agreed_reason, take_folder
from atdiff.training.build import build_adversary, scaled
from atdiff.training.card import has_card, write_card
from atdiff.training.checkpoint import disk_errors, passes_of
from atdiff.training.checks import check_config, check_split, for_machine
from atdiff.training.config import TrainConfig
from atdiff.training.dosing import fit_dose
from atdiff.training.encoded import as_encoded
from atdiff.training.folder import as_begun
from atdiff.training.identity import check_data, count_as_begun, store_data
from atdiff.training.idle import refuse_idle
from atdiff.training.interrupt import StopRequest
from atdiff.training.order import seed_batch
from atdiff.training.progress import TrainingBar, tell_run
from atdiff.training.records import Records
from atdiff.training.state import TrainingState
from atdiff.training.steps import Steps
from atdiff.training.tasks import make_task
from atdiff.training.trackers import start_trackers
from atdiff.training.weights import Weights

__all__ = ["Trainer", "train"]


@one_writer("folder")
def train(config: TrainConfig, out: Path, *, progress: bool = True, stop: StopRequest | None = None) -> Path:
    """Train or resume the run of ``config`` in the folder ``out``; return ``out``.

    Writes ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``samples/`` and ``pipeline/``.

    Args:
        config: settings of the run.
        out: a new folder, or the folder of the same run, which is resumed.
        progress: show a progress bar.
        stop: when to save and stop before the last pass.

    Raises:
        UserError: settings, data, weights or folder do not fit; nothing was computed or written.
        RunError: the disk failed, or too many gradients were not finite; the last good checkpoint is intact.
        Stopped: ``stop`` requested it; everything is saved.
    """
    trainer = Trainer(as_begun(config, out))
    trainer.open(out, progress=progress)
    trainer.run(progress=progress, stop=stop)
    return out


class Trainer:
    """One training run. Constructing it checks the settings and writes nothing.

    Attributes:
        task: network, data and objective; see :class:`atdiff.training.tasks.Task`.
        adversary: perturbs the inputs.
        charge: cost of a batch and of a weight update.
        weights: weights of the network and their averages, after :meth:`open`.
        state: the state saved in a checkpoint, after :meth:`open`.
        records: logs, samples and checkpoints, after :meth:`open`.
    """

    weights: Weights
    state: TrainingState
    records: Records

    def __init__(self, config: TrainConfig) -> None:
        config = as_encoded(config)
        check_config(config)
        refuse_idle(config)
        config = for_machine(config)
        self.adversary = build_adversary(config)
        torch.manual_seed(config.training.seed)
        self.task = make_task(config)
        self.config = self.task.config = scaled(
            self.task.config, NoiseSchedule(self.task.scheduler).traits.default_scale
        )
        self.charge = charge_of(asdict(self.config))

    def open(self, out: Path, *, progress: bool = False) -> None:
        """Open the folder ``out``, move everything to the device, and resume from its newest checkpoint."""
        settings, task = self.config.training, self.task
        self.out = out
        self.accelerator = Accelerator(
            mixed_precision=settings.precision,
            # All set explicitly, since Accelerate reads omitted ones from the environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.accumulate),
            dynamo_backend="no",
            cpu=uses_cpu(),
            log_with=settings.tracker,
            project_dir=str(out),
        )
        take_folder(out, self.config, look_only=True)
        check_split(self.config, out)
        count_as_begun(out, task)
        published = from_main(in_main(lambda: self._is_published(out)))
        data = None
        if not published:
            task.read_data(self.accelerator)  # Errors in the data come before anything is written.
            data = check_data(out, task)
        checkpoint = take_folder(out, self.config)
        self.finished = checkpoint is not None and passes_of(checkpoint) >= settings.passes and bool(published)
        if self.finished:
            return
        if published:
            task.read_data(self.accelerator)
            data = check_data(out, task)
        store_data(out, data)
        task.prepare(out, self.accelerator, progress=progress)
        self._build()
        if checkpoint is not None:
            self.state.restore(checkpoint)
        start_trackers(self.accelerator, self.config, out, resumed=checkpoint is not None)
        if self.accelerator.is_main_process:
            note(out, joint_batch=self.state.joint_batch)
            task.note_in(out)
            # Passes after the checkpoint are trained again, and logged again.
            self.records.cut(self.state.passes)

    def _is_published(self, out: Path) -> bool:
        """Whether the weights after the last pass are published, rather than those from before the run was extended."""
        passes = self.config.training.passes
        begun_with = run_config(str(out)).get("training", {}).get("passes", passes)
        return (out / self.task.published).is_dir() and {published_passes(out) or passes, begun_with} == {passes}

    def _build(self) -> None:
        """Put the networks on the device, and build the optimizer, state and records."""
        settings, task = self.config.training, self.task
        self.weights = weights = Weights(task, self.accelerator.device)
        task.place(self.accelerator, None if weights.target is None else weights.target.module)
        model: Any = torch.compile(weights.network) if settings.compile else weights.network
        # Sharded weights reduce their own gradients, so no DDP.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=settings.shard)
        self.steps = Steps(self.accelerator, weights, self.model, self.config)
        self.state = TrainingState(self.accelerator, weights, self.steps, task.objective, self.adversary, self.charge)
        fit_dose(self.adversary, task, self.accelerator.device)
        self.records = Records(self.out, task, self.steps, self.state)

    def run(self, *, progress: bool = True, stop: StopRequest | None = None) -> None:
        """Train to the last pass and write the pipeline; does nothing on a finished run.

        Raises:
            RunError: the disk failed, or too many gradients were not finite.
            Stopped: ``stop`` requested it; everything is saved.
        """
        if self.finished:
            if self.accelerator.is_main_process and not has_card(self.out):  # killed just before it was written
                write_card(self.out)
            return
        stop = stop or StopRequest()
        show = progress and self.accelerator.is_main_process
        if show:
            tell_run(self.task)
        self.records.bar = bar = TrainingBar(self.config.training.passes, self.state.passes, show=show)
        with disk_errors(self.out, lambda: self.state.passes):
            with stop, bar:
                for updates, _ in enumerate(self.passes(), 1):
                    bar.update(self.state.passes)
                    if self.state.between_batches:
                        reason = agreed_reason(stop, self.accelerator, updates, self.charge.updates)
                        if reason and self.state.passes < self.config.training.passes:
                            self._stop(reason)
            self._finish()

    def _stop(self, reason: str) -> NoReturn:
        self.records.save()
        self.accelerator.end_training()
        raise Stopped(
            f"{reason}: pass {self.state.passes} of {self.config.training.passes} is saved in {self.out}, and the same "
            "command resumes there."
        )

    def passes(self) -> Iterator[None]:
        """Train to the last pass, with logs, checkpoints and samples on the way; yield after every weight update."""
        self.model.train()
        self.steps.start()
        self.records.start()
        while self.state.passes < self.config.training.passes:
            yield from self._train_batch()

    def _train_batch(self) -> Iterator[None]:
        """Run the passes of one batch; yield after every weight update."""
        cost, before, losses = self.charge.update, self.state.passes, self._losses()
        for loss in losses:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss)
                self._note(loss)
                self.steps.take(self.state.passes + cost)
            if not self.accelerator.sync_gradients:
                continue
            with self.steps.evaluated():
                self.weights.average()
            self.state.passes += cost
            if self.state.between_batches:
                next(losses, None)  # The batch is done; lets the adversary record its last pass.
            self._set_progress()
            self.records.write(self._last_loss, self.state.passes - cost, before)
            yield
            if self.state.passes >= self.config.training.passes:
                return  # The last batch may have more passes than remain.

    def _losses(self) -> Iterator[Tensor]:
        settings = self.config.training
        self._set_progress()
        batch = self.state.batches
        seed_batch(settings.seed, self.accelerator.process_index, batch)
        x0, conditions = self.task.load(self._indices(batch), self.accelerator.device)
        return self.adversary.passes(self.task.objective, self.model, x0, accumulate=settings.accumulate, **conditions)

    def _note(self, loss: Tensor) -> None:
        """Keep the loss and the terms of a pass on the device, since reading them would synchronise."""
        batch, output = self.adversary.batch, self.adversary.output
        assert batch is not None
        assert output is not None
        self.steps.finite.note(output, batch.timesteps)
        self._last_loss = loss.detach()
        self.state.note(self._last_loss)

    def _indices(self, batch: int) -> Tensor:
        """Return the sample indices of this rank in a batch."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return self.task.indices(batch, self.state.joint_batch)[rank::world]

    def _set_progress(self) -> None:
        """Set the learning rate and the timestep curriculum for the number of passes completed."""
        passes, total = self.state.passes, self.config.training.passes
        self.task.at(passes / total)
        self.steps.set_rate(passes)

    def _finish(self) -> None:
        average = self.weights.published()
        if self.accelerator.is_main_process:
            self.task.publish(self.out, average)
            write_card(self.out)
            note(self.out, published=self.config.training.passes)
        self.records.sample(average)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
