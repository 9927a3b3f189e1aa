"""Links from the page to files: run folders, code that loads a run, and the cells as CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from atdiff.core.specs import NO_CORRECTION
from atdiff.report.statistics import Row

__all__ = ["cells_csv", "load_code", "run_links"]

FACTS = ("arm", "seed", "sampler", "steps", "correction", "nfe", "num", "sample_seed", "run")


def cells_csv(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the cells as CSV, one line per cell and one column per metric value."""
    facts = [name for name in FACTS if any(name in cell for cell in cells)]
    figures = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*facts, *figures])
    for cell in cells:
        writer.writerow([*(cell.get(name, "") for name in facts), *(cell["metrics"].get(name, "") for name in figures)])
    return text.getvalue()


def run_links(cells: Sequence[Mapping[str, Any]], page: Path) -> dict[str, list[tuple[str, str]]]:
    """Return for each arm the seed and the URL, relative to the page, of each run whose folder exists."""
    found: dict[str, dict[str, str]] = {}
    for cell in cells:
        run = str(cell.get("run") or "")
        if run and Path(run).is_dir():
            address = quote(Path(os.path.relpath(run, page.parent or ".")).as_posix())
            found.setdefault(cell["arm"], {})[str(cell["seed"])] = f"{address}/"
    return {arm: list(seeds.items()) for arm, seeds in found.items()}


def load_code(cells: Sequence[Mapping[str, Any]], row: Row) -> str:
    """Return code that samples from and loads the first run of a row's arm; empty if its cells name no run."""
    place = row.arm, row.sampler, row.steps, row.correction
    names = ("arm", "sampler", "steps", "correction")
    mine = [cell for cell in cells if tuple({"correction": NO_CORRECTION, **cell}[name] for name in names) == place]
    cell = next((cell for cell in mine if cell.get("run")), None)
    if cell is None:
        return ""
    run, family = str(cell["run"]), row.correction.partition(":")[0]
    corrected = f"{family}:{cell['correction_value']}" if "correction_value" in cell else row.correction
    asked = {  # options that may differ from the defaults of `atdiff sample`
        "correction": None if corrected == NO_CORRECTION else corrected,
        "guidance-scale": cell.get("guidance_scale"),
        "variant": cell.get("variant"),
    }
    how = "".join(f"--{name} {shlex.quote(str(value))} " for name, value in asked.items() if value is not None)
    return (
        f"atdiff sample {shlex.quote(run)} --sampler {row.sampler} --steps {row.steps} {how}--out samples.png\n\n"
        f"# in Python, with plain diffusers\n{_in_python(Path(run), run)}"
    )


def _in_python(folder: Path, run: str) -> str:
    if (folder / "lora").is_dir():
        return f'pipeline.load_lora_weights("{run}/lora")  # the pipeline that it was trained from'
    saved = folder / "pipeline"
    index = saved / "model_index.json"
    own = json.loads(index.read_text()).get("unet", [""]) if index.is_file() else [""]
    known = f"import {own[0]}  # registers the network with diffusers\n" if str(own[0]).startswith("atdiff") else ""
    where = f"{run}/pipeline" if saved.is_dir() else run
    return f'{known}from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained("{where}")'
