"""Text-to-image runs give the images of the plain diffusers pipeline, and are evaluated like any others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.data import load_data, to_uint8
from atdiff.data.reading import DataOptions
from atdiff.measure.cells import EvaluationConfig, evaluate_runs
from atdiff.metrics.stream import Metrics
from atdiff.pipelines.model import load_denoiser, reference_data
from atdiff.pipelines.text_to_image import TextToImage
from atdiff.report.samples import sample_grids
from atdiff.sampling import image_generators, make_scheduler
from atdiff.sampling.corrections import EpsilonScaling

pytestmark = pytest.mark.filterwarnings("ignore:the Frechet distance of")

SIZE = 16
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a {word}" for word in WORDS)
OPTIONS: dict[str, Any] = {"sampler": "ddim", "steps": 3, "num": 5, "seed": 2}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a CLIP tokenizer with a vocabulary of letters."""
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=12)


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=16, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip


def autoencoder(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=4, norm_num_groups=4, block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def unet(**options: Any) -> UNet2DConditionModel:
    kinds: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(
        sample_size=SIZE // 2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        **{"cross_attention_dim": 16, **kinds, **options},
    )  # fmt: skip


def sd_scheduler() -> DDIMScheduler:
    """Return the scheduler of Stable Diffusion 1.5."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def stable_diffusion(folder: Path, *, channels: int = 1, **options: Any) -> Path:
    """Save a tiny Stable Diffusion pipeline with random weights."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "vae": autoencoder(channels),
        "text_encoder": CLIPTextModel(text_config()),
        "tokenizer": tokenizer(folder.parent / f"{folder.name}-tokenizer"),
        "unet": unet(**options),
        "scheduler": sd_scheduler(),
    }
    # Default random weights hardly react to the prompt; larger embeddings do.
    torch.nn.init.normal_(parts["text_encoder"].get_input_embeddings().weight, std=3.0)
    StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


def sdxl(folder: Path) -> Path:
    torch.manual_seed(0)
    words: Any = tokenizer(folder.parent / f"{folder.name}-tokenizer")
    networks = {
        "vae": autoencoder(3),
        "text_encoder": CLIPTextModel(text_config()),
        "text_encoder_2": CLIPTextModelWithProjection(text_config()),
        "unet": unet(
            cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
        ),
    }  # fmt: skip
    StableDiffusionXLPipeline(
        **networks, tokenizer=words, tokenizer_2=words, scheduler=sd_scheduler(), add_watermarker=False
    ).save_pretrained(folder)
    return folder


