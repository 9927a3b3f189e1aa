"""Progress bar of a study, with an estimate of the time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from atdiff.study.stage import Stage
from atdiff.system.progress import Bars, in_words, print_line, shows_bars
from atdiff.training.folder import last_logged

__all__ = ["Seconds", "StudyProgress"]

SECONDS_BETWEEN_LINES = 60.0
# A forward-backward pass costs about three forwards; used until the first cells are timed.
FORWARDS_PER_PASS = 3


class Seconds(NamedTuple):
    """Seconds that a run of a study took, and its mismatch if that was measured right away."""

    training: float
    evaluation: float
    mismatch: float | None = None


class _Done(NamedTuple):
    passes: int
    steps: int


class StudyProgress:
    """A progress bar over all runs of a study; without a terminal, a line per finished run and one per minute.

    Passes and sampler steps are timed separately, since a study may spend most of its time on either. The mismatch is
    measured run by run after all runs are done, except for the first run, whose time predicts the others'. Until then,
    each mismatch counts as the sampler steps of its network evaluations, without the comparisons.

    Args:
        stages: all runs.
        workers: number of parallel processes.
        console: where to show progress.
        mismatch_steps: cost of one run's mismatch, in sampler steps at a cell's sample count; None if not measured.
    """

    def __init__(
        self, stages: Sequence[Stage], workers: int, console: Console, *, mismatch_steps: float | None = None
    ) -> None:
        self.stages, self.workers, self.console = stages, workers, console
        judged = sum(stage.evaluation is not None for stage in stages)
        self.mismatch_steps, self.mismatches = mismatch_steps or 0.0, 0 if mismatch_steps is None else judged
        self.mismatch_seconds: float | None = None  # per run, once timed
        self.lines = not shows_bars(console)
        self.before = {id(stage): self._look(stage) for stage in stages}
        self.now, self.seconds = dict(self.before), {id(stage): (0.0, 0.0) for stage in stages}
        self.passes, self.finished = sum(stage.config.training.passes for stage in stages), 0
        self.started = self.told = time.monotonic()
        self.trained: dict[int, float] = {}  # when each run was first seen fully trained
        self.bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=self.lines,
        )
        self.task = self.bar.add_task("studying", total=1.0, figures="", left="")

    def begin(self) -> None:
        """Print how much there is to do."""
        judged = [stage.evaluation for stage in self.stages if stage.evaluation is not None]
        cells = sum(len(one.planned) for one in judged)
        samples = f"{cells:,} cells of {judged[0].num:,} samples"
        further = f"; the mismatch of {self.mismatches} runs" if self.mismatches else ""
        self._print(f"{len(self.stages)} runs, {self.passes:,} passes and {samples}, {self.workers} at once{further}")

    @staticmethod
    def _look(stage: Stage) -> _Done:
        passes = stage.passes_done()
        return _Done(passes, stage.steps_done() if passes >= stage.config.training.passes else 0)

    def update(self) -> None:
        """Update the bar from the runs' logs; without a terminal, print a line once a minute."""
        for stage in self.stages:
            if self.now[id(stage)] != (stage.config.training.passes, stage.steps):
                self.now[id(stage)] = self._look(stage)
            if self.now[id(stage)].passes >= stage.config.training.passes and id(stage) not in self.trained:
                # Approximate: a run that was already trained waits for a free worker.
                self.trained[id(stage)] = time.monotonic()
        left, elapsed = self.left(), time.monotonic() - self.started
        told = f"{sum(done.passes for done in self.now.values()):,} of {self.passes:,} passes"
        self.bar.update(
            self.task,
            description=f"{self.finished}/{len(self.stages)} runs",
            completed=0.0 if left is None else elapsed / max(elapsed + left, 1e-9),
            figures=told,
            left="" if left is None else f"{in_words(left)} left",
        )
        if self.lines and time.monotonic() - self.told >= SECONDS_BETWEEN_LINES:
            self._print(f"{self.finished} of {len(self.stages)} runs, {told}{self._left_words()}")

    def finish(self, stage: Stage, seconds: Seconds) -> None:
        """Record a finished run."""
        self.finished += 1
        self.seconds[id(stage)] = seconds.training, seconds.evaluation
        if seconds.mismatch is not None:
            self.mismatches, self.mismatch_seconds = self.mismatches - 1, seconds.mismatch
        self.now[id(stage)] = self._look(stage)
        passes = stage.config.training.passes - self.before[id(stage)].passes
        done = (
            f"{passes:,} passes in {in_words(seconds.training)}"
            if passes > 0
            else f"{stage.config.training.passes:,} passes, already trained"
        )
        last = last_logged(stage.folder).get("loss")
        loss = "" if last is None else f", loss {last:.4f}"
        runs = f"{self.finished} of {len(self.stages)} runs{self._left_words()}"
        if self.lines:
            self._print(f"{stage.arm}, seed {stage.seed}: {done}{loss} ({runs})")

    def left(self) -> float | None:
        """Return the estimated seconds left; None until something has been timed."""
        passes_left = self.passes - sum(done.passes for done in self.now.values())
        steps_left = sum(stage.steps - self.now[id(stage)].steps for stage in self.stages)
        per_pass, per_step = self._seconds_per_pass(), self._seconds_per_step()
        if per_step is None and per_pass is not None:
            per_step = self._guess_per_step(per_pass)
        mismatch = self.mismatch_seconds
        if mismatch is None and per_step is not None:
            mismatch = self.mismatch_steps * per_step
        parts = ((passes_left, per_pass), (steps_left, per_step), (self.mismatches, mismatch))
        if any(count and each is None for count, each in parts):
            return None
        of_passes, of_steps, of_mismatches = (count * (each or 0.0) for count, each in parts)
        runs_left = max(1, min(self.workers, len(self.stages) - self.finished))
        return (of_passes + of_steps) / runs_left + of_mismatches

    def _seconds_per_pass(self) -> float | None:
        """Return the seconds per pass from finished runs, or until there are any from the logs of those in training."""
        measured, begun = self._measured(0)
        if measured is not None:
            return measured
        logged = (last_logged(stage.folder).get("passes_per_second") for stage in begun)
        rates = [rate for rate in logged if rate]
        return len(rates) / sum(rates) if rates else None

    def _seconds_per_step(self) -> float | None:
        """Return the seconds per sampler step from finished runs, or until there are any from finished cells."""
        measured, begun = self._measured(1)
        if measured is not None or not begun:
            return measured
        return sum(time.monotonic() - self.trained[id(stage)] for stage in begun) / self._gained(1, begun)

    def _measured(self, kind: int) -> tuple[float | None, list[Stage]]:
        """Return seconds per pass (``kind`` 0) or sampler step (1) over finished runs, and all runs that made any."""
        ended = [stage for stage in self.stages if self.seconds[id(stage)][kind] > 0]
        made = self._gained(kind, ended)
        seconds = sum(self.seconds[id(stage)][kind] for stage in ended)
        return seconds / made if made else None, [stage for stage in self.stages if self._gained(kind, [stage])]

    def _gained(self, kind: int, stages: Sequence[Stage]) -> int:
        return sum(self.now[id(stage)][kind] - self.before[id(stage)][kind] for stage in stages)

    def _guess_per_step(self, per_pass: float) -> float:
        """Estimate the seconds per sampler step of a whole cell from the cost of a forward in training."""
        num = max(stage.evaluation.num if stage.evaluation else 0 for stage in self.stages)
        return per_pass / FORWARDS_PER_PASS * num / self.stages[0].config.training.batch_size

    def _left_words(self) -> str:
        left = self.left()
        return f", {in_words(left)} left" if left else ""

    def _print(self, line: str) -> None:
        self.told = time.monotonic()
        print_line(self.console, line)
