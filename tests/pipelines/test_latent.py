# ruff: noqa: F811  (arguments that are called as the imported fixtures)
from __future__ import annotations

import copy
import io
import json
import shutil
import sys
import tarfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, LCMScheduler, UNet2DModel
from latent_pipelines import IMAGE_SIZE, LATENT_SIZE, sd_folder, sdxl_folder, tiny_sd  # noqa: F401
from PIL import Image
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.data.captions import load_captioned, stream_captioned
from atdiff.data.images import Decoding, UnreadableImages
from atdiff.models.call import unet_kwargs
from atdiff.objectives.guided import guidance_embedding
from atdiff.pipelines.cache import LatentData, latent_data
from atdiff.pipelines.latent_model import (
    LatentPipeline,
    load_latent_pipeline,
    make_student,
    save_student,
)
from atdiff.pipelines.lora import TARGET_MODULES, add_lora, load_lora, load_lora_state, lora_state, save_lora

PROMPTS = ["a cat", "the dog on 2"]


def is_sdxl(latent: LatentPipeline) -> bool:
    return type(latent.pipeline).__name__ == "StableDiffusionXLPipeline"


@pytest.fixture(scope="session")
def sd(sd_folder: Path) -> LatentPipeline:
    return load_latent_pipeline(str(sd_folder))


@pytest.fixture(scope="session")
def sdxl(sdxl_folder: Path) -> LatentPipeline:
    return load_latent_pipeline(str(sdxl_folder))


@pytest.fixture(params=["sd", "sdxl"])
def latent(request: pytest.FixtureRequest) -> LatentPipeline:
    """A pipeline of each class."""
    found: LatentPipeline = request.getfixturevalue(request.param)
    return found


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(num: int, channels: int = 3, size: int = IMAGE_SIZE, seed: int = 0) -> Tensor:
    shape = (num, channels, size, size)
    return torch.randint(0, 256, shape, generator=_seeded(seed), dtype=torch.uint8)


def _lcm(latent: LatentPipeline) -> Any:
    return LCMScheduler.from_config(latent.scheduler.config)


