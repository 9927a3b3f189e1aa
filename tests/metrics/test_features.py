from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_clip import CLIPVisual

from atdiff.core.errors import UserError
from atdiff.data import load_data
from atdiff.metrics.features import clip as clip_features
from atdiff.metrics.features import labels as label_features
from atdiff.metrics.features.extractors import extract, make_extractor
from atdiff.system.files import cache_folder


def classifier_files() -> list[Path]:
    return list(cache_folder().glob("digits-classifier-*"))


def test_classifier_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_extractor("digits-classifier")
    assert [file.suffix for file in classifier_files()] == [".safetensors"], "one file, and nothing left aside"
    monkeypatch.setattr(label_features, "train_classifier", None)
    again = make_extractor("digits-classifier")
    x = load_data("digits", split="test").images
    assert torch.equal(extract(x, again)["64"], extract(x, first)["64"])


def test_classifier_is_accurate_on_the_test_split() -> None:
    test = load_data("digits", split="test")
    found = extract(test.images, make_extractor("digits-classifier"))
    assert found["64"].shape == (297, 64)
    assert found["logits"].shape == (297, 10)
    assert found["64"].dtype == torch.float64
    assert (found["logits"].argmax(1) == test.labels).double().mean() > 0.96


def test_training_is_deterministic_and_keyed_by_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(label_features.DIGITS_RECIPE, "epochs", 2)
    states = []
    for folder in ("a", "b"):
        monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / folder))
        torch.manual_seed(len(states))
        before = torch.get_rng_state()
        make_extractor("digits-classifier")
        assert torch.equal(torch.get_rng_state(), before)
        states.append(load_file(next((tmp_path / folder).iterdir())))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    monkeypatch.setitem(label_features.DIGITS_RECIPE, "seed", 1)
    make_extractor("digits-classifier")
    assert len(list((tmp_path / "b").iterdir())) == 2


def test_features_do_not_depend_on_the_batch_size() -> None:
    extractor, data = make_extractor("digits-classifier"), load_data("digits")
    one, many = (extract(data.images[:50], extractor, batch_size=b)["64"] for b in (1, 50))
    torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)


def test_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(label_features, "train_classifier", lambda *_: torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"cannot be written .* ATDIFF_CACHE"):
        make_extractor("digits-classifier")


def test_classifier_weights_are_loaded_from_a_file(tmp_path: Path) -> None:
    trained = make_extractor("digits-classifier")
    (cached,) = classifier_files()
    copy = tmp_path / "w.safetensors"
    copy.write_bytes(cached.read_bytes())
    x = load_data("digits", split="test").images
    given = make_extractor("digits-classifier", weights=copy)
    assert torch.equal(extract(x, given)["64"], extract(x, trained)["64"])
    copy.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as the weights of a digits-classifier"):
        make_extractor("digits-classifier", weights=copy)


def test_unknown_extractor_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown feature extractor 'inception': did you mean 'inception-v3-compat'"):
        make_extractor("inception")


def test_inception_offline_says_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", fail)
    with pytest.raises(UserError) as caught:
        make_extractor("inception-v3-compat")
    assert "cannot be downloaded (<urlopen error no network>)" in str(caught.value)
    assert "weights-inception-2015-12-05-6726825d.pth" in str(caught.value)


def test_invalid_inception_weights_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth of inception-v3-compat do not exist"):
        make_extractor("inception-v3-compat", weights=tmp_path / "absent.pth")
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"bad\.pth cannot be read as weights"):
        make_extractor("inception-v3-compat", weights=tmp_path / "bad.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not contain the weights"):
        make_extractor("inception-v3-compat", weights=tmp_path / "other.pth")


