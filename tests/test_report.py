"""The page is read back with html.parser: balanced, self-contained, and its figures are those of the rows."""

from __future__ import annotations

import base64
import copy
import io
import os
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from atdiff.errors import UserError
from atdiff.evaluation.comparison import Row, compare, conclusions, percent, winners
from atdiff.report import comparison_table, markdown_table, save_curves, write_report
from atdiff.report.plots import loss_curves, metric_curves
from atdiff.report.tables import cells_table, mean_text

Summary = dict[str, Any]
VOID = {"meta", "img", "br", "link", "input", "hr"}
GAINS = {"ip": -0.06, "random": 0.03, "at": -0.35, "at-residual": -0.6}
LEVELS = {"ddim": (49, 14, 6.6, 5), "iddpm": (60, 17.8, 7.6, 5.2), "dpmsolver++": (41, 11, 5.6, 4.9)}


def fake_summary(arms: Sequence[str] = ("plain", *GAINS), seeds: int = 3) -> Summary:
    """Five arms, three seeds, three samplers, four steps: gains fade with steps, iddpm 50 gets worse."""
    rng = np.random.default_rng(0)
    cells = []
    for seed in range(seeds):
        for sampler, levels in LEVELS.items():
            for number, (steps, level) in enumerate(zip((5, 10, 20, 50), levels, strict=True)):
                shared = level * np.exp(rng.normal(0, 0.15))
                for arm in arms:
                    gain = GAINS.get(arm, 0) * (1 - 0.25 * number)
                    gain -= 0.5 * GAINS.get(arm, 0) * (sampler == "iddpm") * (number == 3)
                    fd = float(shared * (1 + gain) * np.exp(rng.normal(0, 0.015)))
                    metrics = {"recall": float(rng.uniform(0.6, 0.7)), "fd": fd}
                    cells.append(
                        {"arm": arm, "seed": seed, "sampler": sampler, "steps": steps, "num": 1024,
                         "sample_seed": 0, "metrics": metrics}
                    )  # fmt: skip
    loss = [[p, 0.2 * p**-0.1] for p in range(50, 1001, 50)]
    return {
        "title": "Fine-tuning on digits", "about": "Is it better & faster?", "command": "atdiff quickstart",
        "versions": {"torch": "2.14.1"}, "baseline": "plain", "wall_seconds": 311.4, "samples_png": None,
        "recipe": {
            "base": {"optimizer": {"lr": 0.001}, "betas": (0.9, 0.99)},
            "arms": {arm: {"adversary": {"direction": "random"}} if arm == "random" else {} for arm in arms},
            "evaluation": {"steps": [5, 10, 20], "extractor": "digits-classifier", "weights": "EMA 0.999"},
        },
        "passes": {"base": 8000, "arm": 3000}, "cells": cells,
        "training": {arm: {str(seed): loss for seed in range(seeds)} for arm in arms},
    }  # fmt: skip