def _open(folder: Path) -> Any:
    """Open a folder as a user of plain diffusers would."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _generate(pipeline: Any, steps: int = 4, guidance: float = 1.0, output: str = "latent") -> Tensor:
    images: Tensor = pipeline(
        PROMPTS[0], num_inference_steps=steps, guidance_scale=guidance, generator=_seeded(), output_type=output
    ).images
    return images


# ---- pipeline


def test_pipelines_report_their_shapes(latent: LatentPipeline) -> None:
    assert latent.latent_shape == (4, LATENT_SIZE, LATENT_SIZE)
    assert (latent.image_size, latent.image_channels) == (IMAGE_SIZE, 3)
    assert latent.prediction_type == "epsilon"
    assert len(latent.text_encoders) == 1 + is_sdxl(latent)
    assert latent.scheduler.config.num_train_timesteps == 1000


def test_encoding_matches_the_autoencoder(latent: LatentPipeline) -> None:
    images = _images(3)
    found = latent.encode_images(images, _seeded(5))
    pixels = latent.pipeline.image_processor.preprocess(images.float() / 255)
    expected = (
        latent.vae.encode(pixels).latent_dist.sample(_seeded(5)) * {False: 0.18215, True: 0.13025}[is_sdxl(latent)]
    )
    assert found.dtype == torch.float32
    assert found.shape == (3, *latent.latent_shape)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_decoding_matches_the_pipeline(latent: LatentPipeline) -> None:
    latent.pipeline.set_progress_bar_config(disable=True)
    pictures = latent.decode(_generate(latent.pipeline, 2))
    assert pictures.abs().max() <= 1
    torch.testing.assert_close(pictures / 2 + 0.5, _generate(latent.pipeline, 2, output="pt"), rtol=1e-4, atol=1e-5)


def test_sdxl_latent_statistics_match_its_pipeline(sdxl: LatentPipeline) -> None:
    pipeline = copy.copy(sdxl.pipeline)
    vae = copy.deepcopy(sdxl.vae)
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    pipeline.register_modules(vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    latent = LatentPipeline(pipeline, "x")
    torch.testing.assert_close(
        latent.decode(_generate(pipeline, 2)) / 2 + 0.5, _generate(pipeline, 2, output="pt"), rtol=1e-4, atol=1e-5
    )
    raw = vae.encode(_images(1).float() / 127.5 - 1).latent_dist.sample(_seeded())
    mean, std = (torch.tensor(vae.config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    expected = (raw - mean) * vae.config.scaling_factor / std
    torch.testing.assert_close(latent.encode_images(_images(1), _seeded()), expected.detach(), rtol=1e-4, atol=1e-5)


def test_conditions_match_the_unet_inputs_of_the_pipeline(latent: LatentPipeline) -> None:
    calls: list[dict[str, Any]] = []
    hook = latent.network.register_forward_pre_hook(lambda _m, _args, kwargs: calls.append(kwargs), with_kwargs=True)
    latent.pipeline.set_progress_bar_config(disable=True)
    latent.pipeline(PROMPTS, num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    hook.remove()

    null = {key: value.expand(2, *value.shape[1:]) for key, value in latent.encode_null().items()}
    ours = {key: torch.cat([null[key], value]) for key, value in latent.encode_prompts(PROMPTS).items()}
    kwargs = unet_kwargs(ours)
    assert set(kwargs) == ({"encoder_hidden_states", "added_cond_kwargs"} if is_sdxl(latent) else {*ours})
    theirs = {"encoder_hidden_states": calls[0]["encoder_hidden_states"], **(calls[0]["added_cond_kwargs"] or {})}
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        assert ours[key].dtype == torch.float32
        torch.testing.assert_close(ours[key], value, msg=key)


def test_extra_conditions_pass_through() -> None:
    cond, labels, size = torch.zeros(2, 8), torch.zeros(2), torch.zeros(2, 6)
    kwargs = unet_kwargs({"timestep_cond": cond, "class_labels": labels, "time_ids": size})
    assert kwargs == {"timestep_cond": cond, "class_labels": labels, "added_cond_kwargs": {"time_ids": size}}


@pytest.mark.parametrize("dim", [256, 33])
def test_guidance_embedding_matches_diffusers(sd: LatentPipeline, dim: int) -> None:
    w = torch.tensor([0.0, 2.0, 6.5, 14.0])
    expected = sd.pipeline.get_guidance_scale_embedding(w, embedding_dim=dim)
    torch.testing.assert_close(guidance_embedding(w, dim), expected, rtol=1e-5, atol=2e-3)  # angles are up to 14,000
    torch.testing.assert_close(guidance_embedding(w[:1], dim), expected[:1])


# ---- student


def test_student_starts_as_the_teacher_at_any_guidance(latent: LatentPipeline) -> None:
    before = torch.random.get_rng_state()
    student = make_student(latent.network)
    assert torch.equal(before, torch.random.get_rng_state())
    assert student.config.time_cond_proj_dim == 256
    assert latent.network.config.time_cond_proj_dim is None
    assert all(p.requires_grad for p in student.parameters())
    x, t = torch.randn(2, *latent.latent_shape, generator=_seeded()), torch.tensor([999, 20])
    conditions = latent.encode_prompts(PROMPTS)
    with torch.no_grad():
        expected = latent.network(x, t, **unet_kwargs(conditions)).sample
        for w in (0.0, 7.0):
            timestep_cond = guidance_embedding(torch.full((2,), w), 256)
            found = student(x, t, **unet_kwargs({**conditions, "timestep_cond": timestep_cond})).sample
            torch.testing.assert_close(found, expected)


def test_student_learns_the_guidance(sd: LatentPipeline) -> None:
    student = make_student(sd.network, guidance_dim=16)
    conditions = {**sd.encode_prompts(PROMPTS), "timestep_cond": guidance_embedding(torch.tensor([1.0, 7.0]), 16)}
    student(torch.randn(2, *sd.latent_shape), torch.tensor([5, 6]), **unet_kwargs(conditions)).sample.sum().backward()
    assert student.time_embedding.cond_proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in sd.network.parameters())


def test_student_without_guidance_is_an_independent_copy(sd: LatentPipeline) -> None:
    teacher = copy.deepcopy(sd.network).requires_grad_(False)
    student = make_student(teacher, guidance_dim=None)
    assert student.config.time_cond_proj_dim is None
    assert all(torch.equal(p, q) and q.requires_grad for p, q in zip(teacher.parameters(), student.parameters()))  # noqa: B905
    with torch.no_grad():
        next(student.parameters()).add_(1.0)
    assert torch.equal(next(teacher.parameters()), next(sd.network.parameters()))


def test_guidance_embedding_of_the_teacher_is_kept(sd: LatentPipeline) -> None:
    teacher = make_student(sd.network, guidance_dim=16)
    torch.nn.init.ones_(teacher.time_embedding.cond_proj.weight)
    student = make_student(teacher, guidance_dim=256)
    assert student.config.time_cond_proj_dim == 16
    assert torch.equal(student.time_embedding.cond_proj.weight, teacher.time_embedding.cond_proj.weight)


def test_half_precision_teacher_gives_a_float32_student(sd_folder: Path) -> None:
    latent = load_latent_pipeline(str(sd_folder), dtype=torch.bfloat16)
    assert latent.network.dtype == torch.bfloat16
    assert {latent.vae.dtype, latent.text_encoders[0].dtype} == {torch.float32}
    assert make_student(latent.network).dtype == torch.float32


def test_saved_student_opens_in_plain_diffusers(latent: LatentPipeline, tmp_path: Path) -> None:
    student = make_student(latent.network)
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.1, generator=_seeded())
    parts = dict(latent.pipeline.components)
    save_student(tmp_path / "student", latent, student, _lcm(latent))
    assert latent.pipeline.components == parts

    opened = _open(tmp_path / "student")
    assert type(opened) is type(latent.pipeline)
    assert isinstance(opened.scheduler, LCMScheduler)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert all(torch.equal(value, opened.unet.state_dict()[key]) for key, value in student.state_dict().items())
    conds: list[Tensor] = []
    opened.unet.register_forward_pre_hook(
        lambda _m, _a, kwargs: conds.append(kwargs["timestep_cond"]), with_kwargs=True
    )
    picture = _generate(opened, 4, guidance=8.0, output="pt")
    assert picture.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.isfinite(picture).all()
    assert len(conds) == 4
    torch.testing.assert_close(conds[0], guidance_embedding(torch.tensor([7.0]), 256), rtol=1e-5, atol=2e-3)


# ---- loading errors


def test_training_folder_loads_its_pipeline(sd_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="no finished pipeline yet"):
        load_latent_pipeline(str(tmp_path))
    shutil.copytree(sd_folder, tmp_path / "pipeline")
    assert load_latent_pipeline(str(tmp_path)).latent_shape == (4, LATENT_SIZE, LATENT_SIZE)


def test_unrelated_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a training folder .* nor a pipeline"):
        load_latent_pipeline(str(tmp_path))


def test_failed_download_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not be loaded as a folder or downloaded .* give the path"):
        load_latent_pipeline(str(tmp_path / "nothing"))


def test_broken_pipeline_folder_is_reported(sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "x")
    (tmp_path / "x" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="could not be loaded"):
        load_latent_pipeline(str(tmp_path / "x"))


def test_other_pipelines_are_rejected_by_name(tmp_path: Path) -> None:
    unet = UNet2DModel(
        8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    pipeline: Any = DDPMPipeline(unet=unet, scheduler=DDPMScheduler())
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a DDPMPipeline: expected a StableDiffusionPipeline or a StableDiffusionXL"):
        load_latent_pipeline(str(tmp_path))


@pytest.mark.parametrize("null", [True, False])
def test_missing_text_encoder_is_reported(sd_folder: Path, tmp_path: Path, null: bool) -> None:
    folder = tmp_path / "x"
    shutil.copytree(sd_folder, folder)
    if null:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    else:
        shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match="has no text_encoder: expected a whole StableDiffusionPipeline"):
        load_latent_pipeline(str(folder))


def test_inpainting_unet_is_rejected(tmp_path: Path) -> None:
    tiny_sd(tmp_path / "x", unet={"in_channels": 9})
    with pytest.raises(UserError, match=r"takes latents \(9, 8, 8\).* with the autoencoder's 4 channels"):
        load_latent_pipeline(str(tmp_path / "x"))


def test_missing_transformers_is_reported(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'atdiff\[lcm\]'"):
        load_latent_pipeline(str(sd_folder))


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 64)])
def test_wrong_image_size_error_names_the_right_size(sd: LatentPipeline, channels: int, size: int) -> None:
    with pytest.raises(UserError, match=rf"is {channels}x{size}x{size} .* image_size 64 and channels 3"):
        sd.encode_images(_images(1, channels, size))


def test_greyscale_pipelines_take_greyscale_images(tmp_path: Path) -> None:
    tiny_sd(tmp_path / "x", vae={"in_channels": 1, "out_channels": 1})
    latent = load_latent_pipeline(str(tmp_path / "x"))
    assert latent.image_channels == 1
    assert latent.decode(latent.encode_images(_images(2, 1))).shape == (2, 1, IMAGE_SIZE, IMAGE_SIZE)


# ---- cache


class Pairs:
    """A stand-in for captioned images."""

    name = "pairs"
    unreadable = UnreadableImages()

    def __init__(self, images: Tensor, captions: list[str], broken_at: int | None = None) -> None:
        self.images, self.captions, self.broken_at, self.reads = images, captions, broken_at, 0

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        self.reads += 1
        for i, pair in enumerate(zip(self.images, self.captions, strict=True)):
            if i == self.broken_at:
                raise KeyboardInterrupt
            yield pair

    def fingerprint(self) -> str:
        return str(hash((self.images.numpy().tobytes(), *self.captions)))


CAPTIONS = ["a cat", "the dog", "a cat", "a dog", "the dog"]


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pairs:
    """Five images, and a cache of this test's own."""
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    return Pairs(_images(5), CAPTIONS)


