"""The small text-to-image pipelines: plain diffusers opens them, and they are reproducible."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from atdiff.cli import main
from atdiff.core.errors import UserError
from atdiff.data import ImageData, load_data
from atdiff.pipelines import maker
from atdiff.pipelines.maker import find_maker
from atdiff.study.recipe import load_recipe, resolve
from atdiff.system.locate import run_config
from atdiff.training.tasks import make_task
from small_pipelines import tiny_flux, tiny_sd, tiny_sd3

ROOT = Path(__file__).parent.parent.parent
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a handwritten {word}" for word in WORDS)
QUICK: dict[str, Any] = {"vae_channels": (8, 16), "unet_channels": (8, 16), "updates": 60}


def digits(num: int = 192, channels: int = 1) -> ImageData:
    data = load_data("digits", image_size=16)
    assert data.labels is not None
    return ImageData(data.images[:num].repeat(1, channels, 1, 1), data.labels[:num], "digits")


def open_pipeline(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, prompts: list[str], **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 2, "height": 16, "width": 16, **options}
    pictures: np.ndarray = pipeline(prompts, generator=generator, output_type="np", **options).images
    return pictures


@pytest.fixture(scope="module")
def folder() -> Path:
    """A quickly trained pipeline of the digits; do not write into it."""
    return tiny_sd(digits(), PROMPTS, **QUICK)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return open_pipeline(folder)


def test_plain_diffusers_opens_the_folder_and_generates_images(pipeline: Any) -> None:
    assert type(pipeline) is StableDiffusionPipeline
    plain = generate(pipeline, [PROMPTS[3], PROMPTS[7]], guidance_scale=1.0)
    guided = generate(pipeline, [PROMPTS[3], PROMPTS[7]], guidance_scale=4.0)
    assert plain.shape == guided.shape == (2, 16, 16, 1)
    assert np.isfinite(guided).all()
    assert np.abs(plain - guided).max() > 1e-4


def test_images_depend_only_on_the_prompt(pipeline: Any) -> None:
    one, same, other = (generate(pipeline, [prompt]) for prompt in (PROMPTS[1], PROMPTS[1].upper(), PROMPTS[2]))
    assert np.array_equal(one, same)
    assert np.abs(one - other).max() > 1e-4


def test_colour_data_give_colour_images() -> None:
    path = tiny_sd(digits(32, channels=3), PROMPTS, **{**QUICK, "updates": 1})
    assert generate(open_pipeline(path), [PROMPTS[0]]).shape == (1, 16, 16, 3)


def test_latent_size_follows_the_number_of_levels() -> None:
    small = open_pipeline(tiny_sd(digits(32), PROMPTS, **{**QUICK, "vae_channels": (8, 8, 8), "updates": 1}))
    assert small.unet.config.sample_size == 4
    assert generate(small, [PROMPTS[0]], height=None, width=None).shape == (1, 16, 16, 1)


def test_noise_schedule_matches_stable_diffusion(pipeline: Any) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected = np.cumprod(1.0 - betas)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    np.testing.assert_allclose(pipeline.scheduler.alphas_cumprod.numpy(), expected, rtol=1e-4)
    assert pipeline.scheduler.final_alpha_cumprod == pipeline.scheduler.alphas_cumprod[0]
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [751, 501, 251, 1]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_scheduler_records_the_prediction_type(prediction_type: str) -> None:
    args = {**QUICK, "updates": 1}
    path = tiny_sd(digits(32), PROMPTS, prediction_type=prediction_type, **args)
    assert json.loads((path / "scheduler/scheduler_config.json").read_text())["prediction_type"] == prediction_type


def test_every_level_attends_to_the_prompt(pipeline: Any) -> None:
    config = pipeline.unet.config
    assert tuple(config.down_block_types) == ("CrossAttnDownBlock2D",) * 2
    assert tuple(config.up_block_types) == ("CrossAttnUpBlock2D",) * 2
    assert config.cross_attention_dim == pipeline.text_encoder.config.hidden_size


@torch.no_grad()
def test_latents_have_unit_variance_and_decode_to_the_images(pipeline: Any) -> None:
    data = digits()
    x0 = data.images.float() / 127.5 - 1.0
    posterior = pipeline.vae.encode(x0).latent_dist
    latents = posterior.sample(torch.Generator().manual_seed(1)) * pipeline.vae.config.scaling_factor
    assert latents.shape == (192, 4, 8, 8)
    assert float(latents.std()) == pytest.approx(1.0, abs=0.02)
    error = (pipeline.vae.decode(posterior.mean).sample - x0).square().mean()
    of_the_mean_image = (x0 - x0.mean(0)).square().mean()
    assert error < 0.3 * of_the_mean_image


def test_each_word_of_the_prompts_is_a_token(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("A  handwritten SEVEN").input_ids)
    assert tokens == ["<|startoftext|>", "a</w>", "handwritten</w>", "seven</w>", "<|endoftext|>"]


def test_unknown_words_are_split_and_empty_text_has_no_tokens(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("blob, é").input_ids)
    assert "".join(pieces[1:-1]).replace("</w>", " ").startswith("blob , ")
    assert tokenizer.decode(tokenizer("blob, é").input_ids, skip_special_tokens=True).split()[-1] == "é"
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def byte_pair_encode(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encode a lower-case ASCII word, like CLIP's slow tokenizer."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        i = pairs.index(best)
        parts[i : i + 2] = ["".join(best)]
    return parts


@pytest.mark.parametrize("text", [*PROMPTS, "a handwriting of nineteen ones", "fourth"])
def test_vocabulary_files_alone_give_the_same_tokens(folder: Path, pipeline: Any, text: str) -> None:
    """Older versions of transformers read only these two files."""
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    version, *merges = (folder / "tokenizer/merges.txt").read_text().splitlines()
    assert version.startswith("#version")
    first, second = (vocabulary[token] for token in ("<|startoftext|>", "<|endoftext|>"))
    ranks = {(left, right): i for i, (left, right) in enumerate(line.split() for line in merges)}
    expected = [first, *(vocabulary[part] for word in text.split() for part in byte_pair_encode(word, ranks)), second]
    assert pipeline.tokenizer(text).input_ids == expected
    assert sorted(vocabulary.values()) == list(range(pipeline.text_encoder.config.vocab_size))


def test_tokenizer_loads_from_vocabulary_files_alone(folder: Path, tmp_path: Path, pipeline: Any) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / "tokenizer" / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    assert CLIPTokenizer.from_pretrained(tmp_path)(PROMPTS[4]).input_ids == pipeline.tokenizer(PROMPTS[4]).input_ids


@torch.no_grad()
def test_prompt_embeddings_are_far_apart(pipeline: Any) -> None:
    embeddings: Tensor = pipeline.encode_prompt([*PROMPTS, ""], "cpu", 1, False)[0]
    assert embeddings.shape == (11, 16, 64)
    distances = torch.cdist(embeddings.flatten(1), embeddings.flatten(1))
    nearest = distances[~torch.eye(11, dtype=torch.bool)].min()
    assert nearest > 0.3 * embeddings.flatten(1).norm(dim=1).mean()


def test_long_prompts_are_not_truncated() -> None:
    long = [" ".join([word] * 20) for word in WORDS]
    path = tiny_sd(digits(32), long, **{**QUICK, "updates": 1})
    made = open_pipeline(path)
    assert made.tokenizer.model_max_length == made.text_encoder.config.max_position_embeddings == 22
    assert generate(made, [long[0]]).shape == (1, 16, 16, 1)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_output_is_deterministic_and_preserves_rng_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    for cache, seed in (("one", 1), ("two", 2)):
        monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / cache))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        path = tiny_sd(digits(64), PROMPTS, **{**QUICK, "updates": 3})
        assert torch.equal(torch.get_rng_state(), before)
        assert [file.name for file in path.parent.iterdir()] == [path.name]  # no partial folder beside it
        found.append((path.name, contents(path)))
    assert found[0] == found[1]


def test_cache_is_reused(folder: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert tiny_sd(digits(), list(PROMPTS), **QUICK) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_different_inputs_get_different_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path))
    data, args = digits(32), {**QUICK, "updates": 1}
    assert data.labels is not None
    folders = {
        tiny_sd(data, PROMPTS, **args),
        tiny_sd(data, PROMPTS[::-1], **args),
        tiny_sd(data, PROMPTS, **{**args, "updates": 2}),
        tiny_sd(replace(data, images=data.images.flip(0)), PROMPTS, **args),
        tiny_sd(replace(data, labels=data.labels.flip(0)), PROMPTS, **args),
    }
    assert len(folders) == 5


def images(shape: tuple[int, ...] = (20, 1, 16, 16), dtype: torch.dtype = torch.uint8) -> ImageData:
    return ImageData(torch.zeros(shape, dtype=dtype), torch.arange(shape[0]) % 10, "blanks")


@pytest.mark.parametrize(
    ("data", "prompts", "args", "message"),
    [
        (replace(images(), labels=None), PROMPTS, {}, "blanks has no labels: prompts are given by class"),
        (images(dtype=torch.float32), PROMPTS, {}, r"holds torch.float32 values: .* needs uint8 images"),
        (images((20, 2, 16, 16)), PROMPTS, {}, "has 2 channels: expected 1 or 3"),
        (images((20, 1, 16, 24)), PROMPTS, {}, "images of 16x24 pixels: crop them to squares"),
        (
            images((20, 1, 12, 12)),
            PROMPTS,
            {},
            "12 pixels: expected a multiple of 8, so set image_size to 16",
        ),
        (images((20, 1, 8, 8)), PROMPTS, {"vae_channels": [8] * 5}, "expected a multiple of 16, .* image_size to 16"),
        (images(), [], {}, "no prompts were given: expected one for each of the 10 classes"),
        (images(), PROMPTS[:9], {}, "9 prompts were given for the 10 classes of blanks"),
        (images(), [*PROMPTS[:9], "  "], {}, "prompt 9 is empty"),
        (images(), [*PROMPTS[:9], "A handwritten  two"], {}, "'A handwritten  two' is given twice"),
        (images(), PROMPTS, {"prediction_type": "noise"}, "prediction_type 'noise' is unknown: .* v_prediction"),
        (images(), PROMPTS, {"vae_channels": (8, 20)}, r"vae_channels is \[8, 20\]: expected one multiple of 8"),
        (images(), PROMPTS, {"unet_channels": ()}, r"unet_channels is \[\]: expected one multiple of 8"),
        (images(), PROMPTS, {"updates": 0}, "updates is 0: .* 1 batch or more"),
    ],
)
def test_user_errors_are_reported(data: ImageData, prompts: list[str], args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_sd(data, prompts, **args)


def test_unwritable_cache_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="ATDIFF_CACHE"):
        tiny_sd(digits(32), PROMPTS, **{**QUICK, "updates": 1})


def test_sd3_opens_in_plain_diffusers_and_uses_the_prompt() -> None:
    few = {"vae_channels": (8, 16), "num_layers": 1, "num_attention_heads": 2, "updates": 1}
    folder = tiny_sd3(digits(32), PROMPTS, **few)
    assert folder == tiny_sd3(digits(32), PROMPTS, **few)
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.config.sample_size == 8
    assert pipeline.vae.config.shift_factor == 0.0
    one, other = (generate(pipeline, [prompt], guidance_scale=1.0) for prompt in (PROMPTS[1], PROMPTS[2]))
    assert one.shape == (1, 16, 16, 1)
    assert np.abs(one - other).max() > 1e-5
    for name in ("num_layers", "num_attention_heads"):
        with pytest.raises(UserError, match=f"{name} is 0"):
            tiny_sd3(digits(32), PROMPTS, **{**few, name: 0})


def test_flux_opens_in_plain_diffusers_and_uses_the_prompt() -> None:
    few = {"vae_channels": (8, 16), "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "updates": 1}
    folder = tiny_flux(digits(32), PROMPTS, **few)
    assert folder == tiny_flux(digits(32), PROMPTS, **few)
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    tokens = [pipeline.tokenizer_2(prompt).input_ids for prompt in (*PROMPTS, "a handwritten letter")]
    assert len(set(map(tuple, tokens))) == len(tokens)
    assert {len(ids) for ids in tokens} == {4}  # three words and the end
    short = {"guidance_scale": 3.5, "max_sequence_length": 4, "height": 16, "width": 16}
    one, same, other = (generate(pipeline, [PROMPTS[i]], **short) for i in (1, 1, 2))
    assert one.shape == (1, 16, 16, 1)
    assert np.array_equal(one, same)
    assert np.abs(one - other).max() > 1e-5
    for name in ("num_layers", "num_single_layers", "num_attention_heads"):
        with pytest.raises(UserError, match=f"{name} is 0"):
            tiny_flux(digits(32), PROMPTS, **{**few, name: 0})
    with pytest.raises(UserError, match="16 pixels: expected a multiple of 32"):
        tiny_flux(digits(32), PROMPTS, **{**few, "vae_channels": (8,) * 5})


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3, tiny_flux])
def test_missing_transformers_error_names_the_extra(make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    monkeypatch.setenv("ATDIFF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"needs text encoders from transformers: pip install 'atdiff\[lcm\]'"):
        make(digits(32), PROMPTS)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("word", ["tiny-sd", "tiny-sd3", "tiny-flux"])
def test_bundled_names_need_a_clone(word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = find_maker(word)
    assert made is find_maker(f"{ROOT}/studies/small_pipelines.py:{word.replace('-', '_')}")
    monkeypatch.setattr(maker, "SMALL", tmp_path / "small_pipelines.py")  # as in an installed wheel
    with pytest.raises(
        UserError,
        match=rf"which the installed package does not include: .* as PATH/small_pipelines.py:{made.__name__}\.$",
    ):
        find_maker(word)


OWN = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Made:
    folder: str

def mine(images, prompts, *, at):
    assert len(images) > len(prompts) == 10
    return Made(at).folder
"""


