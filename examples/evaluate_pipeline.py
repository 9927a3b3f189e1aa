"""Look at a pipeline that somebody else trained, without training anything: does AT have something to gain here?

python examples/evaluate_pipeline.py RUN DATA [--out DIR]

RUN is a diffusers pipeline folder, a hub id or a training folder of atdiff; DATA the images that it was trained on.
The mismatch says how far the inputs that the network meets in sampling are from those of training; the robustness, how
much worse the network is at the worst inputs nearby, and whether the gradient points at the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from atdiff.cli import main as atdiff


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--steps", default="10")
    parser.add_argument("--num", default="2048", help="images; fewer are faster and noisier")
    parser.add_argument("--extractor", default="label-classifier", help="whose features measure the images")
    parser.add_argument("--levels", default="0.1,0.5,0.9", help="of noise, from 0 (data) to 1 (noise)")
    parser.add_argument("--out", type=Path, default=Path("looked-at"))
    args = parser.parse_args()

    common = ["--data", args.data, "--num", args.num]
    mismatch = ["mismatch", args.run, "--steps", args.steps, "--extractor", args.extractor, *common]
    robustness = ["robustness", args.run, "--data", args.data, "--num", "64", "--pgd-steps", "5", "--restarts", "1"]
    robustness += ["--levels", args.levels]
    for name, words in (("mismatch", mismatch), ("robustness", robustness)):
        code = atdiff([*words, "--out", str(args.out / name)])
        if code:
            raise SystemExit(code)


if __name__ == "__main__":
    main()
