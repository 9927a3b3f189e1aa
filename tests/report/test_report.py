"""The page, read back with html.parser, is balanced and self-contained, and shows the figures of the rows."""

from __future__ import annotations

import base64
import copy
import csv
import hashlib
import io
import os
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from atdiff.core.errors import UserError
from atdiff.models.mlp import MLP2DModel
from atdiff.pipelines.model import load_denoiser, save_pipeline
from atdiff.report import comparison_table, markdown_table, plots, save_curves, write_report
from atdiff.report import page as page_module
from atdiff.report.curves import MOST_ARMS, add_legend, styles_of
from atdiff.report.plots import loss_curves, metric_curves
from atdiff.report.samples import Grids, sample_grids, samples_picture
from atdiff.report.statistics import Row, compare, ranked, winners
from atdiff.report.tables import cells_table, correction_markdown, correction_table, mean_text
from atdiff.report.words import conclusions, percent
from atdiff.sampling.generate import generate

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


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), shade, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def fake_grids(arms: Sequence[str] = ("plain", *GAINS)) -> Grids:
    """Three step counts of ddim and two of iddpm, each grid a different image."""
    places = [("ddim", 5), ("ddim", 10), ("ddim", 20), ("iddpm", 10), ("iddpm", 20)]
    grids: Grids = {}
    for number, (sampler, steps) in enumerate(places):
        pictures = {arm: picture(16 * number + i) for i, arm in enumerate(arms)}
        grids.setdefault(sampler, {})[steps] = pictures
    return grids


def with_corrections(summary: Summary) -> Summary:
    """Add every cell with two corrections, which gain 10% and 5%; the searched value differs between seeds."""
    cells = [{**cell, "correction": "none"} for cell in summary["cells"]]
    for cell in summary["cells"]:
        for correction, factor in (("epsilon-scaling:search", 0.9), ("time-shift:40", 0.95)):
            more = {"correction_value": 1 + 0.01 * cell["seed"], "search_seed": 999} if factor == 0.9 else {}
            metrics = cell["metrics"] | {"fd": factor * cell["metrics"]["fd"]}
            cells.append({**cell, "correction": correction, "metrics": metrics, **more})
    return summary | {"cells": cells}


def with_measurements(summary: Summary, arms: Sequence[str] = ("plain", "at")) -> Summary:
    """Add records of mismatch, robustness and directions: at's mismatch is below plain's at two of three levels."""
    recipe = {"sampler": "ddim", "steps": 10, "num": 64, "extractor": None, "norm": "l2", "versions": {"torch": "2"}}
    attack = {key: value for key, value in recipe.items() if key != "sampler"}
    distances = {"plain": (0.3, 0.4, 0.2, 0.1), "at": (0.2, 0.5, 0.1, 0.05)}
    mismatch = {
        arm: [
            {"level": level, "noise_norm_ratio": 1 + value, "sliced_wasserstein": value,
             "sliced_wasserstein_floor": 0.01}
            for level, value in zip((0.9, 0.5, 0.1, 0.0), distances[arm], strict=True)
        ]
        for arm in arms
    }  # fmt: skip
    robustness = [{"level": x, "radius_sigma": [0.0, 0.5, 1.0], "loss": [1.0, 1.5, 3.0]} for x in (0.2, 0.8)]
    directions = [
        {"level": x, "direction": "gradient", "cosine": 0.5, "cosine_p10": 0.3, "cosine_p90": 0.6, "loss": 1.0,
         "loss_after": 1.2}
        for x in (0.2, 0.5, 0.8)
    ]  # fmt: skip
    return summary | {
        "mismatch": {"by_run": mismatch, "recipe": recipe},
        "robustness": {"by_run": dict.fromkeys(arms, robustness), "recipe": attack},
        "directions": {"by_run": dict.fromkeys(arms, directions), "recipe": recipe},
    }