def _encode(pairs: Any, latent: LatentPipeline, **options: Any) -> LatentData:
    return latent_data(pairs, latent, **{"batch_size": 2, "device": "cpu", "progress": False, **options})


def _folder(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache" / "latents").iterdir()
    return folder


def test_cached_latents_and_conditions_match_the_pipeline(latent: LatentPipeline, pairs: Pairs) -> None:
    data = _encode(pairs, latent, seed=3)
    assert (len(data), data.name, data.latents[0].shape) == (5, "pairs", (5, *latent.latent_shape))
    assert data.captions == ["a cat", "the dog", "a dog"]
    assert data.caption_ids.tolist() == [0, 1, 0, 2, 1]
    indices = torch.tensor([4, 0, 3])

    expected = latent.encode_images(pairs.images, _seeded(3)).half().float()[indices]
    x0 = data.x0(indices)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, expected, rtol=2**-10, atol=1e-4)  # the last bit of float16 depends on the batch
    assert torch.equal(x0, x0.half().float())

    wanted = latent.encode_prompts([CAPTIONS[i] for i in indices])
    conditions = data.conditions(indices)
    assert set(conditions) == set(wanted)
    for key, value in wanted.items():
        assert conditions[key].dtype == torch.float32
        torch.testing.assert_close(conditions[key], value, rtol=2**-10, atol=1e-4)
    null = data.null_conditions(4)
    assert set(null) == set(wanted)
    for key, value in latent.encode_null().items():
        torch.testing.assert_close(null[key], value.expand(4, *value.shape[1:]), rtol=2**-10, atol=1e-4)