class Page(HTMLParser):
    """Tags with their balance, the text of table cells, and the addresses a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        if tag not in VOID:
            self.stack.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> without a start"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data
        if "td" in self.stack or "th" in self.stack:
            self.cells[-1] += data


def squeeze(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def summary() -> Summary:
    return fake_summary()


@pytest.fixture(scope="module")
def rows(summary: Summary) -> list[Row]:
    return compare(summary["cells"])


@pytest.fixture(scope="module")
def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(summary: Summary, png: bytes, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(summary, path, {"DDIM, 5 steps": png})
    assert os.listdir(path.parent) == ["report.html"]
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_page_is_balanced_html(source: str, page: Page) -> None:
    assert source.lstrip().startswith("<!DOCTYPE html>")
    assert page.stack == []
    ids = [tag for tag, _ in page.tags]
    assert ids.count("h1") == ids.count("title") == ids.count("main") == 1


def test_page_loads_nothing(source: str, page: Page) -> None:
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    loads = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset") if name in attrs]
    assert len(loads) == 3
    assert all(str(address).startswith("data:image/") for address in loads)
    assert "url(" not in source
    assert "@import" not in source


def test_every_picture_has_words(page: Page) -> None:
    alts = [attrs.get("alt") for tag, attrs in page.tags if tag == "img"]
    assert all(alts)
    assert "Generated samples: DDIM, 5 steps" in alts


def test_table_shows_the_rows_and_nothing_else(page: Page, rows: list[Row]) -> None:
    best = winners(rows)
    expected = []
    for row in sorted(rows, key=lambda row: (list(LEVELS).index(row.sampler), row.steps)):
        text = mean_text(row)
        if row.verdict != "baseline":
            text += f" {percent(row.change)} {'★ ' if best[row.setting] == row.arm else ''}{row.verdict}"
            text += f" [{percent(row.change_low)}, {percent(row.change_high)}]"
        expected.append(text)
    shown = [squeeze(text) for text in page.cells if "±" in text]
    assert shown[: len(rows)] == expected
    assert {"better", "worse", "unclear"} <= {row.verdict for row in rows}  # else the page shows too little


def test_page_tells_conclusions_and_recipe(page: Page, rows: list[Row]) -> None:
    text = squeeze(page.text)
    for sentence in conclusions(rows):
        assert sentence in text
    for words in (
        "Is it better & faster?", "atdiff quickstart", "digits-classifier", "EMA 0.999", "torch 2.14.1",
        "5 min 11 s", "8,000 passes", "3 seeds (0, 1, 2)", "1,024 generated samples", "lr: 0.001",
        "adversary.direction = random", "recall, higher is better", "FD, lower is better",
    ):  # fmt: skip
        assert words in text, words


def test_the_metric_of_the_summary_comes_first(summary: Summary, tmp_path: Path) -> None:
    write_report(summary | {"metric": "recall"}, tmp_path / "r.html")
    text = squeeze(Page((tmp_path / "r.html").read_text("utf-8")).text)
    assert "recall by sampler and steps" in text
    assert conclusions(compare(summary["cells"], metric="recall"))[1] in text


def test_sample_pictures_are_embedded_unchanged(page: Page, png: bytes) -> None:
    image = next(attrs for tag, attrs in page.tags if attrs.get("class") == "samples")
    assert base64.b64decode(str(image["src"]).partition(",")[2]) == png


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('$x_$')</script>"
    summary = fake_summary(("plain", hostile, '"><img src=http://x>'), seeds=2)
    write_report(summary | {"title": hostile, "command": hostile}, tmp_path / "r.html", {hostile: b"\x89PNG"})
    source = (tmp_path / "r.html").read_text("utf-8")
    page = Page(source)
    assert page.stack == []
    assert "<script" not in source
    assert not any(attrs.get("src") == "http://x" for _, attrs in page.tags)
    assert hostile in page.cells


def test_a_bare_summary_of_one_seed_is_enough(tmp_path: Path) -> None:
    write_report({"cells": fake_summary(seeds=1)["cells"]}, tmp_path / "new" / "r.html")
    page = Page((tmp_path / "new" / "r.html").read_text("utf-8"))
    assert page.stack == []
    assert "a lead and not a result" in page.text
    assert "nan" not in squeeze(page.text).lower().split()


def test_same_summary_same_bytes(summary: Summary, source: str, png: bytes, tmp_path: Path) -> None:
    write_report(copy.deepcopy(summary), tmp_path / "again.html", {"DDIM, 5 steps": png})
    assert (tmp_path / "again.html").read_text("utf-8") == source


def test_nothing_is_written_on_a_mistake(summary: Summary, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not among the arms"):
        write_report(summary | {"baseline": "other"}, tmp_path / "r.html")
    with pytest.raises(UserError, match="is a folder"):
        write_report(summary, tmp_path)
    assert list(tmp_path.iterdir()) == []


def render(rows: list[Row], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    console.print(comparison_table(rows))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_terminal_table_fits_six_arms(width: int) -> None:
    rows = compare(fake_summary(("plain", "repeat", *GAINS))["cells"])
    text = render(rows, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for row in rows:  # every figure unbroken, whatever the width
        assert mean_text(row).replace(" ", "") in text
    first = next(i for i, line in enumerate(lines) if line.strip().startswith("ddim"))
    changes = [percent(row.change) for row in rows if row.setting == ("ddim", 5)][1:]
    assert [part for part in lines[first + 1].split() if part.endswith("%")] == changes


def test_terminal_table_marks_only_winners(rows: list[Row]) -> None:
    table, legend = render(rows, 120).split("± 95% interval", 1)
    assert table.count("★") == sum(arm is not None for arm in winners(rows).values())
    assert table.count("?") == sum(row.verdict == "unclear" for row in rows)
    assert "lowest mean" in squeeze(legend)


def test_cells_table_has_a_line_a_cell_and_a_column_a_metric() -> None:
    shared = {"sampler": "ddim", "steps": 5, "sample_seed": 3}
    cells = [
        {"run": "runs/[red]a", **shared, "metrics": {"fd": 12.345, "recall": 0.7}},
        {"run": "runs/b", **shared, "metrics": {"fd": None}},
    ]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(cells_table(cells))
    assert isinstance(console.file, io.StringIO)
    head, _, *lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert head == ["run", "sampler", "steps", "seed", "FD", "recall"]
    assert lines == [
        ["runs/[red]a", "ddim", "5", "3", "12.3", "0.700"],
        ["runs/b", "ddim", "5", "3", "nan", "-"],
    ]


def test_tables_do_not_read_arm_names_as_markup() -> None:
    rows = compare(fake_summary(("plain", "[bold]a|b"), seeds=2)["cells"])
    assert "[bold]a|b" in render(rows, 100)
    assert "| [bold]a\\|b |" in markdown_table(rows)


def test_markdown_table_is_rectangular_and_complete(rows: list[Row]) -> None:
    table, _, legend = markdown_table(rows).partition("\n\n")
    lines = table.splitlines()
    assert {line.count("|") for line in lines} == {8}
    assert len(lines) == 2 + 12
    for row in rows:
        line = next(x for x in lines if x.startswith(f"| {row.sampler} | {row.steps} |"))
        assert mean_text(row) in line
        assert row.verdict == "baseline" or percent(row.change_high) in line
    assert table.count("**") == 2 * table.count("★") == 2 * sum(a is not None for a in winners(rows).values())
    assert legend.startswith("± 95%")


def test_a_missing_cell_leaves_a_gap(tmp_path: Path, summary: Summary) -> None:
    gone = ("at", "ddim", 50)
    cells = [c for c in summary["cells"] if (c["arm"], c["sampler"], c["steps"]) != gone]
    rows = compare(cells)
    assert " - |" in markdown_table(rows)
    line = [line for line in render(rows, 100).splitlines() if line.startswith("ddim")][3]
    assert line.split()[4] == "-"  # sampler, plain, ip, random, at
    write_report({"cells": cells}, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    assert [attrs.get("class") for tag, attrs in page.tags].count("absent") == 2  # one a metric


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (24.68, 1.234, "24.7 ± 1.2"), (118.4, 12.3, "118 ± 12"), (0.91234, 0.0111, "0.912 ± 0.011"),
        (6.614, float("nan"), "6.61"), (0.0, 0.0, "0.00 ± 0.00"), (float("nan"), float("nan"), "nan"),
    ],
)  # fmt: skip
def test_mean_text(rows: list[Row], mean: float, half: float, text: str) -> None:
    assert mean_text(Row(**{**vars(rows[0]), "mean": mean, "half_width": half})) == text


def test_curves_draw_the_rows_and_leave_matplotlib_alone(rows: list[Row], tmp_path: Path) -> None:
    with mpl.rc_context({"font.size": 7, "svg.hashsalt": "mine"}):
        before = dict(mpl.rcParams)
        save_curves(rows, tmp_path / "curves.png")
        assert dict(mpl.rcParams) == before
    image = Image.open(tmp_path / "curves.png")
    assert image.width > 1000
    colours = {tuple(c) for c in np.asarray(image.convert("RGB")).reshape(-1, 3)}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)} <= colours
    assert metric_curves(rows, file_format="svg").startswith(b"<?xml")
    assert os.listdir(tmp_path) == ["curves.png"]
    with pytest.raises(UserError, match="expected one of png, svg, pdf"):
        save_curves(rows, tmp_path / "curves.gif")


def test_loss_curves_are_optional(summary: Summary) -> None:
    assert loss_curves({}, ["plain"]) is None
    assert loss_curves({"plain": {"0": []}}, ["plain"]) is None
    assert loss_curves(summary["training"], ["plain", "at"], file_format="png") is not None


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_body_does_not_overflow_a_phone(source: str, tmp_path: Path) -> None:
    probe = (
        "<script>addEventListener('load',()=>{const d=frames[0].document.documentElement;"
        "document.title=d.scrollWidth+' of '+d.clientWidth})</script>"
    )
    frame = '<iframe src="page.html" style="width:390px;height:800px;border:0" scrolling="no"></iframe>'
    (tmp_path / "page.html").write_text(source, "utf-8")
    (tmp_path / "frame.html").write_text(f"<title></title>{frame}{probe}", "utf-8")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--dump-dom",
        (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "<title>390 of 390</title>" in done.stdout