def training_folder(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    defaults = {"data": {"name": "digits", "image_size": SIZE, "captions": list(CAPTIONS)}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**defaults, **settings}))
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="module")
def trained(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training folder of digits with one caption per class."""
    folder = training_folder(tmp_path_factory.mktemp("trained") / "run", consistency={"sample_guidance": 3.0})
    shutil.copytree(pipeline, folder / "pipeline")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Digits at the image size of the pipeline, in a file with labels."""
    data = load_data("digits", image_size=SIZE)
    assert data.labels is not None
    np.savez(tmp_path / "photos.npz", images=data.images[:, 0].numpy(), labels=data.labels.numpy())
    return tmp_path / "photos.npz"


def load(run: Path, **changes: Any) -> TextToImage:
    denoiser = load_denoiser(str(run))
    assert isinstance(denoiser, TextToImage)
    return replace(denoiser, **changes)


def generate(denoiser: TextToImage, **options: Any) -> Tensor:
    return torch.cat(list(denoiser.samples(**{**OPTIONS, **options})))


def generate_with_diffusers(
    folder: Path, sampler: str, steps: int, seed: int, prompts: list[str], guidance: float
) -> Tensor:
    """Generate images with a plain pipeline from prompts, one at a time."""
    loader: Any = DiffusionPipeline
    pipe = loader.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    training, images = pipe.scheduler, []
    for i, prompt in enumerate(prompts):
        pipe.scheduler = make_scheduler(sampler, training, steps)
        images.append(
            pipe(
                prompt, num_inference_steps=steps, guidance_scale=guidance, output_type="pt",
                generator=image_generators(seed, [i]),
            ).images
        )  # fmt: skip
    return torch.cat(images) * 2 - 1


def test_label_accuracy_is_the_share_classified_as_requested() -> None:
    data = load_data("digits", image_size=SIZE)
    assert data.labels is not None
    metrics = Metrics(data, ("label_accuracy", "fid"), extractor="label-classifier")
    images, labels = data.images[:200], data.labels[:200].clone()
    # The classifier is perfect on its training images, so only the requested labels matter.
    assert metrics(images.split(64), num=200, labels=labels)["label_accuracy"] == 1.0
    labels[::4] = (labels[::4] + 1) % 10
    out = metrics(images.split(33), num=200, labels=labels)
    assert out["label_accuracy"] == 150 / 200
    assert list(out) == ["label_accuracy", "fd"]
    # It needs no feature extractor.
    alone = Metrics(data, ("label_accuracy",), extractor="inception-v3-compat")
    assert alone([data.x0(torch.arange(200))], num=200, labels=labels) == {"label_accuracy": 0.75}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "label_accuracy needs the requested class of each of the 4 images: give labels"),
        (torch.zeros(3, dtype=torch.int64), "label_accuracy needs the requested class of each of the 4 images:"),
        (torch.tensor([0, 1, 2, -1]), "generated for class -1, but digits.train. has classes 0 to 9"),
        (torch.tensor([0, 1, 2, 11]), "generated for class 11, but digits.train. has classes 0 to 9"),
    ],
)
def test_label_accuracy_rejects_invalid_labels(labels: Tensor | None, message: str) -> None:
    metrics = Metrics(load_data("digits"), ("label_accuracy",))
    with pytest.raises(UserError, match=message):
        metrics([torch.zeros(4, 1, 8, 8)], num=4, labels=labels)


def test_label_accuracy_needs_labelled_data() -> None:
    data = replace(load_data("digits"), labels=None)
    with pytest.raises(UserError, match=r"digits.train. has none: give labelled images .* or leave label_accuracy out"):
        Metrics(data, ("label_accuracy",))


def test_unconditional_network_has_no_label_accuracy(finished: tuple[Path, Path], tmp_path: Path) -> None:
    config = EvaluationConfig(("ddim",), (2,), num=8, metrics=("label_accuracy",))
    with pytest.raises(UserError, match="is not class-conditional: leave label_accuracy out"):
        evaluate_runs([str(finished[1] / "seed-0" / "at")], config, tmp_path / "cells.json")


@pytest.mark.parametrize(("sampler", "guidance"), [("ddim", 4.0), ("ddim", 1.0), ("iddpm", 2.0), ("heun", 1.5)])
def test_images_match_the_plain_pipeline(pipeline: Path, sampler: str, guidance: float) -> None:
    prompts = ("a one", "the two", "three")
    denoiser = load(pipeline, prompts=prompts, guidance_scale=guidance)
    expected = generate_with_diffusers(pipeline, sampler, 3, 2, [prompts[i % 3] for i in range(5)], guidance)
    out = generate(denoiser, sampler=sampler)
    assert out.shape == (5, 1, SIZE, SIZE)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    assert (out[0] - out[3]).abs().max() > 0.01  # same prompt, different noise


def test_sdxl_images_match_the_plain_pipeline(tmp_path: Path) -> None:
    folder = sdxl(tmp_path / "sdxl")
    denoiser = load(folder, prompts=("a one", "the two"))
    assert denoiser.image_shape == (3, SIZE, SIZE)
    expected = generate_with_diffusers(folder, "ddim", 3, 2, ["a one", "the two", "a one"], 7.5)
    torch.testing.assert_close(generate(denoiser, num=3), expected, rtol=0, atol=1e-4)


def test_embedded_guidance_matches_the_plain_pipeline(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "embedded", time_cond_proj_dim=8)
    prompts = ("a one", "the two")
    out = [generate(load(folder, prompts=prompts, guidance_scale=scale), num=2) for scale in (3.0, 9.0)]
    torch.testing.assert_close(
        out[0], generate_with_diffusers(folder, "ddim", 3, 2, list(prompts), 3.0), rtol=0, atol=1e-4
    )
    assert (out[0] - out[1]).abs().max() > 1e-3
    assert load(folder).evaluations("ddim", 3) == 3  # the network takes it as an input and runs once per step


