"""A run's output during training: log lines, checkpoints and sample grids."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atdiff.adversary.adversary import Adversary
from atdiff.core.errors import RunError
from atdiff.sampling.generate import save_images
from atdiff.system.files import write_text
from atdiff.system.processes import from_main
from atdiff.training.checkpoint import last_good
from atdiff.training.dosing import DOSE_LOG, dose_line
from atdiff.training.progress import TrainingBar
from atdiff.training.state import TrainingState
from atdiff.training.steps import Steps
from atdiff.training.tasks.base import Task
from atdiff.training.trackers import show_images

__all__ = ["MetricsLog", "Records"]


class Records:
    """Writes logs, checkpoints and samples when they are due after an update; every process must call it.

    Args:
        out: the run folder.
        task: the run's task.
        steps: the run's optimizer steps.
        state: the run's training state.
    """

    def __init__(self, out: Path, task: Task, steps: Steps, state: TrainingState) -> None:
        self.out, self.task, self.steps, self.state = out, task, steps, state
        self.settings, self.accelerator = task.config.training, state.accelerator
        self.log, self.dose_log = MetricsLog(out / "metrics.jsonl"), MetricsLog(out / DOSE_LOG)
        self.bar = TrainingBar(self.settings.passes)

    def start(self) -> None:
        """Start measuring passes per second."""
        self._started, self._first_pass = time.perf_counter(), self.state.passes

    def cut(self, passes: int) -> None:
        """Drop log lines after ``passes``."""
        for log in (self.log, self.dose_log):
            log.cut(passes)

    def write(self, loss: Tensor, before: int, batch: int) -> None:
        """Log, save and sample if due; checkpoints wait for the end of the batch.

        Args:
            loss: loss of the last pass.
            before: passes completed before the update.
            batch: passes completed before its batch.
        """
        settings, now, charge = self.settings, self.state.passes, self.state.charge

        def due(every: int, before: int) -> bool:
            return every > 0 and (now // every > before // every or now >= settings.passes)

        if due(settings.log_every, before):
            self._write_line(loss)
        elif before == self._first_pass and self.accelerator.is_main_process:
            self.bar.begin(now, loss.item())
        # The last batch may be cut short; an extended run then resumes from before it.
        cut = charge.updates > 1 and now + charge.batch > settings.passes
        between = self.state.between_batches
        if now >= settings.passes or (between and (cut or due(settings.checkpoint_every, batch))):
            self.save()
        if due(settings.sample_every, before):
            self.sample()

    def _write_line(self, loss: Tensor) -> None:
        self._check_finite()
        seen = self.state.batches * self.state.joint_batch
        seconds = time.perf_counter() - self._started
        values = {
            "pass": self.state.passes,
            "epoch": round(seen / self.task.epoch_size, 4),
            **_line_of(loss, self.state.adversary),
            "skipped_steps": self.steps.finite.skipped,
            "lr": self.steps.rate,
            "ema_decay": self.state.weights.ema.last,
            "passes_per_second": round((self.state.passes - self._first_pass) / max(seconds, 1e-9), 2),
        }
        if self.accelerator.is_main_process:
            self.log.append(values)
            dose = dose_line(self.state.adversary, self.state.passes)
            if dose is not None:
                self.dose_log.append(dose)
            self.bar.describe(values)
        known = {name: value for name, value in values.items() if value is not None}
        self.accelerator.log(known, step=self.state.passes)

    def save(self) -> None:
        """Write a checkpoint unless this pass already has one."""
        if self.state.saved_at != self.state.passes:
            self._check_finite()
            self.state.save(self.out / "checkpoints", self.settings.keep_checkpoints)

    def _check_finite(self) -> None:
        """Count skipped steps; raise if too many, or if the run ends with none taken since the last count."""
        finite, limit = self.steps.finite, self.settings.max_skipped
        nothing_else = finite.collect()
        if finite.skipped > limit or (nothing_else and self.state.passes >= self.settings.passes):
            too_many = (
                f"more than training.max_skipped={limit}" if finite.skipped > limit else "all at the end of the run"
            )
            raise RunError(
                f"{finite.newest}; {finite.skipped} steps were skipped, {too_many}: "
                f"lower optimizer.lr or the adversary's step_size; {last_good(self.out / 'checkpoints')}."
            )

    def sample(self, average: Any = None) -> None:  # noqa: ANN401  (any diffusers model)
        """Write a sample grid from the EMA weights unless this pass already has one; None gathers the weights first.

        Validation grids are written first, so that a run killed in between generates all of them again.
        """
        name = f"pass-{self.state.passes:09d}"
        if from_main((self.out / "samples" / f"{name}.png").exists()):
            return
        device = self.accelerator.device
        # Sampling must not change the random numbers of training.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            average = self.state.weights.published() if average is None else average
            for steps, images in self.task.validation(self.out, average, device):
                self._show(f"validation/{steps}-steps", images, f"{name}-{steps}-steps.png")
            self._show("samples", self.task.samples(self.out, average, device), f"{name}.png")

    def _show(self, what: str, images: Tensor, file: str) -> None:
        """Write a grid and log it to the trackers, in the main process only."""
        if not self.accelerator.is_main_process:
            return
        path = self.out / "samples" / file
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # left by a run killed before its last grid
        save_images(images, path)
        show_images(self.accelerator, what, path, self.state.passes)


class MetricsLog:
    """A JSON Lines file whose objects each have a ``pass``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, values: dict[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")

    def cut(self, passes: int) -> None:
        """Drop lines after ``passes``, and a partial line left by a killed process."""
        if not self.path.is_file():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if _pass_of(line) <= passes]
        write_text(self.path, "".join(f"{line}\n" for line in kept))


def _line_of(loss: Tensor, adversary: Adversary) -> dict[str, float | int | None]:
    """Return the log values of the last pass: loss, terms and perturbation norm; None for non-finite values."""
    output = adversary.output
    assert output is not None
    measured = {
        "loss": loss.item(),
        **{name: term.detach().mean().item() for name, term in output.terms.items()},
        "delta_norm": adversary.mean_norm().item(),
    }
    known = {name: value if math.isfinite(value) else None for name, value in measured.items()}
    return {**known, "nonfinite_deltas": int(adversary.nonfinite)}


def _pass_of(line: str) -> float:
    try:
        return float(json.loads(line)["pass"])
    except (ValueError, KeyError, TypeError):
        return math.inf
