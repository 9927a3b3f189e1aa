"""Optimizers and learning-rate schedules that a recipe names by class path."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from atdiff.core.errors import UserError
from atdiff.system.suggest import nearest
from atdiff.training.config import ADAMW, DECAYS, OptimizerConfig

__all__ = ["Decay", "MatricesAndRest", "check_optimizer", "make_optimizer"]

PACKAGES = {"lion_pytorch": "lion-pytorch", "pytorch_optimizer": "pytorch-optimizer"}  # import name to pip name
LOOKED_AT = 100_000  # passes of a schedule to try out before a run


def make_optimizer(settings: OptimizerConfig, weights: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer of a run.

    Muon is for matrices only; AdamW trains the other weights.

    Raises:
        UserError: the class cannot be imported, is not an optimizer, or does not accept its arguments.
    """
    if settings.name == ADAMW:
        kind: Any = torch.optim.AdamW
        _check_names("optimizer.args", kind, settings.args, {"params", "lr", "betas", "weight_decay"})
    else:
        kind = _checked_class(settings)
    with _told(f"optimizer {settings.name} cannot be built with lr={settings.lr} and args={settings.args}"):
        if settings.name == ADAMW:
            # The fused version can skip steps on the device: see FiniteSteps.
            return _adamw(weights, settings, **{"fused": True, **settings.args})
        if kind.__name__ == "Muon":
            return MatricesAndRest(kind, settings, list(weights))
        made: torch.optim.Optimizer = kind(list(weights), **_arguments(kind, settings))
    return made


def check_optimizer(settings: OptimizerConfig, passes: int) -> None:
    """Check the optimizer and scheduler classes in the settings, and their arguments.

    Raises:
        UserError: as :func:`make_optimizer` and :class:`Decay`.
    """
    if settings.name != ADAMW:
        for name, usual in (("betas", OptimizerConfig().betas), ("weight_decay", OptimizerConfig().weight_decay)):
            if getattr(settings, name) != usual and not settings.name.endswith(".Muon"):
                raise UserError(
                    f"optimizer.{name} is for AdamW only: set the arguments of {settings.name} in optimizer.args, "
                    f"such as {{{name}: ...}}."
                )
    if settings.name != ADAMW or settings.args:
        with torch.random.fork_rng(devices=[]):
            make_optimizer(settings, [nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))])
    if settings.decay in DECAYS and settings.decay_args:
        raise UserError(
            f"optimizer.decay_args are for a scheduler class, but optimizer.decay={settings.decay!r} takes none: "
            "leave them out."
        )
    if settings.decay not in DECAYS:
        Decay(settings).at(min(passes, LOOKED_AT))


class Decay:
    """The learning rate of a torch scheduler as a function of passes alone, so that resuming is exact.

    The scheduler steps once per pass on an optimizer of its own, from which only the learning rate is read; momentum
    schedules have no effect.

    Raises:
        UserError: the class cannot be imported, is not a suitable scheduler, or does not accept its arguments.
    """

    def __init__(self, settings: OptimizerConfig) -> None:
        self.settings = settings
        self.kind = _imported("decay", settings.decay, LRScheduler, "torch learning-rate scheduler")
        if issubclass(self.kind, ReduceLROnPlateau):
            raise UserError(
                "optimizer.decay='ReduceLROnPlateau' needs a validation loss, which training does not compute; use "
                "another scheduler."
            )
        _check_names("optimizer.decay_args", self.kind, settings.decay_args, {"optimizer"})
        self._begin()

    def _begin(self) -> None:
        self.steps = 0
        with self._told():
            self._optimizer = torch.optim.AdamW([torch.zeros(1)], lr=self.settings.lr)
            self._scheduler = self.kind(self._optimizer, **self.settings.decay_args)

    def at(self, passes: int) -> float:
        """Return the learning rate after ``passes`` passes."""
        if passes < self.steps:
            self._begin()
        with self._told():
            while self.steps < passes:
                self._optimizer.step()  # schedulers expect this first
                self._scheduler.step()
                self.steps += 1
        return float(self._optimizer.param_groups[0]["lr"])

    def _told(self) -> contextlib.AbstractContextManager[None]:
        return _told(f"optimizer.decay={self.settings.decay!r} fails with decay_args={self.settings.decay_args}")