def test_encoding_does_not_depend_on_the_batch_size(sd: LatentPipeline, pairs: Pairs, tmp_path: Path) -> None:
    small = _encode(pairs, sd, batch_size=1).x0(torch.arange(5))
    shutil.rmtree(tmp_path / "cache")
    large = _encode(pairs, sd, batch_size=5).x0(torch.arange(5))
    torch.testing.assert_close(small, large, rtol=2**-10, atol=1e-4)


def test_second_call_encodes_nothing(sd: LatentPipeline, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _encode(pairs, sd)
    assert pairs.reads == 1
    monkeypatch.setattr(LatentPipeline, "encode_images", None)
    monkeypatch.setattr(LatentPipeline, "encode_prompts", None)
    second = _encode(pairs, sd)
    assert pairs.reads == 1
    assert isinstance(second.latents[0], np.memmap)
    assert np.array_equal(first.latents[0], second.latents[0])
    assert second.captions == first.captions


def test_distinct_captions_are_encoded_once(sd: LatentPipeline, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = LatentPipeline.encode_prompts

    def counted(self: LatentPipeline, prompts: list[str]) -> dict[str, Tensor]:
        seen.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(LatentPipeline, "encode_prompts", counted)
    _encode(pairs, sd)
    assert seen == ["a cat", "the dog", "a dog"]


def test_cache_key_covers_images_captions_weights_settings_and_seed(
    sd: LatentPipeline, sdxl: LatentPipeline, pairs: Pairs, tmp_path: Path
) -> None:
    _encode(pairs, sd)
    other = LatentPipeline(copy.copy(sd.pipeline), "x")
    vae = copy.deepcopy(sd.vae)
    with torch.no_grad():
        vae.quant_conv.bias.add_(1.0)
    other.pipeline.register_modules(vae=vae)
    rescaled = LatentPipeline(copy.copy(sd.pipeline), "x")
    vae = copy.deepcopy(sd.vae)
    vae.register_to_config(scaling_factor=1.0)
    rescaled.pipeline.register_modules(vae=vae)
    _encode(Pairs(_images(5, seed=1), CAPTIONS), sd)
    _encode(Pairs(pairs.images, CAPTIONS[::-1]), sd)
    _encode(pairs, sd, seed=1)
    _encode(pairs, other)
    _encode(pairs, rescaled)
    _encode(pairs, sdxl)
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 7


def test_interrupted_encoding_leaves_nothing(sd: LatentPipeline, pairs: Pairs, tmp_path: Path) -> None:
    pairs.broken_at = 4
    with pytest.raises(KeyboardInterrupt):
        _encode(pairs, sd)
    assert list((tmp_path / "cache" / "latents").iterdir()) == []
    pairs.broken_at = None
    assert len(_encode(pairs, sd)) == 5


def _shard(path: Path, count: int) -> str:
    """Write a webdataset shard of images and captions; two consecutive images share a caption."""
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(_images(count)):
            stream = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "PNG")
            for name, content in ((f"{i:04}.png", stream.getvalue()), (f"{i:04}.txt", f"picture {i // 2}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_streamed_latents_match_listed_latents(
    sd: LatentPipeline, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = _shard(tmp_path / "a.tar", 5)
    listed = _encode(load_captioned(name, image_size=64), sd)
    streamed = _encode(stream_captioned(name, image_size=64), sd)
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 2
    assert np.array_equal(streamed.latents, listed.latents)
    assert np.array_equal(streamed.caption_ids, listed.caption_ids)
    assert (streamed.captions, streamed.fingerprint()) == (listed.captions, listed.fingerprint())
    for kind, rows in listed.table.items():
        assert np.array_equal(streamed.table[kind], rows)
    monkeypatch.setattr("atdiff.data.captions.decoded", lambda *_: pytest.fail("read again"))
    assert np.array_equal(_encode(stream_captioned(name, image_size=64), sd).latents, listed.latents)


def test_stream_holds_at_most_two_batches(
    sd: LatentPipeline, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch being filled, and the one encoded before it."""
    name, decode = _shard(tmp_path / "a.tar", 24), Decoding.__call__
    alive: set[int] = set()
    most = []

    def counted(self: Decoding, source: Any) -> Any:
        pixels = decode(self, source)
        alive.add(number := len(most))
        weakref.finalize(pixels, alive.discard, number)
        most.append(len(alive))
        return pixels

    monkeypatch.setattr(Decoding, "__call__", counted)
    assert len(_encode(stream_captioned(name, image_size=64), sd, batch_size=3)) == len(most) == 24
    assert 3 <= max(most) <= 7
    assert not alive


def test_damaged_shard_leaves_no_latents(sd: LatentPipeline, pairs: Pairs, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(2):
        _shard(tmp_path / "set" / f"{number}.tar", 3)
    damaged = tmp_path / "set" / "1.tar"
    damaged.write_bytes(damaged.read_bytes()[:-12_000])
    with pytest.raises(UserError, match=r"1\.tar cannot be read as an uncompressed \.tar file"):
        _encode(stream_captioned(str(tmp_path / "set"), image_size=64), sd)
    assert list((tmp_path / "cache" / "latents").iterdir()) == []
    _shard(damaged, 3)
    assert len(_encode(stream_captioned(str(tmp_path / "set"), image_size=64), sd)) == 6


@pytest.mark.parametrize(
    "file", ["latents.npy", "caption_ids.npy", "caption-encoder_hidden_states.npy", "captions.json", "manifest.json"]
)
def test_damaged_cache_is_reported_and_rebuilt(sd: LatentPipeline, pairs: Pairs, tmp_path: Path, file: str) -> None:
    expected = _encode(pairs, sd).x0(torch.arange(5))
    damaged = _folder(tmp_path) / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=r"is damaged, so the images of pairs are encoded again"):
        again = _encode(pairs, sd)
    assert torch.equal(again.x0(torch.arange(5)), expected)
    assert pairs.reads == 2
    damaged.unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        _encode(pairs, sd)
    _encode(pairs, sd)
    assert pairs.reads == 3


def test_encoding_errors_are_reported(sd: LatentPipeline, pairs: Pairs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch size for encoding is 0: expected 1 or more"):
        _encode(pairs, sd, batch_size=0)
    with pytest.raises(UserError, match="pairs has no images"):
        _encode(Pairs(_images(0), []), sd)
    with pytest.raises(UserError, match=r"image 0 of pairs is 3x32x32 .* image_size 64"):
        _encode(Pairs(_images(2, size=32), CAPTIONS[:2]), sd)
    assert not any((tmp_path / "cache" / "latents").iterdir())


def test_latents_beyond_float16_are_rejected(sd: LatentPipeline, pairs: Pairs) -> None:
    broken = LatentPipeline(copy.copy(sd.pipeline), "x")
    vae = copy.deepcopy(sd.vae)
    vae.register_to_config(scaling_factor=1e9)
    broken.pipeline.register_modules(vae=vae)
    with pytest.raises(UserError, match="the latents of pairs contain values outside the range of float16"):
        _encode(pairs, broken)


def test_unwritable_cache_is_reported(
    sd: LatentPipeline, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .* set by ATDIFF_CACHE"):
        _encode(pairs, sd)


def test_progress_goes_only_to_stderr(sd: LatentPipeline, pairs: Pairs, capfd: pytest.CaptureFixture[str]) -> None:
    _encode(pairs, sd, progress=True)
    assert capfd.readouterr().out == ""


# ---- LoRA


def _adapted_unet(latent: LatentPipeline, **options: Any) -> Any:
    """Return a U-Net whose adapters change its output."""
    unet = make_student(latent.network, guidance_dim=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        add_lora(unet, **{"rank": 4, **options})
    generator = _seeded(1)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=generator)
    return unet


def _predict(unet: Any, latent: LatentPipeline) -> Tensor:
    x, t = torch.randn(2, *latent.latent_shape, generator=_seeded()), torch.tensor([999, 20])
    with torch.no_grad():
        predicted: Tensor = unet(x, t, **unet_kwargs(latent.encode_prompts(PROMPTS))).sample
    return predicted


def test_only_adapters_are_trained_and_start_at_zero(latent: LatentPipeline) -> None:
    unet = make_student(latent.network, guidance_dim=None).to(torch.bfloat16)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    add_lora(unet, rank=4)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    for target in TARGET_MODULES:
        assert any(f".{target}.lora_A" in name for name in trained), target
    after = unet.state_dict()
    assert all(torch.equal(value, after.get(name, after.get(_inner(name)))) for name, value in before.items())
    unet.to(torch.float32)
    reference = make_student(latent.network, guidance_dim=None).to(torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(_predict(unet, latent), _predict(reference, latent))


def _inner(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    return f"{module}.base_layer.{kind}"


def test_only_adapters_receive_gradients(sd: LatentPipeline) -> None:
    unet = _adapted_unet(sd, target_modules=["to_q", "conv1"])
    x = torch.randn(1, *sd.latent_shape)
    unet(x, torch.tensor([7]), **unet_kwargs(sd.encode_prompts(PROMPTS[:1]))).sample.sum().backward()
    with_gradient = {name for name, p in unet.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in unet.named_parameters() if "lora_" in name}
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in with_gradient} == {"to_q", "conv1"}


def test_lora_state_round_trip_holds_only_adapters(sd: LatentPipeline) -> None:
    unet = _adapted_unet(sd)
    state = {name: value.clone() for name, value in lora_state(unet).items()}
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in unet.parameters() if p.requires_grad)
    other = make_student(sd.network, guidance_dim=None)
    add_lora(other, rank=4)
    load_lora_state(other, state)
    torch.testing.assert_close(_predict(other, sd), _predict(unet, sd))
    with pytest.raises(AssertionError):
        load_lora_state(other, dict(list(state.items())[1:]))


def test_alpha_defaults_to_the_rank_and_scales_adapters(sd: LatentPipeline) -> None:
    few = {"target_modules": ["to_q", "conv2"]}
    plain = _adapted_unet(sd, **few)
    assert torch.equal(_predict(plain, sd), _predict(_adapted_unet(sd, alpha=4.0, **few), sd))
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "lora_B" in name:
                weight.mul_(2.0)
    torch.testing.assert_close(_predict(_adapted_unet(sd, alpha=8.0, **few), sd), _predict(plain, sd))


def test_saved_adapters_match_in_plain_diffusers(latent: LatentPipeline, tmp_path: Path) -> None:
    unet = _adapted_unet(latent, alpha=12.0)
    save_lora(tmp_path / "lora", latent, unet, _lcm(latent))
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "kohya_lora_weights.safetensors",
        "pytorch_lora_weights.safetensors",
        "scheduler",
    ]

    pipeline = _open(Path(latent.source))
    without = _predict(pipeline.unet, latent)
    pipeline.load_lora_weights(tmp_path / "lora")
    expected = _predict(unet, latent)
    assert (expected - without).abs().max() > 0.05
    torch.testing.assert_close(_predict(pipeline.unet, latent), expected, rtol=1e-3, atol=1e-4)

    ours = load_latent_pipeline(latent.source)
    load_lora(ours, tmp_path / "lora")
    assert isinstance(ours.scheduler, LCMScheduler)
    torch.testing.assert_close(_predict(ours.network, latent), expected, rtol=1e-3, atol=1e-4)


def test_lora_errors_are_reported(sd: LatentPipeline, sdxl: LatentPipeline, tmp_path: Path) -> None:
    unet = make_student(sd.network, guidance_dim=None)
    with pytest.raises(UserError, match="rank is 0: expected 1 or more"):
        add_lora(unet, rank=0)
    with pytest.raises(UserError, match=r"alpha is 0\.0: expected a number above 0"):
        add_lora(unet, rank=4, alpha=0.0)
    with pytest.raises(UserError, match=r"dropout is 1\.0: expected 0 or more and less than 1"):
        add_lora(unet, rank=4, dropout=1.0)
    with pytest.raises(UserError, match=r"no layer matches the LoRA target 'to_quack': expected .*'to_k'"):
        add_lora(unet, rank=4, target_modules=["to_q", "to_quack"])
    with pytest.raises(UserError, match="list of LoRA target modules is empty"):
        add_lora(unet, rank=4, target_modules=[])
    assert all(p.requires_grad for p in unet.parameters())
    with pytest.raises(UserError, match="contains no LoRA weights: expected pytorch_lora_weights"):
        load_lora(sd, tmp_path)
    save_lora(tmp_path / "lora", sdxl, _adapted_unet(sdxl), _lcm(sdxl))
    with pytest.raises(UserError, match=r"cannot be loaded onto .*: give the pipeline that they were trained on"):
        load_lora(load_latent_pipeline(sd.source), tmp_path / "lora")


def test_missing_peft_is_reported(sd: LatentPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"LoRA needs the package peft: pip install 'atdiff\[lcm\]'"):
        add_lora(make_student(sd.network, guidance_dim=None), rank=4)