def test_only_captions_of_the_chosen_classes_are_used(trained: Path, pipeline: Path, tmp_path: Path) -> None:
    data = {"name": "digits", "image_size": SIZE, "captions": list(CAPTIONS), "labels": [7, 2]}
    folder = training_folder(tmp_path / "some", data=data)
    shutil.copytree(pipeline, folder / "pipeline")
    some = load(folder)
    assert some.class_labels(5).tolist() == [2, 7, 2, 7, 2]
    assert reference_data(some).labels.unique().tolist() == [2, 7]  # type: ignore[union-attr]
    assert some.class_labels(2, 4).tolist() == [4, 4], "another may be asked for"
    assert replace(some, prompts=("a", "b", "c")).class_labels(4).tolist() == [0, 1, 2, 0], "no prompts of classes"
    how = EvaluationConfig(("ddim",), (2,), metrics=("label_accuracy",), extractor="label-classifier")
    asked = replace(how, reading=DataOptions(labels=(8, 9))).asked_of(load(trained))
    assert asked.class_labels(3).tolist() == [8, 9, 8]
    assert how.asked_of(load(trained)).class_labels(11).tolist() == [*range(10), 0]
    with pytest.raises(UserError, match="has no class 12, which"):
        replace(how, reading=DataOptions(labels=(12,))).asked_of(load(trained))


LABELS = DataOptions(labels=(1, 2))