def test_weights_that_run_code_are_rejected(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        make_extractor("inception-v3-compat", weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_label_classifier_is_made_by_name(tmp_path: Path) -> None:
    from atdiff.metrics.features.labels import label_classifier_weights

    digits = load_data("digits", split="test")
    with pytest.raises(UserError, match="label-classifier is trained on labelled images: give them as data"):
        make_extractor("label-classifier")
    trained = make_extractor("label-classifier", data=digits)
    given = make_extractor("label-classifier", weights=label_classifier_weights(digits))
    assert torch.equal(extract(digits.images, trained)["64"], extract(digits.images, given)["64"])
    with pytest.raises(UserError, match=r"absent\.safetensors of label-classifier do not exist"):
        make_extractor("label-classifier", weights=tmp_path / "absent.safetensors")


def dinov2_tensors(width: int, grid: int, patch: int = 2, blocks: int = 2) -> dict[str, Tensor]:
    """Return random weights under the published names."""
    shapes = {
        "cls_token": (1, 1, width),
        "mask_token": (1, width),
        "pos_embed": (1, grid * grid + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(blocks):
        shapes |= {
            f"blocks.{i}.{name}": shape
            for name, shape in {
                "norm1.weight": (width,),
                "norm1.bias": (width,),
                "attn.qkv.weight": (3 * width, width),
                "attn.qkv.bias": (3 * width,),
                "attn.proj.weight": (width, width),
                "attn.proj.bias": (width,),
                "ls1.gamma": (width,),
                "norm2.weight": (width,),
                "norm2.bias": (width,),
                "mlp.fc1.weight": (4 * width, width),
                "mlp.fc1.bias": (4 * width,),
                "mlp.fc2.weight": (width, 4 * width),
                "mlp.fc2.bias": (width,),
                "ls2.gamma": (width,),
            }.items()
        }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def dinov2_forward(tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Run the published network, reimplemented from its paper and weight names."""
    p, f = tensors, nn.functional
    width = p["cls_token"].shape[-1]
    x = f.conv2d(pixels, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=2)
    tokens = x.shape[-1]
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    old = math.isqrt(p["pos_embed"].shape[1] - 1)
    grid = p["pos_embed"][:, 1:].reshape(1, old, old, width).permute(0, 3, 1, 2)
    if old != tokens:
        grid = f.interpolate(grid, scale_factor=((tokens + 0.1) / old,) * 2, mode="bicubic")
    x = x + torch.cat([p["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, width)], 1)

    def norm(x: Tensor, name: str) -> Tensor:
        return f.layer_norm(x, (width,), p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    for i in range(2):
        block = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (t.reshape(*t.shape[:2], width // 64, 64).transpose(1, 2) for t in (q, k, v))
        attended = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + p[f"{block}.ls1.gamma"] * linear(attended, f"{block}.attn.proj")
        hidden = f.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + p[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


@pytest.mark.parametrize("grid", [16, 37])
def test_dinov2_matches_a_reimplementation(grid: int, tmp_path: Path) -> None:
    """A narrow network with patches of 2 pixels, hence 32 x 32 images instead of 224 x 224."""
    tensors = dinov2_tensors(128, grid)
    torch.save(tensors, tmp_path / "w.pth")
    extractor = make_extractor("dinov2-vit-l-14", weights=tmp_path / "w.pth")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(extractor.model(pixels), dinov2_forward(tensors, pixels), rtol=1e-4, atol=1e-4)


def test_dinov2_normalises_images_like_torch_fidelity(tmp_path: Path) -> None:
    torch.save(dinov2_tensors(64, 16, patch=14), tmp_path / "w.pth")
    extractor = make_extractor("dinov2-vit-l-14", weights=tmp_path / "w.pth")
    images = torch.randint(256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = extractor.model((images / 255 - mean) / std)
    found = extract(images, extractor)["dinov2"]
    assert found.shape == (2, 64)
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)


def test_clip_is_loaded_from_local_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    oracle = CLIPVisual(16, 64, 2, 64, 32)
    tensors = {f"visual.{name}": value for name, value in oracle.visual.state_dict().items()}
    tensors["text_projection"] = torch.zeros(8, 16)
    tensors["logit_scale"] = torch.zeros(())
    half = {name: value.half().float() for name, value in tensors.items()}  # as published
    save_file({name: value.contiguous() for name, value in half.items()}, tmp_path / "w.safetensors")
    torch.save(half, tmp_path / "w.pt")
    images = torch.randint(256, (2, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = [
        extract(images, make_extractor("clip-vit-b-32", weights=tmp_path / name))["clip"]
        for name in ("w.safetensors", "w.pt")
    ]
    assert torch.equal(*found)
    assert found[0].shape == (2, 16)
    extractor = make_extractor("clip-vit-b-32", weights=tmp_path / "w.pt")
    oracle.load_state_dict({name: value for name, value in half.items() if name.startswith("visual.")})
    seen: list[Tensor] = []
    handle = extractor.model.visual.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    extract(images, extractor)
    handle.remove()
    torch.testing.assert_close(found[0], oracle.eval().visual(seen[0]).detach().double(), rtol=1e-4, atol=1e-4)


def test_torchscript_is_opened_only_if_it_is_the_published_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(UserError, match=r"ViT-B-32\.pt cannot be read as weights: expected the file of https"):
        make_extractor("clip-vit-b-32", weights=path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(clip_features.MODEL_METADATA, "clip-vit-b-32", {"hash": digest, "filename": "x"})
    with pytest.raises(UserError, match="does not contain the weights of clip-vit-b-32"):
        make_extractor("clip-vit-b-32", weights=path)


@pytest.mark.parametrize("name", ["dinov2-vit-l-14", "clip-vit-b-32", "inception-v3-spatial"])
def test_invalid_weights_are_rejected(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"absent of {name} do not exist"):
        make_extractor(name, weights=tmp_path / "absent")
    (tmp_path / "bad").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="bad cannot be read as weights: expected the file of https"):
        make_extractor(name, weights=tmp_path / "bad")
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(UserError, match="list contains no state dict"):
        make_extractor(name, weights=tmp_path / "list")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(UserError, match=f"other does not contain the weights of {name}"):
        make_extractor(name, weights=tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "loader", "file"),
    [
        ("dinov2-vit-l-14", "torch.hub.load_state_dict_from_url", "dinov2_vitl14_pretrain.pth"),
        ("clip-vit-b-32", "torch_fidelity.feature_extractor_clip.load_state_dict_from_url", "ViT-B-32.pt"),
    ],
)
def test_offline_error_says_what_to_download(
    name: str, loader: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(loader, fail)
    with pytest.raises(UserError) as caught:
        make_extractor(name)
    assert f"the weights of {name} cannot be downloaded (<urlopen error no network>)" in str(caught.value)
    assert file in str(caught.value)