class MatricesAndRest(torch.optim.Optimizer):
    """An optimizer for matrices, with AdamW for vectors, convolutions and everything else.

    Args:
        kind: class of the optimizer for matrices.
        settings: its ``betas`` and ``weight_decay`` apply to AdamW.
        weights: weights of the network.
    """

    def __init__(self, kind: Any, settings: OptimizerConfig, weights: Sequence[Tensor]) -> None:  # noqa: ANN401
        matrices = [weight for weight in weights if weight.ndim == 2]
        rest = [weight for weight in weights if weight.ndim != 2]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(kind(matrices, **_arguments(kind, settings)))
        if rest:
            self.parts.append(_adamw(rest, settings))
        super().__init__([{"params": list(weights)}], {})
        self._share()

    def _share(self) -> None:
        """Expose the parameter groups of the parts as this optimizer's own."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:  # noqa: ANN401
        """Step each part."""
        for part in self.parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each part."""
        return {"parts": [part.state_dict() for part in self.parts], "state": {}, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved state."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()


def _adamw(weights: Iterable[Tensor], settings: OptimizerConfig, **more: Any) -> torch.optim.Optimizer:  # noqa: ANN401
    return torch.optim.AdamW(
        list(weights), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, **more
    )


def _arguments(kind: Any, settings: OptimizerConfig) -> dict[str, Any]:  # noqa: ANN401
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.args.items()}
    return {"lr": settings.lr, **lists} if "lr" in inspect.signature(kind).parameters else lists


def _checked_class(settings: OptimizerConfig) -> Any:  # noqa: ANN401
    kind = _imported("name", settings.name, torch.optim.Optimizer, "torch optimizer")
    if kind in (torch.optim.LBFGS, torch.optim.SparseAdam):
        raise UserError(
            f"optimizer.name={settings.name!r} cannot train with one dense gradient per step; use torch.optim.AdamW."
        )
    _check_names("optimizer.args", kind, settings.args, {"params", "lr"})
    return kind


def _imported(key: str, path: str, base: type, what: str) -> Any:  # noqa: ANN401
    """Import a class by its path."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = (error.name or module_name).partition(".")[0]
        remedy = f"`pip install {PACKAGES.get(missing, missing)}`"
        if importlib.util.find_spec(missing):
            remedy = f"{missing} is installed, so check the path of the class in it"
        raise UserError(
            f"optimizer.{key}={path!r} cannot be imported, since {error.name} is missing; {remedy}."
        ) from None
    except Exception as error:  # such as a library this machine cannot load
        raise UserError(f"optimizer.{key}={path!r} cannot be imported: {_first(error)}.") from None
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, base) and found is not base:
        return found
    known = [one for one, kind in vars(module).items() if isinstance(kind, type) and issubclass(kind, base)]
    wrong = f"has no {name}" if found is None else f"has {name}, which is not a {what}"
    raise UserError(f"optimizer.{key}={path!r}: {module_name} {wrong}{'; ' + nearest(name, known) if known else '.'}")


def _check_names(key: str, kind: Any, args: dict[str, Any], ours: set[str]) -> None:  # noqa: ANN401
    """Refuse arguments that a class does not have, or that must be set elsewhere."""
    parameters = inspect.signature(kind).parameters
    free = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    known = [name for name in parameters if name not in ours]
    for name in args:
        if name in ours:
            own = "the run's own" if name in ("params", "optimizer") else f"optimizer.{name}"
            raise UserError(f"{key}.{name} cannot be set there: it is {own}.")
        if name not in known and not free:
            raise UserError(f"{key}.{name} is not an argument of {kind.__name__}; {nearest(name, known)}")


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn errors of third-party classes into a one-sentence ``UserError``."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{what}: {_first(error)}.") from None


def _first(error: BaseException) -> str:
    """Return the first line of an error message, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]