def test_custom_function_makes_the_pipeline_of_a_run(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    recipe = load_recipe("text-digits")
    words = ["--data.image_size", "16", "--model.args.at", str(folder), "--model.name"]
    assert make_task(resolve(recipe, None, [*words, f"{file}:mine"])).latent.source == str(folder)
    for wrong, message in (
        (f"{file}:other", "does not name a function in"),
        (f"{tmp_path}/no.py:mine", "that does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            make_task(resolve(recipe, None, [*words, wrong]))
    with pytest.raises(UserError, match="is unknown; expected one of"):
        resolve(recipe, None, [*words, str(file)])


def test_text_digits_turbo_recipe_runs(folder: Path, tmp_path: Path, study_in_process: None) -> None:
    """Distil a few-step model of eight classes, then tune it on the other two with itself as the teacher."""
    words = ["--training.init", str(folder), "--training.passes", "2", "--study.arms", "[plain,lcd]"]
    words += ["--study.seeds", "[0]", "--study.steps", "[1]", "--study.num", "8", "--jobs", "1"]
    # Skip the recipe's classifier, whose training would take most of the time.
    words += ["--study.extractor", "digits-classifier", "--study.metrics", "[sliced_wasserstein]"]
    assert main(["study", "text-digits-turbo", "--out", str(tmp_path), *words]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [cell["arm"] for cell in summary["cells"]] == ["plain", "lcd"]
    assert all(math.isfinite(cell["metrics"]["sliced_wasserstein"]) for cell in summary["cells"])
    base, arm = (run_config(str(tmp_path / "seed-0" / name))["data"]["labels"] for name in ("base", "lcd"))
    assert (base, arm) == ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9])
