"""The cost of one adversarial pass of consistency distillation over one plain pass of it, timed in turn in one run.

python bench/consistency_cost.py [--pairs 15] [--passes 20] [--threads 1] [--out bench/results]

As pass_cost.py; a pass has a teacher's step, the student's forward and backward, and the target's forward, which has
a backward for delta where the teacher's estimate is perturbed along a gradient. The arms use every batch twice, the
teacher's step (and an unmoved target) once: hence ratios below 1, as of "repeat", which perturbs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, LCMScheduler
from rich.progress import track

from atdiff import EMA, Adversary, ConsistencyObjective, Teacher
from atdiff.objectives.consistency import Site
from pass_cost import MODELS, arguments, passes, ratios, report, row, seconds

STAGGERED: dict[str, Any] = {"step_size": 1.0, "passes": 2, "scale": "middle", "order": "staggered"}
ARMS: dict[str, dict[str, Any]] = {
    "repeat": {"step_size": 0.0},
    "student, gradient, invariant": {"site": "student", "target": "invariant"},
    "student, gradient, equivariant": {"site": "student", "target": "equivariant"},
    "student, residual, invariant": {"site": "student", "target": "invariant", "direction": "residual"},
    "teacher, gradient, invariant": {"site": "teacher", "target": "invariant"},
    "teacher, residual, invariant": {"site": "teacher", "target": "invariant", "direction": "residual"},
}


def distillation(label: str, device: str, site: Site = "student", **options: Any) -> Iterator[None]:  # noqa: ANN401
    spec = MODELS[label]
    model, teacher = spec.build().to(device), spec.build().to(device)
    betas = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    target = EMA(model, 0.95)
    objective = ConsistencyObjective(
        LCMScheduler(**betas), teacher=Teacher(teacher, DDPMScheduler(**betas)), target=target.module, site=site
    )
    adversary = Adversary(**{**STAGGERED, **options}) if options else Adversary(passes=1)
    return passes(spec, model, adversary, device, objective, target)


def main() -> None:
    args = arguments(str(__doc__).splitlines()[0])
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for label, (arm, options) in track(list(itertools.product(MODELS, ARMS.items())), description="timing"):
        plain = partial(seconds, distillation(label, device))
        adversarial = partial(seconds, distillation(label, device, **options))
        rows.append(row(label, arm, ratios(plain, adversarial, args.pairs, args.passes)))
    report(args, "consistency_cost", "seconds of a pass of the arm over seconds of a plain CD pass, paired", rows)


if __name__ == "__main__":
    main()