def test_image_captions_are_not_classes(trained: Path, pipeline: Path, tmp_path: Path) -> None:
    """A run numbers its first captions as prompts; these numbers are not labels of its images."""
    folder = training_folder(tmp_path / "captioned", data={"name": "digits", "image_size": SIZE})
    shutil.copytree(pipeline, folder / "pipeline")
    (folder / "prompts.txt").write_text("a one\nthe two\n")
    how = EvaluationConfig(("ddim",), (2,), metrics=("label_accuracy",), extractor="label-classifier")
    for asked, name in ((how, "label_accuracy"), (EvaluationConfig(None, (2,), reading=LABELS), "--labels")):
        with pytest.raises(UserError, match=f"{name} needs a prompt for each class, but .* captions of images: give"):
            asked.asked_of(load(folder))
    assert replace(how, prompts=CAPTIONS).asked_of(load(folder)).prompts == CAPTIONS
    assert how.asked_of(load(trained)).prompts == CAPTIONS


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_do_not_depend_on_the_batch_size(pipeline: Path, batch_size: int) -> None:
    denoiser = load(pipeline, prompts=CAPTIONS)
    batches = list(denoiser.samples(**OPTIONS, batch_size=batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    torch.testing.assert_close(torch.cat(batches), generate(denoiser, num=7)[:5], rtol=0, atol=1e-5)


def test_large_images_are_sampled_in_small_batches(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atdiff.pipelines.text_to_image.PIXELS", 2 * SIZE * SIZE)
    batches = list(load(pipeline, prompts=CAPTIONS).samples(**OPTIONS))
    assert [len(batch) for batch in batches] == [2, 2, 1]


def test_label_selects_one_prompt_for_all_images(pipeline: Path) -> None:
    denoiser = load(pipeline, prompts=CAPTIONS)
    assert torch.equal(denoiser.class_labels(12), torch.arange(12) % 10)
    one = generate(load(pipeline, prompts=(CAPTIONS[3],)))
    torch.testing.assert_close(generate(denoiser, label=3), one, rtol=0, atol=1e-5)
    assert (generate(denoiser, label=4) - one).abs().max() > 1e-3


def test_guidance_and_prompts_come_from_the_training_folder(trained: Path, pipeline: Path, tmp_path: Path) -> None:
    assert load(trained).guidance_scale == 3.0
    assert load(trained).prompts == CAPTIONS
    assert load(trained).evaluations("ddim", 3) == 6  # with the prompt and without
    assert (load(pipeline).guidance_scale, load(pipeline).prompts) == (7.5, ())
    other = training_folder(tmp_path / "other", sampling={"guidance_scale": 2.0}, consistency=None, data={"name": "x"})
    shutil.copytree(pipeline, other / "pipeline")
    assert (load(other).guidance_scale, load(other).prompts) == (2.0, ())


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"prompts": ()}, {}, "without prompts: give --prompts"),
        ({}, {"label": 10}, "class label 10 is not one of .* prompts, 0 to 9"),
        ({}, {"correction": EpsilonScaling(1.01)}, "the correction EpsilonScaling cannot be applied"),
        ({}, {"num": 0}, "num=0"),
        ({}, {"num": -1}, "num=-1"),
        ({}, {"batch_size": 0}, "batch_size=0"),
        ({}, {"seed": 5000}, "seed=5000"),
        ({}, {"sampler": "flow-euler"}, "does not fit"),
        ({}, {"steps": 0}, "steps=0"),
    ],
)
def test_invalid_image_requests_raise_immediately(
    pipeline: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(pipeline, **{"prompts": CAPTIONS, **changes}).samples(**{**OPTIONS, **options})


def test_non_finite_images_raise(pipeline: Path) -> None:
    denoiser = load(pipeline, prompts=CAPTIONS)
    torch.nn.init.constant_(denoiser.pipeline.vae.decoder.conv_out.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="5 samples of ddim at 3 steps are not finite"):
        generate(denoiser)


def test_text_to_image_pipelines_can_be_excluded(pipeline: Path) -> None:
    with pytest.raises(UserError, match=r"is a text-to-image pipeline \(StableDiffusionPipeline\)"):
        load_denoiser(str(pipeline), text_to_image=False)


def test_evaluate_and_sample_a_training_folder(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "cells.json"
    words = ["evaluate", str(trained), "--steps", "2", "--num", "40", "--metrics", "fid,label_accuracy",
             "--extractor", "label-classifier", "--out", str(out)]  # fmt: skip
    assert main(words) == 0
    (cell,) = json.loads(out.read_text())
    assert {"nfe": 4, "guidance_scale": 3.0, "sampler": "ddim", "reference": "digits"}.items() <= cell.items()
    # The same by hand: plain images, classes in turn, and the classifier.
    images = generate_with_diffusers(trained / "pipeline", "ddim", 2, 0, [CAPTIONS[i % 10] for i in range(40)], 3.0)
    metrics = Metrics(load_data("digits", image_size=SIZE), ("fid", "label_accuracy"), extractor="label-classifier")
    expected = metrics([images], num=40, labels=torch.arange(40) % 10)
    assert cell["metrics"] == pytest.approx(expected, rel=1e-2)
    assert main(["sample", str(trained), "--steps", "2", "--num", "3", "--out", str(tmp_path / "three.npz")]) == 0
    pixels = torch.from_numpy(np.load(tmp_path / "three.npz")["arr_0"])[..., 0].int()
    assert (pixels - to_uint8(images[:3, 0]).int()).abs().max() <= 1


def test_evaluate_a_pipeline_with_user_prompts(pipeline: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "cells.json"
    words = ["evaluate", str(pipeline), "--steps", "2", "--num", "20", "--metrics", "fid,label_accuracy",
             "--extractor", "label-classifier", "--data", str(photos), "--out", str(out)]  # fmt: skip
    counts = []
    for name, captions in (("a", CAPTIONS), ("b", CAPTIONS[::-1]), ("a", CAPTIONS)):
        (tmp_path / name).write_text("\n".join(captions))
        assert main([*words, "--prompts", str(tmp_path / name)]) == 0
        counts.append(len(json.loads(out.read_text())))
    assert counts == [1, 2, 2]  # other prompts get their own cell
    first, second = json.loads(out.read_text())
    assert first["guidance_scale"] == 7.5
    assert first["prompts"].startswith("10 (sha256 ")
    assert first["prompts"] != second["prompts"]
    assert first["metrics"]["fd"] != second["metrics"]["fd"]
    config = EvaluationConfig(None, (2,), num=20, extractor="label-classifier", metrics=("fid", "label_accuracy"))
    covered = [replace(config, prompts=prompts).covers(first) for prompts in (CAPTIONS, CAPTIONS[::-1], None)]
    assert covered == [True, False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "without prompts: give --prompts"),
        (["--prompts", "prompts.txt", "--corrections", "none,epsilon-scaling:1.01"], "epsilon-scaling:1.01 cannot be"),
        (["--prompts", "prompts.txt", "--metrics", "label_accuracy"], "generated for class 10, but"),
        (["--prompts", "missing.txt"], "missing.txt cannot be read"),
    ],
)
def test_invalid_evaluations_are_one_line_and_write_nothing(
    words: list[str],
    message: str,
    pipeline: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join([*CAPTIONS, "a tree"]))
    shared = ["--steps", "2", "--num", "20", "--data", str(photos), "--extractor", "label-classifier"]
    assert main(["evaluate", str(pipeline), *shared, "--out", "cells.json", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("cells.json").exists()


def test_clip_score_uses_the_prompts_of_the_run(trained: Path, pipeline: Path) -> None:
    config = EvaluationConfig(("ddim",), (2,), metrics=("clip_score",))
    assert config.asked_of(load(trained)).prompts == CAPTIONS
    assert replace(config, prompts=("a dog",)).asked_of(load(trained)).prompts == ("a dog",)
    with pytest.raises(UserError, match="clip_score compares samples with prompts"):
        config.asked_of(load(pipeline))


def test_sample_grids_match_the_pipeline(trained: Path, pipeline: Path) -> None:
    for labels, captions in ((None, list(CAPTIONS[:4])), ((7, 2), [CAPTIONS[2], CAPTIONS[7]] * 2)):
        grids = sample_grids({"plain": str(trained)}, ["ddim"], [2], seed=1, columns=2, labels=labels)
        expected = to_uint8(generate_with_diffusers(trained / "pipeline", "ddim", 2, 1, captions, 3.0)).int()
        png = np.asarray(Image.open(_stream(grids["ddim"][2]["plain"]))).astype(int)
        for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            top, left = 1 + row * (SIZE + 1), 1 + column * (SIZE + 1)
            assert np.abs(png[top : top + SIZE, left : left + SIZE] - expected[i, 0].numpy()).max() <= 1
    with pytest.raises(UserError, match="without prompts"):
        sample_grids({"plain": str(pipeline)}, ["ddim"], [2])
    assert sample_grids({"plain": str(pipeline)}, ["ddim"], [2], columns=2, prompts=["a one"])


def _stream(content: bytes) -> Any:
    import io

    return io.BytesIO(content)


def lora_folder(folder: Path, base: str) -> Path:
    """Return a training folder with a random LoRA that changes the network."""
    network = unet()
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(network)
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=layers)
    LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        folder / "lora" / "scheduler"
    )
    return training_folder(folder, training={"init": base}, lora={"rank": 2}, consistency={"sample_guidance": 1.5})


def test_lora_is_loaded_onto_its_base_pipeline(pipeline: Path, tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "run", str(pipeline))
    denoiser = load(folder)
    assert isinstance(denoiser.scheduler, LCMScheduler)
    assert (denoiser.guidance_scale, denoiser.prompts) == (1.5, CAPTIONS)
    plain: Any = StableDiffusionPipeline.from_pretrained(pipeline)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    before = plain.unet(x, 300, states).sample
    plain.load_lora_weights(folder / "lora")
    expected = plain.unet(x, 300, states).sample
    torch.testing.assert_close(denoiser.model(x, 300, states).sample, expected)
    assert (expected - before).abs().max() > 1e-3


def test_broken_lora_is_reported(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lora_folder(tmp_path / "run", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"contains a LoRA for the pipeline '.*gone' .training.init.: "):
        load_denoiser(str(folder))
    training_folder(folder, training={"init": str(pipeline)}, lora={"rank": 2})
    weights = folder / "lora" / "pytorch_lora_weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(UserError, match=r"the LoRA weights .* cannot be loaded onto"):
        load_denoiser(str(folder))
    weights.unlink()
    with pytest.raises(UserError, match="has no finished pipeline yet"):
        load_denoiser(str(folder))
    weights.write_bytes(content)

    def missing(*args: Any, **options: Any) -> None:
        raise ValueError("PEFT backend is required for this method.")

    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", missing)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package peft: pip install 'atdiff\[lcm\]'"):
        load_denoiser(str(folder))