def test_page_says_what_arms_share_if_known() -> None:
    """A comparison of runs knows of no base model, and its arms may have different seeds."""

    def said(summary: Summary) -> str:
        rows = compare(summary["cells"], baseline="plain", metric="fd")
        return " ".join(page_module._compared(summary, rows))

    study = fake_summary()
    assert "Every arm starts from the base model of its seed (8,000 passes)" in said(study)
    assert "all arms share the base model and the sampling seeds" in said(study)
    started = study | {"recipe": {"evaluation": {"start": "runs/base"}}}
    assert "Every arm starts from runs/base for all seeds (8,000 passes)" in said(started)
    assert "Arms differ in their seeds" not in said(study)
    for passes in ({}, {"base": 0, "arm": 3000}):
        found = said(study | {"passes": passes})
        assert "base model" not in found
        assert "all arms share the sampling seeds" in found
    fewer = [cell for cell in study["cells"] if (cell["arm"], cell["seed"]) != ("at", 2)]
    assert "Arms differ in their seeds" in said(study | {"cells": fewer})


class Page(HTMLParser):
    """Collects tags, text and table cells, and checks that tags are balanced."""

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
        if "style" not in self.stack and "script" not in self.stack:
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
def source(summary: Summary, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(summary, path, fake_grids())
    assert os.listdir(path.parent) == ["report.html"]
    return path.read_text("utf-8")


@pytest.fixture(autouse=True)
def quick(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw real curves only on the page of ``source``: they take most of the time."""
    metric_curves = lambda rows, leading: f"<svg><!-- {rows[0].metric} --></svg>".encode()  # noqa: E731
    monkeypatch.setattr(page_module, "metric_curves", metric_curves)
    monkeypatch.setattr(page_module, "seed_dots", lambda rows, order: f"<svg><!-- {order} --></svg>".encode())


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_samples_are_labelled_float32_at_any_dtype_of_figures(summary: Summary, tmp_path: Path) -> None:
    cells = [{**cell, "weights": "EMA 0.999", "dtype": "bf16 autocast"} for cell in summary["cells"]]
    write_report({**summary, "cells": cells}, tmp_path / "report.html", fake_grids())
    text = " ".join((tmp_path / "report.html").read_text("utf-8").split())
    assert "EMA 0.999 weights; float32; no correction; runs of the first training seed" in text
    assert "EMA 0.999 weights; bf16 autocast; " in text


def test_page_is_balanced_html(source: str, page: Page) -> None:
    assert source.lstrip().startswith("<!DOCTYPE html>")
    assert page.stack == []
    ids = [tag for tag, _ in page.tags]
    assert ids.count("h1") == ids.count("title") == ids.count("main") == 1


def test_page_loads_nothing(source: str, page: Page) -> None:
    assert not {"iframe", "object"} & {tag for tag, _ in page.tags}
    names = ("src", "href", "srcset")
    loads = [attrs[name] for tag, attrs in page.tags for name in names if name in attrs and tag != "a"]
    assert loads[0] == "data:,"  # an empty icon, so that no browser requests one
    # curves of two metrics, seeds of three samplers, recall beside FD, steps saved, losses, grids
    assert len(loads) == 1 + 2 + 3 + 1 + 1 + 1 + 5 * 5
    assert all(str(address).startswith("data:image/") for address in loads[1:])
    assert "url(" not in source
    assert "@import" not in source


def test_links_point_into_the_page_or_to_figures(summary: Summary, page: Page) -> None:
    links = [str(attrs["href"]) for tag, attrs in page.tags if tag == "a"]
    places = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert {link[1:] for link in links if link.startswith("#")} == places
    tables = [link for link in links if not link.startswith("#")]
    assert len(tables) == 2
    for link in tables:
        kind, _, content = link.partition(";base64,")
        lines = list(csv.DictReader(io.StringIO(base64.b64decode(content).decode())))
        assert kind == "data:text/csv"
        assert len(lines) == len(summary["cells"])
        for line, cell in zip(lines, summary["cells"], strict=True):
            assert (line["arm"], line["sampler"], int(line["steps"])) == (cell["arm"], cell["sampler"], cell["steps"])
            assert float(line["fd"]) == cell["metrics"]["fd"]


def test_runs_are_linked_and_the_best_has_load_code(tmp_path: Path) -> None:
    summary = fake_summary(seeds=2)
    for cell in summary["cells"]:
        cell["run"] = str(tmp_path / f"study of/seed-{cell['seed']}/{cell['arm']}")
        Path(cell["run"]).mkdir(parents=True, exist_ok=True)
    summary["recipe"]["words"] = {"at-residual": "moved along the residual"}
    write_report(summary, tmp_path / "study of" / "r.html", fake_grids(), real=picture(255))
    page = Page((tmp_path / "study of" / "r.html").read_text("utf-8"))
    links = [str(attrs["href"]) for tag, attrs in page.tags if tag == "a"]
    assert [link for link in links if link.startswith("seed-1")] == [
        f"seed-1/{arm}/" for arm in ranked(compare(summary["cells"]))
    ]
    best = tmp_path / "study of" / "seed-0" / "at-residual"
    assert f"atdiff sample '{best}' --sampler" in page.text
    assert f'DiffusionPipeline.from_pretrained("{best}")' in page.text
    assert "moved along the residual." in squeeze(page.text)
    (real,) = (attrs for _, attrs in page.tags if attrs.get("class") == "real")
    assert base64.b64decode(str(real["src"]).partition(",")[2]) == picture(255)
    assert page.stack == []


def test_every_image_has_alt_text(page: Page) -> None:
    alts = [attrs.get("alt") for tag, attrs in page.tags if tag == "img"]
    assert all(alts)
    assert "Samples of at-residual: iddpm, 20 steps" in alts


def test_table_shows_exactly_the_rows(page: Page, rows: list[Row]) -> None:
    best, order = winners(rows), ranked(rows)
    assert order[:2] == ["plain", "at-residual"]
    expected = []
    for row in sorted(rows, key=lambda row: (list(LEVELS).index(row.sampler), row.steps, order.index(row.arm))):
        text = mean_text(row)
        if row.verdict != "baseline":
            text += f" {percent(row.change)} {'★ ' if best[row.setting] == row.arm else ''}{row.verdict}"
            text += f" [{percent(row.change_low)}, {percent(row.change_high)}]"
        expected.append(text)
    shown = [squeeze(text) for text in page.cells if "±" in text]
    assert shown[: len(rows)] == expected
    assert {"better", "worse", "unclear"} <= {row.verdict for row in rows}  # otherwise the page covers too little


def test_page_shows_conclusions_and_recipe(page: Page, rows: list[Row]) -> None:
    text = squeeze(page.text)
    for sentence in conclusions(rows):
        assert sentence in text
    for words in (
        "Is it better & faster?", "atdiff quickstart", "digits-classifier", "EMA 0.999", "torch 2.14.1",
        "5 min 11 s", "8,000 passes", "3 seeds (0, 1, 2)", "1,024 generated samples", "lr: 0.001",
        "adversary.direction = random", "recall, higher is better", "FD, lower is better",
    ):  # fmt: skip
        assert words in text, words


def test_metric_of_the_summary_comes_first(summary: Summary, tmp_path: Path) -> None:
    write_report(summary | {"metric": "recall"}, tmp_path / "r.html")
    text = squeeze(Page((tmp_path / "r.html").read_text("utf-8")).text)
    assert "Recall by sampler and steps" in text
    assert conclusions(compare(summary["cells"], metric="recall"))[1] in text


def test_only_the_pages_own_script_may_run(source: str, page: Page) -> None:
    script = source.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert script.count("\n") < 60


def test_all_grids_are_shown_in_order_without_a_script(page: Page) -> None:
    sheets = [attrs for tag, attrs in page.tags if attrs.get("class") == "sheet"]
    assert [(a["data-sampler"], a["data-steps"]) for a in sheets] == [
        ("ddim", "5"), ("ddim", "10"), ("ddim", "20"), ("iddpm", "10"), ("iddpm", "20")
    ]  # fmt: skip
    assert not any("hidden" in attrs for attrs in sheets)
    expected = [png for by_steps in fake_grids().values() for by_arm in by_steps.values() for png in by_arm.values()]
    found = [str(attrs["src"]) for _, attrs in page.tags if attrs.get("class") == "samples"]
    assert [base64.b64decode(address.partition(",")[2]) for address in found] == expected


def test_page_without_samples_has_no_script(summary: Summary, tmp_path: Path) -> None:
    write_report(summary, tmp_path / "r.html")
    source = (tmp_path / "r.html").read_text("utf-8")
    assert "<script" not in source
    assert "script-src" not in source


def test_corrections_have_their_columns(summary: Summary, tmp_path: Path) -> None:
    few = [cell for cell in summary["cells"] if cell["sampler"] == "ddim" and cell["steps"] < 20]
    corrected = with_corrections(summary | {"cells": few})
    write_report(corrected, tmp_path / "r.html", interval="bootstrap")
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    text = squeeze(page.text)
    assert page.stack == []
    for words in (
        "Every arm is sampled with no correction, searched epsilon-scaling, time-shift 40.",
        "with searched epsilon-scaling (b)", "b 1 to 1.02", "−10% against plain without",
        "plain with time-shift 40 lowers FD against plain without in 2 of 2 cells",
        "With searched epsilon-scaling on both, number of cells (of 2) where FD is clearly better / worse than",
        "95% bootstrap interval", "searched on sampling seed 999", "Curves with time-shift 40 on all arms",
    ):  # fmt: skip
        assert words in text, words
    # The first column has no correction, like the main table of the page.
    for row in compare(corrected["cells"], interval="bootstrap"):
        assert sum(mean_text(row) in squeeze(cell) for cell in page.cells) >= 2


def test_correction_tables_show_every_row(summary: Summary) -> None:
    cells = with_corrections(summary)["cells"]
    text = correction_markdown(cells, baseline="plain", metric="fd")
    lines = text.partition("\n\n")[0].splitlines()
    assert lines[0] == "| sampler | steps | arm | without | with searched epsilon-scaling (b) | with time-shift 40 |"
    assert {line.count("|") for line in lines} == {7}
    assert len(lines) == 2 + 12 * 5
    rows = compare(cells, correction="epsilon-scaling:search")
    for row in rows:
        line = next(x for x in lines if x.startswith(f"| {row.sampler} | {row.steps} | {row.arm} |"))
        shown = line.split(" | ")[4]
        assert shown.startswith(mean_text(row))
        assert shown.endswith("(b 1 to 1.02)")
        assert row.verdict == "baseline" or percent(row.change) in shown
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(correction_table(cells, baseline="plain", metric="fd"))
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert all(mean_text(row).replace(" ", "") in printed for row in rows)
    gone = [c for c in cells if (c["arm"], c["correction"], c["steps"]) != ("at", "time-shift:40", 5)]
    assert correction_markdown(gone, baseline="plain", metric="fd").count("| - |") == 3


def test_measurements_have_their_sections(summary: Summary, tmp_path: Path) -> None:
    write_report(with_measurements(summary), tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    text = squeeze(page.text)
    for words in (
        "Mismatch between sampling and training", "Robustness", "Where the adversary's steps point",
        "at: the sliced Wasserstein distance of x_t is below plain's at 2 of 3 noise levels along the trajectory, "
        "and 0.05 against 0.1 for the final samples.",
        "ddim; 10 steps; 64 samples per seed; torch 2; norm l2.",
        "64 samples per seed; torch 2; norm l2; attack steps 10.",
    ):  # fmt: skip
        assert words in text, words
    assert [attrs.get("class") for tag, attrs in page.tags].count("chart") == 2 + 3 + 1 + 1 + 1 + 3
    bare = {name: {"by_run": {}, "recipe": {}} for name in ("mismatch", "robustness", "directions")}
    write_report(summary | bare, tmp_path / "bare.html")
    assert "Robustness" not in (tmp_path / "bare.html").read_text("utf-8")


def test_every_figure_has_its_recipe(tmp_path: Path) -> None:
    summary = fake_summary()
    for cell in summary["cells"]:
        cell |= {"extractor": "vgg", "reference": "digits", "weights": "EMA 0.9", "versions": {"torch": "2.9"}}
        cell["sample_seed"] = 1 + cell["seed"]
        cell["metrics"]["energy"] = cell["metrics"]["fd"]
    write_report(summary, tmp_path / "r.html")
    text = squeeze(Page((tmp_path / "r.html").read_text("utf-8")).text)
    recipe = (
        "EMA 0.9 weights; ddim, iddpm, dpmsolver++; 5, 10, 20, 50 steps; 1,024 samples per seed; training seed 0, "
        "1, 2; sampling seed 1, 2, 3; {}; against digits; torch 2.9."
    )
    # table, curves, seeds, recall beside it and steps saved of FD; details of recall
    assert text.count(recipe.format("features of vgg")) == 6
    assert text.count(recipe.format("pixels")) == 1


def test_page_can_show_several_commands(summary: Summary, tmp_path: Path) -> None:
    write_report(summary | {"command": ["atdiff study a", "atdiff compare a"]}, tmp_path / "r.html")
    assert "<pre>atdiff study a\natdiff compare a</pre>" in (tmp_path / "r.html").read_text("utf-8")


def network(folder: Path, channels: int, size: int, seed: int) -> str:
    torch.manual_seed(seed)
    model = MLP2DModel(in_channels=channels, out_channels=channels, sample_size=size, width=8, num_blocks=1)
    save_pipeline(folder, model, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    return str(folder)


def test_grids_show_equal_seeds_in_equal_places(tmp_path: Path) -> None:
    runs = {arm: network(tmp_path / arm, 1, 8, seed) for seed, arm in enumerate(("plain", "at"))}
    grids = sample_grids(runs, ["ddim", "dpmsolver++"], [2, 3], seed=5)
    assert [(s, n, a) for s, x in grids.items() for n, y in x.items() for a in y] == [
        (s, n, a) for s in ("ddim", "dpmsolver++") for n in (2, 3) for a in ("plain", "at")
    ]
    for arm, run in runs.items():
        denoiser = load_denoiser(run)
        images = generate(
            denoiser.model, denoiser.scheduler, sampler="dpmsolver++", steps=3, num=36, shape=(1, 8, 8), seed=5
        )
        image = np.asarray(Image.open(io.BytesIO(grids["dpmsolver++"][3][arm])))
        assert image.shape == (6 * 9 + 1, 6 * 9 + 1)
        for i in (0, 7, 35):
            row, column = divmod(i, 6)
            tile = image[1 + 9 * row : 9 + 9 * row, 1 + 9 * column : 9 + 9 * column]
            assert np.abs(tile / 127.5 - 1 - images[i, 0].numpy()).max() <= 0.5 / 127.5 + 1e-6
    sheet = Image.open(io.BytesIO(samples_picture(grids["ddim"])))
    assert sheet.width > 300
    assert sheet.height > 300


def test_large_images_make_smaller_grids(tmp_path: Path) -> None:
    run = network(tmp_path / "run", 3, 64, 0)
    by_sampler = sample_grids({"plain": run}, ["ddim", "iddpm"], {"ddim": [2, 3], "iddpm": [2]}, columns=2)
    assert {sampler: list(counts) for sampler, counts in by_sampler.items()} == {"ddim": [2, 3], "iddpm": [2]}
    grids = sample_grids({f"arm{i}": run for i in range(10)}, ["ddim"], [2])
    pictures = [png for by_arm in grids["ddim"].values() for png in by_arm.values()]
    assert sum(map(len, pictures)) * 4 / 3 < 5e6  # noise, which PNG cannot compress
    assert Image.open(io.BytesIO(pictures[0])).size == (4 * 65 + 1, 4 * 65 + 1)


def test_2d_points_are_drawn_and_other_channels_rejected(tmp_path: Path) -> None:
    grids = sample_grids({"plain": network(tmp_path / "plane", 2, 1, 0)}, ["ddim"], [2])
    image = np.asarray(Image.open(io.BytesIO(grids["ddim"][2]["plain"])))
    assert image.shape == (96, 96)
    assert len(np.unique(image)) > 1
    with pytest.raises(UserError, match="4 channels, but a report can only show 1 or 3"):
        sample_grids({"plain": network(tmp_path / "latent", 4, 8, 0)}, ["ddim"], [2])


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('$x_$')</script>"
    summary = fake_summary(("plain", hostile, '"><img src=http://x>'), seeds=2)
    summary = with_corrections(summary) | {"title": hostile, "command": hostile}
    write_report(summary, tmp_path / "r.html", {hostile: {5: {hostile: b"\x89PNG"}}})
    source = (tmp_path / "r.html").read_text("utf-8")
    page = Page(source)
    assert page.stack == []
    assert source.count("<script") == 1  # the page's own
    assert "alert" not in source.partition("<script>")[2].partition("</script>")[0]
    assert not any(attrs.get("src") == "http://x" for _, attrs in page.tags)
    assert hostile in page.cells


def test_minimal_summary_of_one_seed_is_enough(tmp_path: Path) -> None:
    write_report({"cells": fake_summary(seeds=1)["cells"]}, tmp_path / "new" / "r.html")
    page = Page((tmp_path / "new" / "r.html").read_text("utf-8"))
    assert page.stack == []
    assert "a lead, not a result" in page.text
    assert "nan" not in squeeze(page.text).lower().split()


def test_report_is_deterministic(summary: Summary, rows: list[Row], tmp_path: Path) -> None:
    for name in ("first.html", "again.html"):
        write_report(copy.deepcopy(summary), tmp_path / name, fake_grids())
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "first.html").read_bytes()
    few = [row for row in rows if row.sampler == "ddim"]
    assert metric_curves(few) == metric_curves(few)


def test_nothing_is_written_on_an_error(summary: Summary, tmp_path: Path) -> None:
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
    table, legend = render(rows, 120).split("±: half-width of the", 1)
    assert table.count("★") == sum(arm is not None for arm in winners(rows).values())
    assert table.count("?") == sum(row.verdict == "unclear" for row in rows)
    assert "lowest mean" in squeeze(legend)


def test_cells_table_has_a_row_per_cell_and_a_column_per_metric() -> None:
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


def test_cells_table_shows_settings_that_differ() -> None:
    shared = {"run": "a", "sampler": "ddim", "steps": 5, "sample_seed": 3, "metrics": {"fd": 1.0}, "num": 64}
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(cells_table([{**shared, "reference": "set"}, {**shared, "reference": "[set] (labels (1,))"}]))
    assert isinstance(console.file, io.StringIO)
    head, _, *lines = console.file.getvalue().splitlines()
    assert head.split() == ["run", "sampler", "reference", "steps", "seed", "FD"]
    assert ["set" in line and "labels (1,)" in line for line in lines] == [False, True]
    assert "[set]" in lines[1]


def test_tables_escape_markup_in_arm_names() -> None:
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
    assert legend.startswith("±: half-width of the 95% t interval of the mean; %: paired change against plain; ?")


def test_missing_cell_leaves_a_gap(tmp_path: Path, summary: Summary) -> None:
    gone = ("at", "ddim", 50)
    cells = [c for c in summary["cells"] if (c["arm"], c["sampler"], c["steps"]) != gone]
    rows = compare(cells)
    assert " - |" in markdown_table(rows)
    line = [line for line in render(rows, 100).splitlines() if line.startswith("ddim")][3]
    assert line.split()[4] == "-"  # sampler, plain, ip, random, at
    write_report({"cells": cells}, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    assert [attrs.get("class") for tag, attrs in page.tags].count(
        "absent"
    ) == 3  # one per metric, and one of the steps saved


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (24.68, 1.234, "24.7 ± 1.2"), (118.4, 12.3, "118 ± 12"), (0.91234, 0.0111, "0.912 ± 0.011"),
        (6.614, float("nan"), "6.61"), (0.0, 0.0, "0.00 ± 0.00"), (float("nan"), float("nan"), "nan"),
    ],
)  # fmt: skip
def test_mean_text_formatting(rows: list[Row], mean: float, half: float, text: str) -> None:
    assert mean_text(Row(**{**vars(rows[0]), "mean": mean, "half_width": half})) == text


def test_curves_draw_the_rows_and_keep_matplotlib_settings(rows: list[Row], tmp_path: Path) -> None:
    rows = [row for row in rows if row.sampler == "ddim"]
    with mpl.rc_context({"font.size": 7, "svg.hashsalt": "mine"}):
        before = dict(mpl.rcParams)
        save_curves(rows, tmp_path / "curves.png")
        assert dict(mpl.rcParams) == before
    image = Image.open(tmp_path / "curves.png")
    assert image.width > 700
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


def test_far_worse_arm_does_not_squash_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "rendered", lambda figure, file_format: drawn.append(figure) or b"")
    values = {"plain": [10.0, 11.0, 12.0], "good": [5.0, 5.5, 6.0], "bad": [300.0, 320.0, 340.0]}
    cells = [
        {"arm": arm, "seed": seed, "sampler": "ddim", "steps": 5, "num": 9, "sample_seed": 0, "metrics": {"fd": value}}
        for arm, of_arm in values.items()
        for seed, value in enumerate(of_arm)
    ]
    metric_curves(compare(cells))
    _, changes = drawn[0].axes
    low, high = changes.get_ylim()
    assert -105 <= low < -50
    assert 150 <= high < 160
    arrows = [line for line in changes.lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in arrows] == [[150.0]]


@pytest.mark.parametrize(("count", "words"), [(MOST_ARMS + 1, "1 other arm"), (MOST_ARMS + 2, "2 other arms")])
def test_legend_counts_the_pale_arms(count: int, words: str) -> None:
    arms, figure = [f"arm-{i}" for i in range(count)], Figure()
    add_legend(figure, styles_of(arms, arms[:MOST_ARMS]))
    assert figure.legends[0].get_texts()[-1].get_text() == words
