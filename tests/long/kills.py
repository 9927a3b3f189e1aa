"""Kills a short run again and again and counts losses: ``python tests/long/kills.py --kills 100``.

Each child runs the same command on the same folder. SIGKILL is sent at random moments (``--kills``), and before each
file operation in turn of opening the folder, of the fourth save and of the end. A loss is a run that does not resume
from the newest complete checkpoint, that resumes from before an earlier start, or that ends with other weights, EMA,
optimizer state or log than an uninterrupted run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch
from rich.progress import track

from atdiff.training import checkpoint as saving
from atdiff.training import state as training_state
from atdiff.training.checkpoint import checkpoint_problem, latest_checkpoint, load_checkpoint, passes_of
from atdiff.training.config import AdversaryConfig, ModelConfig, TrainConfig, TrainingConfig
from atdiff.training.loop import Trainer
from atdiff.training.tasks.pixels import PixelTask

CHECKPOINT_EVERY = 2
BATCH = 3  # passes; a checkpoint that is due within a batch is written at its end
SAVE = 4  # the save to interrupt; it also removes an older checkpoint
# Functions to interrupt: where each is looked up, and the number of the call.
STAGES: dict[str, tuple[Any, int]] = {
    "open": (Trainer, 1),
    "save_checkpoint": (training_state, SAVE),
    "publish": (PixelTask, 1),
}
AUDITED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime", "os.chmod", "shutil.rmtree"}


@dataclass
class Counts:
    """Counts of kills, resumes and losses.

    Attributes:
        kills: killed processes.
        resumes: processes that resumed from a checkpoint.
        losses: descriptions of what was lost.
    """

    kills: int = 0
    resumes: int = 0
    losses: tuple[str, ...] = ()


def settings(passes: int) -> TrainConfig:
    """Return a run that saves after each batch of three passes."""
    return TrainConfig(
        model=ModelConfig("mlp", {"width": 16, "num_blocks": 1}),
        adversary=AdversaryConfig(step_size=0.5, passes=BATCH),
        training=TrainingConfig(
            passes=passes, batch_size=16, ema_decay=0.9, log_every=1, checkpoint_every=CHECKPOINT_EVERY
        ),
    )


def child(folder: Path, passes: int, prepare: Callable[[], None] | None = None) -> int:
    """Start a run in a child process and return its pid. The child writes the pass it starts from to ``start.txt``."""
    number = os.fork()
    if number:
        return number
    try:
        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        trainer = Trainer(settings(passes))
        trainer.open(folder / "run")
        (folder / "start.txt").write_text(str(passes if trainer.finished else trainer.state.passes))
        trainer.run(progress=False)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def result(folder: Path) -> Any:
    """Return the newest checkpoint and the log of a run."""
    newest = latest_checkpoint(folder / "run" / "checkpoints")
    assert newest is not None
    log = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return load_checkpoint(newest), [line.partition('"passes_per_second"')[0] for line in log]


def difference(one: Any, other: Any, where: str = "") -> str:
    """Return where two nested results first differ, or an empty string."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = [(index, *pair) for index, pair in enumerate(zip(one, other, strict=True))]
    else:
        equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)
        return "" if equal else f"{where}: {one} and not {other}"
    return next(filter(None, (difference(mine, theirs, f"{where}/{key}") for key, mine, theirs in pairs)), "")


