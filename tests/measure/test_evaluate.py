"""`atdiff evaluate`: interruptions at any moment, and unusable input."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageOps

import atdiff.pipelines.trained
from atdiff.cli import main
from atdiff.measure import cells as evaluate
from atdiff.pipelines.model import save_pipeline
from atdiff.system.files import write_json
from conftest import small_unet


class Interrupter:
    """Interrupts the evaluation at its n-th moment: before or after a batch of images or a write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.generate = 0, atdiff.pipelines.trained.iter_generate
        monkeypatch.setattr(atdiff.pipelines.trained, "iter_generate", self.pictures)
        monkeypatch.setattr(evaluate, "write_json", self.write)

    def moment(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def pictures(self, *args: Any, **options: Any) -> Iterator[torch.Tensor]:
        self.moment()
        for batch in self.generate(*args, **{**options, "batch_size": 16}):
            yield batch
            self.moment()

    def write(self, path: Path, content: Any) -> None:
        self.moment()
        write_json(path, content)
        self.moment()


def test_interruptions_lose_or_duplicate_no_cell(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(name: str) -> list[str]:
        return ["evaluate", str(finished[1] / "seed-0" / "at"), "--steps", "2,3", "--num", "32", "--metrics", "fid",
                "--corrections", "none,epsilon-scaling:1.02", "--out", str(tmp_path / name)]  # fmt: skip

    assert main(words("whole.json")) == 0
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert len(whole) == 4
    interrupter = Interrupter(monkeypatch)
    interruptions = 0
    # Each start gets one moment further than the last, so that every kind of moment is interrupted.
    for moment in range(1, 100):
        interrupter.left = moment
        if main(words("cells.json")) == 0:
            break
        interruptions += 1
        if (tmp_path / "cells.json").exists():
            cells = json.loads((tmp_path / "cells.json").read_text())
            assert cells == whole[: len(cells)]
    assert interruptions >= 5
    assert json.loads((tmp_path / "cells.json").read_text()) == whole


def test_cells_named_twice_are_measured_once(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run, out = str(finished[1] / "seed-0" / "at"), tmp_path / "cells.json"
    words = ["--steps", "2,2", "--seeds", "1,1", "--corrections", "none,none", "--num", "16", "--metrics", "fid"]
    assert main(["evaluate", run, run, *words, "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())) == 1


def test_steps_named_twice_are_compared_once(finished: tuple[Path, Path], tmp_path: Path) -> None:
    arms = [f"{arm}={finished[1] / 'seed-0' / arm}" for arm in ("plain", "at")]
    words = ["--steps", "2,2", "--num", "16", "--metrics", "fid", "--no-mismatch"]
    assert main(["compare", *arms, *words, "--out", str(tmp_path / "page.html")]) == 0
    assert len(json.loads((tmp_path / "page.summary.json").read_text())["cells"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num", "1"], "num=1"),
        (["--data", "large", "--extractor", "digits-classifier"], "(1, 16, 16)"),
        (["--data", "one", "--extractor", "digits-classifier"], "at least 2"),
        (["--data", "nowhere/at/all"], "nowhere"),
        (["--samplers", "flow-euler"], "does not fit"),
        (["--extractor", "inception-v3-compat", "--weights", "missing.pth"], "missing.pth"),
        (["--extractor", "inception-v3-compat", "--weights", "torn.pth"], "torn.pth"),
        (["--weights", "clip=torn.pth"], "clip"),
        (["--metrics", "clip_score"], "prompts"),
        (["--metrics", "on_mode"], "known modes"),
        (["--corrections", "epsilon-scaling:-1"], "above 0"),
        (["--out", "notes.json"], "contains no evaluation"),
    ],
)
def test_unusable_input_is_one_sentence_and_changes_nothing(
    words: list[str],
    message: str,
    finished: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size, count in (("large", 16, 3), ("one", 8, 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(np.full((size, size), i, np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out = [] if "--out" in words else ["--out", "cells.json"]
    assert main(["evaluate", str(finished[1] / "seed-0" / "at"), "--steps", "2", *words, *out]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("atdiff: ")
    assert len(error.splitlines()) == 1
    assert message in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_nonfinite_images_are_reported_and_leave_no_cell(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, num: int, shape: tuple[int, ...], **options: Any) -> Iterator[torch.Tensor]:
        yield torch.full((num, *shape), torch.nan)

    monkeypatch.setattr(atdiff.pipelines.trained, "iter_generate", broken)
    out = tmp_path / "cells.json"
    assert main(["evaluate", str(finished[1] / "seed-0" / "at"), "--steps", "2", "--num", "8", "--out", str(out)]) == 2
    assert "non-finite" in capsys.readouterr().err
    assert not out.exists()


def test_table_is_printed_without_an_output_file(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", str(finished[1] / "seed-0" / "at"), "--steps", "2", "--num", "16"]
    assert main([*words, "--out", "cells.json"]) == 0
    *table, kept = capsys.readouterr().out.splitlines()
    assert kept == "1 cell in cells.json"
    assert "16 samples per seed" in table[-1]
    assert "features of digits-classifier" in table[-1]
    Path("cells.json").unlink()
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [*table, "1 cell not saved; use --out FILE.json to save them"]
    assert not list(tmp_path.iterdir())


def test_suggested_fix_for_other_image_sizes_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A 16-pixel greyscale pipeline against larger colour photos; the oracle is the same images saved in that form."""
    monkeypatch.chdir(tmp_path)
    network = small_unet(8, 8)
    network.register_to_config(sample_size=16)
    save_pipeline(tmp_path / "theirs", network, DDPMScheduler())
    rng = np.random.default_rng(0)
    for folder in ("pictures", "small"):
        (tmp_path / folder).mkdir()
    for i in range(6):
        picture = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
        picture.save(tmp_path / "pictures" / f"{i}.png")
        grey = ImageOps.fit(picture.convert("L"), (16, 16), Image.Resampling.BICUBIC)
        grey.save(tmp_path / "small" / f"{i}.png")

    def evaluated(data: str, out: str, *words: str) -> int:
        fixed = ["--steps", "2", "--num", "6", "--metrics", "sliced_wasserstein"]
        return main(["evaluate", "theirs", "--data", data, *fixed, *words, "--out", out])

    assert evaluated("pictures", "cells.json") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    remedy = re.search(r"read them with ((?:--[\w-]+ \d+ ?)+)", error)
    assert remedy is not None, error
    assert remedy[1].split() == ["--image-size", "16", "--channels", "1"]
    assert evaluated("pictures", "cells.json", *remedy[1].split()) == 0
    assert evaluated("pictures", "named.json", "--data.image_size", "16", "--data.channels", "1") == 0
    assert evaluated("small", "small.json") == 0
    cells, named, small = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("cells", "named", "small"))
    assert cells[0]["metrics"] == named[0]["metrics"] == small[0]["metrics"]
    assert cells[0]["reference"] == "pictures (image_size 16, channels 1)"
