"""Write the page of a comparison, with its figures, into docs/results.

python studies/write_results.py runs/digits-v                          # a study: digits-v.md
python studies/write_results.py runs/corrected/digits-v.summary.json   # of atdiff compare: corrected-digits-v.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atdiff.report import save_curves
from atdiff.report.curves import MOST_ARMS
from atdiff.report.measured import direction_curves, dose_curves, mismatch_curves, robustness_curves
from atdiff.report.plots import saved_curves
from atdiff.report.statistics import Row, compare, compare_corrected, corrections_of, ranked
from atdiff.report.steps_saved import saved_where_known
from atdiff.report.tables import correction_markdown, markdown_table, saved_markdown
from atdiff.report.words import conclusions, corrected_conclusions
from atdiff.system.files import write_bytes, write_text


def auto_doses(by_run: Mapping[str, Sequence[Mapping[str, Any]]], file_format: str = "svg") -> bytes:
    """Draw the automatic doses; the noise of other arms would share the axes and hide them."""
    return dose_curves({arm: records for arm, records in by_run.items() if "dose" in records[-1]}, file_format)


PAGES = Path(__file__).parent.parent / "docs" / "results"
FIGURES = {
    "mismatch": (
        mismatch_curves,
        "Mismatch along the trajectory: distribution of the sampler's inputs compared with training inputs",
    ),
    "directions": (direction_curves, "Cosine of each direction with x0 - x0_hat, and the loss after a step along it"),
    "dose": (auto_doses, "Automatic doses, the variance ratio that controls them, and the resulting noise"),
    "robustness": (robustness_curves, "Worst-case loss against the radius of the perturbation"),
}


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        name = path.name if path.is_dir() else f"{path.parent.name}-{path.name.removesuffix('.summary.json')}"
        summary = json.loads((path / "summary.json" if path.is_dir() else path).read_text())
        write_text(PAGES / f"{name}.md", page(name, summary, path / "samples.png"))
        print(PAGES / f"{name}.md")


def page(name: str, summary: dict[str, Any], samples: Path) -> str:
    cells, options = summary["cells"], {"baseline": summary["baseline"], "metric": summary["metric"]}
    corrections = corrections_of(cells)
    rows = compare(cells, correction=corrections[0], **options)
    save_curves(rows, PAGES / f"{name}.png")
    parts = [
        f"# {name}",
        f"`{summary['command']}`",
        summary.get("about", ""),
        recipe(summary),
        f"![{options['metric']} and its change by sampling steps]({name}.png)",
        markdown_table(rows),
        listed(conclusions(rows)),
    ]
    if len(corrections) > 1:
        corrected = compare_corrected(cells, **options)
        said = listed(corrected_conclusions(corrected))
        parts += ["## Without and with correction", correction_markdown(cells, **options), said]
    saved = saved_where_known(cells, **options, correction=corrections[0])
    if saved:
        write_bytes(
            PAGES / f"{name}-steps-saved.png", saved_curves(saved, leading=ranked(rows)[:MOST_ARMS], file_format="png")
        )
        parts += ["## Steps saved", f"![steps that plain needs to match N steps]({name}-steps-saved.png)"]
        parts += [saved_markdown(saved)]
    parts += [quality(cells, summary["baseline"])]
    if samples.is_file():
        write_bytes(PAGES / f"{name}-samples.png", samples.read_bytes())
        sampler, seed = cells[0]["sampler"], cells[0]["seed"]
        caption = f"Samples of each arm from the same noise, by sampling steps ({sampler}, training seed {seed})"
        parts += ["## Samples", f"![{caption}]({name}-samples.png)", f"{caption}."]
    parts += [picture(name, part, summary[part]) for part in FIGURES if part in summary and _tells(part, summary[part])]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def recipe(summary: dict[str, Any]) -> str:
    evaluation, versions, cells = summary["recipe"]["evaluation"], summary["versions"], summary["cells"]
    said = []
    if "passes" in summary:
        batch = summary["recipe"]["base"]["training"]["batch_size"]
        start, passes = evaluation.get("start"), summary["passes"]
        base = f"base {Path(start).name}" if start else f"base {passes['base']:,} passes"
        said.append(f"{base}, arms {passes['arm']:,} passes at batch {batch}")
    seeds = ", ".join(dict.fromkeys(str(cell["seed"]) for cell in cells))
    sampling = ", ".join(dict.fromkeys(str(cell["sample_seed"]) for cell in cells))
    said += [
        f"weights {evaluation['weights']}",
        f"{cells[0]['num']:,} samples per cell and seed",
        f"training seeds {seeds}, sampling seeds {sampling}",
    ]
    if searched := next((cell for cell in cells if "search_seed" in cell), None):
        num, seed = searched["search_num"], searched["search_seed"]
        said.append(f"corrections searched on {num:,} samples of sampling seed {seed}")
    said += [
        f"features of {cells[0]['extractor']}" if "fd" in cells[0]["metrics"] else "no features",
        f"reference {evaluation['reference']}",
        evaluation["dtype"],
        f"torch {versions['torch']}, diffusers {versions['diffusers']}",
        "2 CPU cores",
    ]
    text = "; ".join(said) + "."
    return text[0].upper() + text[1:]


def quality(cells: list[dict[str, Any]], baseline: str) -> str:
    """Precision, recall and the like of every arm, the mean over seeds, samplers and steps."""
    lines = []
    for metric in ("precision", "recall", "density", "coverage", "label_accuracy"):
        if any(metric in cell["metrics"] for cell in cells):
            rows = compare(cells, baseline=baseline, metric=metric, correction=corrections_of(cells)[0])
            name = metric.replace("_", " ").capitalize()
            lines.append(f"{name}, mean over all cells: {', '.join(means(rows))}.")
    return "\n\n".join(lines)


def means(rows: list[Row]) -> list[str]:
    by_arm: dict[str, list[float]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row.mean)
    return [f"{arm} {sum(values) / len(values):.3f}" for arm, values in by_arm.items()]


def picture(name: str, part: str, measured: dict[str, Any]) -> str:
    draw, caption = FIGURES[part]
    write_bytes(PAGES / f"{name}-{part}.png", draw(measured["by_run"], file_format="png"))
    told = {key: value for key, value in measured["recipe"].items() if isinstance(value, str | int | float)}
    of = ", ".join(f"{key} {value}" for key, value in told.items())
    return f"## {part.capitalize()}\n\n![{caption}]({name}-{part}.png)\n\n{caption}. {of}."


def _tells(part: str, measured: dict[str, Any]) -> bool:
    return part != "dose" or any("dose" in records[-1] for records in measured["by_run"].values())


def listed(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


if __name__ == "__main__":
    main()