class Killer:
    """Kills runs and compares them with an uninterrupted run.

    Args:
        root: an empty folder to work in.
        passes: number of passes of each run.
    """

    def __init__(self, root: Path, passes: int) -> None:
        self.root, self.passes, self.counts = root, passes, Counts()
        self._folders = 0
        whole = self._folder()
        started = time.perf_counter()
        assert self._wait(child(whole, passes)) == 0, "the undisturbed run failed"
        self.seconds = time.perf_counter() - started
        self.expected = result(whole)

    def _folder(self) -> Path:
        self._folders += 1
        folder = self.root / str(self._folders)
        folder.mkdir()
        return folder

    @staticmethod
    def _wait(number: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])

    def _lose(self, what: str) -> None:
        self.counts.losses += (what,)

    def _check_start(self, folder: Path, whole: int, before: int) -> None:
        """Check that a process started from the newest complete checkpoint."""
        try:
            start = int((folder / "start.txt").read_text())
        except (OSError, ValueError):  # killed before it was written
            return
        self.counts.resumes += start > 0
        if start != whole:
            self._lose(f"{folder}: went on from pass {start}, and pass {whole} was complete")
        if start < before:
            self._lose(f"{folder}: went on from pass {start} after it had been at {before}")

    def _newest(self, folder: Path) -> int:
        paths = (folder / "run" / "checkpoints").glob("pass-*")
        return max((passes_of(path) for path in paths if checkpoint_problem(path) is None), default=0)

    def _finish(self, folder: Path) -> None:
        """Let the run finish and compare its results."""
        whole = self._newest(folder)
        (folder / "start.txt").unlink(missing_ok=True)
        if self._wait(child(folder, self.passes)) != 0:
            self._lose(f"{folder}: the command failed after a kill")
            return
        self._check_start(folder, whole, whole)
        unlike = difference(result(folder), self.expected)
        if unlike:
            self._lose(f"{folder}: ended unlike the undisturbed run at {unlike}")

    def at_random(self, kills: int, seed: int) -> None:
        """Send SIGKILL at random moments, three per run."""
        moments, folder, before = random.Random(seed), self._folder(), 0
        for kill in track(range(kills), "killing at random moments"):
            whole = self._newest(folder)
            (folder / "start.txt").unlink(missing_ok=True)
            number = child(folder, self.passes)
            time.sleep(moments.uniform(0, self.seconds))
            os.kill(number, signal.SIGKILL)
            self._wait(number)
            self.counts.kills += 1
            self._check_start(folder, whole, before)
            before = whole
            if kill % 3 == 2 or kill == kills - 1:
                self._finish(folder)
                folder, before = self._folder(), 0

    def at_operations(self, stage: str, stride: int) -> int:
        """Kill the process before every ``stride``-th file operation of a stage in turn; return the number of kills."""
        safe = {"open": 0, "save_checkpoint": (SAVE - 1) * BATCH, "publish": self.passes}[stage]
        for kills, number in enumerate(range(1, 1000, stride)):
            folder = self._folder()
            code = self._wait(child(folder, self.passes, partial(_end_before, stage, number)))
            if code == 0:
                return kills
            assert code == -signal.SIGKILL, code
            self.counts.kills += 1
            if self._newest(folder) < safe:
                self._lose(f"{folder}: operation {number} of {stage} destroyed a checkpoint")
            self._finish(folder)
        raise AssertionError(f"{stage} has no end")


def _end_before(stage: str, number: int) -> None:
    """Kill this process before the ``number``-th file operation of a stage."""
    place, call = STAGES[stage]
    state = {"calls": 0, "left": number, "inside": False}

    def operation() -> None:
        if state["inside"] and state["calls"] == call:
            state["left"] -= 1
            if state["left"] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in AUDITED and not (event == "open" and _reads(arguments)):
            operation()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            operation()
            return function(*args, **kwargs)

        return wrapped

    # These write files without an audit event.
    saving.save_file = counted(saving.save_file)
    torch.save = counted(torch.save)
    os.fsync = counted(os.fsync)
    os.replace = counted(os.replace)
    function = getattr(place, stage)

    def within(*args: Any, **kwargs: Any) -> None:
        state["calls"] += 1
        state["inside"] = True
        function(*args, **kwargs)
        operation()
        state["inside"] = False

    setattr(place, stage, within)
    sys.addaudithook(heard)


def _reads(arguments: tuple[Any, ...]) -> bool:
    """Tell whether a file is only read; a kill there equals a kill after the previous operation."""
    flags = arguments[2]
    return not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def main() -> NoReturn:
    """Kill runs, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at random moments; default: %(default)s")
    parser.add_argument("--passes", type=int, default=30, help="of each run; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    parser.add_argument("--stride", type=int, default=1, help="of the file operations; default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(Path(folder), args.passes)
        killer.at_random(args.kills, args.seed)
        operations = {stage: killer.at_operations(stage, args.stride) for stage in STAGES}
    counts = killer.counts
    names = ("of opening the folder", "of a save", "of the end")
    before = ", ".join(f"{count} {name}" for count, name in zip(operations.values(), names, strict=True))
    print(f"an undisturbed run takes {killer.seconds:.1f} s; killed before file operations: {before}")
    print(f"kills {counts.kills}, resumes {counts.resumes}, losses {len(counts.losses)}")
    print(*counts.losses, sep="\n", end="")
    sys.exit(1 if counts.losses else 0)


if __name__ == "__main__":
    main()
