"""The default feature network for the images, and the notice before a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.metrics.features import extractors
from atdiff.study.extractor import choose_extractor, extractor_for


@pytest.mark.parametrize(
    ("name", "image_size", "network"),
    [
        ("digits", None, "digits-classifier"),
        ("digits", 8, "digits-classifier"),
        ("digits", 16, "label-classifier"),
        ("uoft-cs/cifar10", None, "cifar-resnet56"),
        ("uoft-cs/cifar10", 16, "inception-v3-compat"),
        ("uoft-cs/cifar100", None, "inception-v3-compat"),
        ("ylecun/mnist", 14, "label-classifier"),
        ("zalando-datasets/fashion-mnist", None, "label-classifier"),
        ("photos", None, "inception-v3-compat"),
        ("idx", None, "label-classifier"),
        ("batches", None, "cifar-resnet56"),
    ],
)
def test_default_extractor_depends_on_the_images(
    name: str, image_size: int | None, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, file in (("photos", "1.png"), ("idx", "train-images-idx3-ubyte"), ("batches", "test_batch.bin")):
        Path(folder).mkdir()
        (Path(folder) / file).touch()
    assert extractor_for(name, image_size) == network


def _run(folder: Path, **data: object) -> str:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return str(folder)


def test_default_extractor_follows_training_or_given_data(tmp_path: Path) -> None:
    digits = _run(tmp_path / "a", name="digits")
    large = _run(tmp_path / "b", name="digits", image_size=16)
    fid = ("fid", "prc")
    assert choose_extractor([digits], fid, None, AS_TRAINED) == "digits-classifier"
    assert choose_extractor([large], fid, None, AS_TRAINED) == "label-classifier"
    assert choose_extractor([digits], fid, None, DataOptions(image_size=16)) == "label-classifier"
    assert choose_extractor([digits], fid, "ylecun/mnist", AS_TRAINED) == "label-classifier"
    with pytest.raises(UserError, match=r"digits-classifier for \S+, label-classifier for .* with --extractor"):
        choose_extractor([digits, large], fid, None, AS_TRAINED)
    # If no metric uses features, runs that disagree are not rejected.
    assert choose_extractor([digits, large], ("sliced_wasserstein",), None, AS_TRAINED) == "digits-classifier"


@pytest.mark.parametrize("command", ["evaluate", "mismatch"])
def test_downloads_are_announced_with_alternatives(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("atdiff.study.preflight.check_weights", lambda name: None)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    said = ""

    def no_network(name: str, *rest: object, **options: object) -> None:
        nonlocal said
        said = capsys.readouterr().err  # before the download
        raise OSError("no network")

    monkeypatch.setattr(extractors, "extractor_class", _Stub(extractors.extractor_class, no_network))
    run = str(tmp_path / "run")
    words = ["--data", str(tmp_path / "photos"), "--training.passes", "2", "--training.batch_size", "2", "--out", run]
    assert main(["train", "quickstart", *words]) == 0
    capsys.readouterr()
    assert main([command, run, "--num", "4", "--steps", "2", "--out", str(tmp_path / "found.json")]) == 2
    assert "inception-v3-compat downloads 96 MB from https://github.com/toshas/torch-fidelity" in said
    assert "--weights inception-v3-compat=FILE" in said
    assert "--extractor label-classifier" in said


class _Stub:
    """Finds an extractor's class, but fails to instantiate it."""

    def __init__(self, find: object, make: object) -> None:
        self.find, self.make = find, make

    def __call__(self, name: str) -> object:
        found = self.find(name)  # type: ignore[operator]
        made = type(found.__name__, (found,), {})
        made.__new__ = lambda cls, *rest, **options: self.make(*rest, **options)  # type: ignore[method-assign]
        return made
