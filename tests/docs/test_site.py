"""The documentation as a site: the repository's address, installing from a clone, findings, and their charts."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize(
    ("origin", "page"),
    [
        ("https://example.org/lab/atdiff.git", "https://example.org/lab/atdiff"),
        ("git@example.org:lab/atdiff.git", "https://example.org/lab/atdiff"),
        ("ssh://git@example.org/lab/atdiff", "https://example.org/lab/atdiff"),
        ("/srv/git/atdiff", None),
        ("https://name:secret@example.org/lab/atdiff.git", None),  # a secret must not be published
        (None, None),
    ],
)
def test_site_links_to_repositories_with_a_web_page(
    origin: str | None, page: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mkdocs")
    repository = module(DOCS / "reference.py").repository
    monkeypatch.delenv("ATDIFF_REPOSITORY", raising=False)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    if origin is not None:
        subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", origin], check=True)
    assert repository(tmp_path) == page
    monkeypatch.setenv("ATDIFF_REPOSITORY", "https://example.org/other")
    assert repository(tmp_path) == "https://example.org/other"


def test_pages_install_the_clone_with_existing_extras() -> None:
    extras = set(
        re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("[project.optional")[2], re.M)
    )
    found = []
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for words in re.findall(r"pip install ([^`\n#|]*)", page.read_text()):
            assert "atdiff" not in words, (page, words)
            found += [name for names in re.findall(r"'\.\[([\w,]+)\]'", words) for name in names.split(",")]
    assert {"lcm", "clip", "trackers"} <= set(found) <= extras


def test_findings_are_numbered_and_have_their_charts() -> None:
    text = (DOCS / "results" / "README.md").read_text()
    numbers = [int(a or b) for a, b in re.findall(r"^(?:<summary>(\d+)\. |(\d+)\. \*\*)", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 25
    charts = re.findall(r"\((finding-\w+\.png)\)", text)
    assert {file.name for file in (DOCS / "results").glob("finding-*.png")} == set(charts)
    assert text.count("<details") == text.count("</details>")


def changes_on_page(page: str, sampler: str) -> list[tuple[str, dict[str, list[float]]]]:
    """Read the steps, and by arm the change and the ends of its interval, from the first table of a result page."""
    text = (DOCS / "results" / f"{page}.md").read_text()
    lines = text[text.index("| sampler | steps |") :].partition("\n\n")[0].splitlines()
    (_, _, *arms), _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    found = []
    for name, steps, *cells in body:
        percents = [re.findall(r"([+−]?[\d.]+)%", cell) for cell in cells]
        numbers = [[float(text.replace("−", "-")) for text in texts] for texts in percents]
        if name == sampler:
            found.append((steps, {arm: three for arm, three in zip(arms, numbers, strict=True) if three}))
    return found


def test_chart_bars_match_the_figures_of_their_page() -> None:
    draw = module(ROOT / "studies" / "draw_findings.py")
    for arms, panels in draw.FOUND.values():
        shown = set()
        for panel in panels:
            table = changes_on_page(panel.page, panel.sampler)
            assert len(table) >= 2, panel
            bars = [(place, *by_arm[arm]) for arm in arms for place, (_, by_arm) in enumerate(table) if arm in by_arm]
            axes = Figure().subplots()
            draw.bars(axes, arms, panel)
            *intervals, zero = [list(line.get_ydata()) for line in axes.lines]
            assert [
                (round(bar.get_x() + bar.get_width() / 2), bar.get_height(), *ends)
                for bar, ends in zip(axes.patches, intervals, strict=True)
            ] == bars, panel
            assert zero == [0, 0]
            assert [label.get_text() for label in axes.get_xticklabels()] == [steps for steps, _ in table]
            shown |= {arm for _, by_arm in table for arm in by_arm}
        assert set(arms) <= shown


def test_every_page_is_in_the_navigation_exactly_once() -> None:
    content = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r"([\w/-]+\.md)$", content.partition("nav:")[2], re.MULTILINE)
    made = {"reference/commands.md", "reference/recipe-keys.md"}
    here = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | made
    assert len(pages) == len(set(pages))
    assert here - set(pages) == {page for page in here if page.startswith("results/")} - set(pages)
    assert set(pages) <= here
    assert yaml.safe_load(content.partition("theme:")[0])["docs_dir"] == "docs"
