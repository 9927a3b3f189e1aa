"""Requests to stop training."""

from __future__ import annotations

import re
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from atdiff.core.errors import UserError

__all__ = ["StopRequest", "parse_duration"]

_UNITS = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}


class StopRequest:
    """A request for a run to stop after the current pass: on SIGTERM, SIGINT, or when its time is up.

    As a context manager it handles the two signals; a second one has its usual effect on the process.

    Args:
        max_seconds: time limit from now; None for no limit.
        signals: whether to handle signals, which is only possible in the main thread.
    """

    def __init__(self, max_seconds: float | None = None, *, signals: bool = False) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._takes = signals and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._signal: str | None = None

    @property
    def reason(self) -> str | None:
        """The reason to stop; None to continue."""
        if self._signal is not None:
            return self._signal
        over = self._deadline is not None and time.monotonic() >= self._deadline
        return "the time limit of --max-time was reached" if over else None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT) if self._takes else ():
            self._before[number] = signal.signal(number, self._taken)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_back()

    def _taken(self, number: int, frame: FrameType | None) -> None:
        self._signal = f"{signal.Signals(number).name} was received"
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def parse_duration(text: str) -> float:
    """Return the seconds in a duration such as ``90`` (seconds), ``45m``, ``1h30m``, ``2d`` or ``1:30:00``.

    Raises:
        UserError: it has none of these formats, or is not above 0.
    """
    seconds = 0.0
    if re.fullmatch(r"\d+(:[0-5]?\d){1,2}", text):
        for part in text.split(":"):
            seconds = 60 * seconds + int(part)
        if text.count(":") == 1:  # hours and minutes
            seconds *= 60
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    elif re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
        seconds = sum(float(value) * _UNITS[unit] for value, unit in re.findall(r"([\d.]+)([dhms])", text))
    if not seconds > 0:
        raise UserError(f"--max-time {text!r} is not a duration; use seconds, 45m, 1h30m, 2d or HH:MM:SS.")
    return seconds
