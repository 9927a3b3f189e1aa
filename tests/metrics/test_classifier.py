"""The classifier of labelled images, as a feature extractor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data import ImageData, load_data
from atdiff.metrics.features import labels
from atdiff.metrics.features.extractors import extract, make_extractor
from atdiff.metrics.features.labels import LABEL_CLASSIFIER, LabelClassifier, label_classifier_weights

MNIST = str(Path(__file__).parent.parent / "data" / "mnist10k.npz")


@pytest.fixture(scope="module")
def mnist() -> tuple[ImageData, ImageData]:
    """Return training and held-out images, few enough for training to take seconds."""
    data = load_data(MNIST)
    assert data.labels is not None
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:2500], order[2500:4500]
    return (
        ImageData(data.images[train], data.labels[train], "mnist"),
        ImageData(data.images[held_out], data.labels[held_out], "held out"),
    )


@pytest.fixture(scope="module")
def weights(mnist: tuple[ImageData, ImageData]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(labels.RECIPE, "min_updates", 1)  # twelve epochs are enough for the test, and faster
        return label_classifier_weights(mnist[0])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Train for three updates, with a separate cache."""
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    for key, value in {"epochs": 1, "min_updates": 3, "batch": 8}.items():
        monkeypatch.setitem(labels.RECIPE, key, value)


def images_of(*shape: int, classes: int = 3, seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return ImageData(images, torch.arange(len(images)) % classes, "random images")


def opened(weights: Path) -> LabelClassifier:
    return LabelClassifier(LABEL_CLASSIFIER, ["64", "logits"], str(weights))


@torch.no_grad()
def test_generalises_to_held_out_digits(mnist: tuple[ImageData, ImageData], weights: Path) -> None:
    held_out = mnist[1]
    found = opened(weights)(held_out.images)[1].argmax(1)
    # 97.7 % after training on 9,000 images; logistic regression on the pixels reaches 90 % with these 2,500.
    assert (found == held_out.labels).float().mean() > 0.95


@torch.no_grad()
def test_features_do_not_depend_on_the_batch(mnist: tuple[ImageData, ImageData], weights: Path) -> None:
    network, images = opened(weights), mnist[1].images[:70]
    whole = network(images)
    for features, alone in zip(whole, zip(*(network(image[None]) for image in images), strict=True), strict=True):
        torch.testing.assert_close(features, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_make_extractor_accepts_data_or_weights(mnist: tuple[ImageData, ImageData], weights: Path) -> None:
    images = mnist[1].images[:10]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(labels.RECIPE, "min_updates", 1)  # as in the fixture
        by_data = extract(images, make_extractor(LABEL_CLASSIFIER, data=mnist[0]))
    by_file = extract(images, make_extractor(LABEL_CLASSIFIER, weights=weights))
    assert {name: value.shape for name, value in by_data.items()} == {"64": (10, 64), "logits": (10, 10)}
    for name, value in by_data.items():
        assert torch.equal(value, by_file[name])
    torch.testing.assert_close(by_data["logits"], opened(weights)(images)[1].double().detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 16, 16), (3, 20, 13), (1, 28, 28), (3, 64, 64)])
def test_any_size_works_in_grey_and_colour(shape: tuple[int, int, int]) -> None:
    data = images_of(10, *shape)
    path = label_classifier_weights(data)
    network = opened(path)
    features, logits = network(data.images)
    assert (features.shape, logits.shape) == ((10, 64), (10, 3))
    assert network.image_shape == shape
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"shape": str([*shape, 3])}
    with pytest.raises(UserError, match=r"label-classifier was given torch\.uint8 images of shape"):
        network(data.images[..., :0])


@pytest.mark.usefixtures("quick")
def test_training_is_deterministic_cached_and_keeps_the_rng_state(monkeypatch: pytest.MonkeyPatch) -> None:
    data = images_of(20, 1, 9, 9)
    before = torch.get_rng_state()
    path = label_classifier_weights(data)
    assert torch.equal(torch.get_rng_state(), before)
    content = path.read_bytes()
    path.unlink()
    torch.manual_seed(1)
    assert label_classifier_weights(data) == path
    assert path.read_bytes() == content

    def never(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(labels, "train_classifier", never)
    assert label_classifier_weights(data) == path
    assert data.labels is not None
    pixel = data.images.clone()
    pixel[3, 0, 2, 1] ^= 1
    for other in (
        ImageData(data.images, data.labels.roll(1), "other labels"),
        ImageData(pixel, data.labels, "another pixel"),
        ImageData(data.images.reshape(20, 1, 3, 27), data.labels, "another shape"),
    ):
        with pytest.raises(AssertionError, match="trained again"):
            label_classifier_weights(other)


@pytest.mark.usefixtures("quick")
def test_long_training_shows_progress_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    label_classifier_weights(images_of(20, 1, 8, 8))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(labels, "SHOW_AFTER", -1.0)
    label_classifier_weights(images_of(20, 1, 8, 8, seed=1))
    captured = capsys.readouterr()
    assert "training the label-classifier" in captured.err
    assert captured.out == ""


GREY = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GREY, None, "faces has no labels to train the label-classifier on"),
        (GREY, torch.zeros(4, dtype=torch.long), "faces has 1 class: the label-classifier needs 2 or more"),
        (GREY.float(), torch.arange(4), "faces contains torch.float32 values"),
    ],
)
def test_unsuitable_data_are_rejected(images: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        label_classifier_weights(ImageData(images, labels, "faces"))


def test_invalid_weights_are_rejected(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(UserError, match="label-classifier has no weights"):
        LabelClassifier(LABEL_CLASSIFIER, ["64"])
    bad = tmp_path / "bad.safetensors"
    whole = weights.read_bytes()
    for content in (b"nonsense", whole[: len(whole) // 2]):
        bad.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.safetensors cannot be read as the weights of a label-classifier"):
            opened(bad)
    save_file({"x": torch.zeros(1)}, bad)
    with pytest.raises(UserError, match=r"bad\.safetensors cannot be read as the weights of a label-classifier"):
        opened(bad)


@pytest.mark.usefixtures("quick")
def test_unwritable_cache_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written.*set by ATDIFF_CACHE"):
        label_classifier_weights(images_of(8, 1, 8, 8))


def test_message_about_damaged_weights_fits_their_origin(quick: None, tmp_path: Path) -> None:
    data = images_of(8, 1, 8, 8)
    cached = label_classifier_weights(data)
    cached.write_bytes(b"damaged")
    with pytest.raises(UserError, match="delete it to train them again"):
        make_extractor(LABEL_CLASSIFIER, data=data)
    mine = cached.rename(tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="give another file as --weights"):
        make_extractor(LABEL_CLASSIFIER, weights=mine, data=data)
