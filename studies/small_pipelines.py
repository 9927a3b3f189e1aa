"""Text-to-image pipelines small enough to train on a CPU, made of labelled images and a prompt for each class.

In a recipe: ``model: {name: studies/small_pipelines.py:tiny_sd3}``, or ``tiny-sd3`` for short.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from rich.console import Console
from rich.progress import track

from atdiff.core.errors import UserError
from atdiff.data.sources import ImageData
from atdiff.pipelines.families.flux import PATCH
from atdiff.pipelines.latent_model import require_transformers
from atdiff.system.files import cache_folder, write_json, write_text, written_aside
from atdiff.system.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

__all__ = ["tiny_flux", "tiny_sd", "tiny_sd3"]

VAE_CHANNELS, UPDATES = (16, 32, 32), 600

PROGRESS_FROM = 100  # updates of the autoencoder; fewer take a few seconds
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
PIPELINE_SIDE = 8  # StableDiffusionPipeline makes images of multiples of 8 pixels alone
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
# How CLIP's tokenizer cuts a text into words; its own pattern, so that what is learned here are the words it sees.
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # Python: regex
)

# Everything that the folder depends on besides the arguments, images, labels and prompts; part of the cache's key.
RECIPE: dict[str, Any] = {
    "version": 1,
    "batch": 64,
    "max_lr": 4e-3,
    "weight_decay": 0.01,
    "kl_weight": 0.01,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "text": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_factor": 4.0,  # at 1 the embeddings of two prompts differ by a quarter, at 4 by two thirds
    },
    "min_length": 16,  # tokens
    "attention_heads": 4,
    "seed": 0,
}


def tiny_sd(
    images: ImageData,
    prompts: Sequence[str],
    *,
    prediction_type: str = "epsilon",
    vae_channels: Sequence[int] = VAE_CHANNELS,
    unet_channels: Sequence[int] = (32, 64),
    updates: int = UPDATES,
) -> Path:
    """Return a folder of a ``StableDiffusionPipeline`` for the images, made now unless the cache has it.

    Its autoencoder is trained on the images and its latents have unit variance, as in Stable Diffusion
    (`Rombach et al., 2022 <https://arxiv.org/abs/2112.10752>`_). The text encoder is a small CLIP with random weights,
    which are enough to tell the prompts apart. The U-Net, with cross-attention at every level, is untrained. The noise
    schedule is that of Stable Diffusion 1.5.

    Args:
        images: uint8 images ``(N, C, H, W)`` with labels, square, of a multiple of 8 pixels, greyscale or RGB.
        prompts: one text for each class, in the order of the labels.
        prediction_type: what the U-Net is to predict: ``epsilon``, ``v_prediction`` or ``sample``.
        vae_channels: widths of the autoencoder's levels; each level after the first halves the image.
        unet_channels: widths of the U-Net's levels.
        updates: batches that the autoencoder is trained for.

    Returns:
        A folder in the cache that ``DiffusionPipeline.from_pretrained`` opens; the same arguments give the same one.

    Raises:
        UserError: images without labels, not uint8 or of a size that does not fit; prompts that are not one for each
            class, empty or equal; an unknown prediction type, widths that are no multiples of 8, no updates; or a cache
            folder that cannot be written.
    """
    args = {"prediction_type": prediction_type, "unet_channels": list(unet_channels)}
    return _cached("tiny-sd", images, prompts, _stable_diffusion, vae_channels, updates, args)


def tiny_sd3(
    images: ImageData,
    prompts: Sequence[str],
    *,
    vae_channels: Sequence[int] = VAE_CHANNELS,
    num_layers: int = 3,
    num_attention_heads: int = 4,
    updates: int = UPDATES,
) -> Path:
    """Return a folder of a ``StableDiffusion3Pipeline`` for the images; see :func:`tiny_sd`.

    It has two text encoders and no T5. The transformer, with heads of 16 channels and a latent a token, is untrained.
    The noise is that of SD3 with a shift of 1. (`Esser et al., 2024 <https://arxiv.org/abs/2403.03206>`_)

    Args:
        images: as for :func:`tiny_sd`.
        prompts: likewise.
        vae_channels: likewise.
        num_layers: blocks of the transformer.
        num_attention_heads: of each block.
        updates: as for :func:`tiny_sd`.
    """
    args = {"num_layers": num_layers, "num_attention_heads": num_attention_heads}
    return _cached("tiny-sd3", images, prompts, _stable_diffusion_3, vae_channels, updates, args)


def tiny_flux(
    images: ImageData,
    prompts: Sequence[str],
    *,
    vae_channels: Sequence[int] = VAE_CHANNELS,
    num_layers: int = 2,
    num_single_layers: int = 2,
    num_attention_heads: int = 4,
    updates: int = UPDATES,
) -> Path:
    """Return a folder of a ``FluxPipeline`` for the images; see :func:`tiny_sd`.

    Beside the CLIP, a small T5 of random weights, which knows the words of the prompts, tells them apart. The
    transformer, with heads of 16 channels, 2 x 2 latents a token and a guidance embedding, is untrained. The noise is
    that of Flux.1 dev, its shift following the number of tokens. (`Flux <https://github.com/black-forest-labs/flux>`_)

    Args:
        images: as for :func:`tiny_sd`, but the latents must have an even side.
        prompts: likewise.
        vae_channels: likewise.
        num_layers: blocks that keep image and text apart.
        num_single_layers: blocks of both together.
        num_attention_heads: of each block.
        updates: as for :func:`tiny_sd`.
    """
    args = {
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "num_attention_heads": num_attention_heads,
        "token_side": PATCH,
    }
    return _cached("tiny-flux", images, prompts, _flux, vae_channels, updates, args)


def _cached(
    kind: str,
    images: ImageData,
    prompts: Sequence[str],
    make: Callable[[ImageData, Sequence[str], dict[str, Any], Path], Any],
    vae_channels: Sequence[int],
    updates: int,
    args: dict[str, Any],
) -> Path:
    """Return the folder of the cache that ``make`` fills, checked and made first where it is not there."""
    args = {"vae_channels": list(vae_channels), "updates": updates, **args}
    require_transformers(kind)
    _check_images(images)
    _check_prompts(images, prompts)
    _check_args(images, args)
    path = cache_folder() / kind / _key(images, prompts, args)
    if not path.exists():
        try:
            with written_aside(path) as partial, torch.random.fork_rng(devices=[]), torch.enable_grad():
                # No random state but its own is used.
                torch.default_generator.manual_seed(RECIPE["seed"])
                pipeline = make(images, prompts, args, partial)
                with quiet_libraries():
                    pipeline.save_pretrained(partial)
        except UserError as error:
            raise UserError(f"{error} The cache folder is set by ATDIFF_CACHE.") from error
    return path


def _check_images(images: ImageData) -> None:
    if images.labels is None:
        raise UserError(f"{images.name} has no labels: prompts are given by class, so choose labelled images.")
    if images.images.dtype != torch.uint8:
        raise UserError(f"{images.name} holds {images.images.dtype} values: the autoencoder needs uint8 images.")
    channels, height, width = images.images.shape[1:]
    if channels not in (1, 3):
        raise UserError(f"{images.name} has {channels} channels: expected 1 or 3, so convert it with channels.")
    if height != width:
        raise UserError(f"{images.name} has images of {height}x{width} pixels: crop them to squares with image_size.")


def _check_prompts(images: ImageData, prompts: Sequence[str]) -> None:
    if not prompts:
        raise UserError(f"no prompts were given: expected one for each of the {images.num_classes} classes.")
    if len(prompts) != images.num_classes:
        raise UserError(
            f"{len(prompts)} prompts were given for the {images.num_classes} classes of {images.name}: "
            "expected one for each class, in the order of the labels."
        )
    seen: set[str] = set()
    for i, prompt in enumerate(prompts):
        plain = " ".join(prompt.lower().split())  # what CLIP's tokenizer makes of it
        if not plain:
            raise UserError(f"prompt {i} is empty, which stands for no prompt at all: describe class {i}.")
        if plain in seen:
            raise UserError(f"the prompt {prompt!r} is given twice (but for case and spaces): expected one per class.")
        seen.add(plain)


def _check_args(images: ImageData, args: dict[str, Any]) -> None:
    if args.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise UserError(
            f"prediction_type {args['prediction_type']!r} is unknown: expected one of {', '.join(PREDICTION_TYPES)}."
        )
    for name in {"vae_channels", "unet_channels"} & args.keys():
        widths, groups = args[name], RECIPE["norm_num_groups"]
        if not widths or any(width < groups or width % groups for width in widths):
            raise UserError(f"{name} is {widths}: expected one multiple of {groups} or more for each level.")
    for name in {"num_layers", "num_single_layers", "num_attention_heads"} & args.keys():
        if args[name] < 1:
            raise UserError(f"{name} is {args[name]}: expected 1 or more.")
    if args["updates"] < 1:
        raise UserError(f"updates is {args['updates']}: the autoencoder must be trained for 1 batch or more.")
    side, multiple = images.images.shape[-1], max(PIPELINE_SIDE, _factor(args) * args.get("token_side", 1))
    if side % multiple:
        raise UserError(
            f"{images.name} has images of {side} pixels: expected a multiple of {multiple}, so set image_size to "
            f"{multiple * max(round(side / multiple), 1)}."
        )


def _factor(args: dict[str, Any]) -> int:
    return int(2 ** (len(args["vae_channels"]) - 1))


def _key(images: ImageData, prompts: Sequence[str], args: dict[str, Any]) -> str:
    assert images.labels is not None
    parts = [RECIPE, args, list(prompts), list(images.images.shape)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(images.images.contiguous().numpy().data)
    digest.update(images.labels.contiguous().numpy().data)
    return digest.hexdigest()[:12]


def _stable_diffusion(images: ImageData, prompts: Sequence[str], args: dict[str, Any], folder: Path) -> Any:  # noqa: ANN401
    from diffusers import StableDiffusionPipeline  # imports transformers, which takes seconds

    tokenizer = _tokenizer(prompts, folder / "tokenizer")
    text_encoder = _text_encoder(tokenizer)
    unet = _unet(images, args)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=args["prediction_type"],
    )
    return StableDiffusionPipeline(
        vae=_trained_autoencoder(images, args),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_3(images: ImageData, prompts: Sequence[str], args: dict[str, Any], folder: Path) -> Any:  # noqa: ANN401
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    tokenizers = [_tokenizer(prompts, folder / name) for name in ("tokenizer", "tokenizer_2")]
    encoders: list[Any] = [_text_encoder(tokenizer, CLIPTextModelWithProjection) for tokenizer in tokenizers]
    heads, width = args["num_attention_heads"], RECIPE["text"]["hidden_size"]
    side = images.images.shape[-1] // _factor(args)
    transformer: Any = SD3Transformer2DModel(
        sample_size=side,
        patch_size=1,
        in_channels=RECIPE["latent_channels"],
        out_channels=RECIPE["latent_channels"],
        num_layers=args["num_layers"],
        attention_head_dim=16,
        num_attention_heads=heads,
        caption_projection_dim=16 * heads,
        joint_attention_dim=2 * width,
        pooled_projection_dim=2 * width,
        pos_embed_max_size=side,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_trained_autoencoder(images, args),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _flux(images: ImageData, prompts: Sequence[str], args: dict[str, Any], folder: Path) -> Any:  # noqa: ANN401
    from diffusers import FluxPipeline

    tokenizer = _tokenizer(prompts, folder / "tokenizer")
    words = _word_tokenizer(prompts)
    width = RECIPE["text"]["hidden_size"]
    transformer: Any = FluxTransformer2DModel(
        patch_size=1,
        in_channels=args["token_side"] ** 2 * RECIPE["latent_channels"],
        num_layers=args["num_layers"],
        num_single_layers=args["num_single_layers"],
        attention_head_dim=16,
        num_attention_heads=args["num_attention_heads"],
        joint_attention_dim=width,
        pooled_projection_dim=width,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_trained_autoencoder(images, args),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(words),
        tokenizer_2=words,
    )


def _trained_autoencoder(images: ImageData, args: dict[str, Any]) -> Any:  # noqa: ANN401
    vae: Any = _autoencoder(images, args)
    _train(vae, images, args["updates"])
    vae.register_to_config(scaling_factor=1.0 / _latent_std(vae, images), shift_factor=0.0)
    return vae


def _tokenizer(prompts: Sequence[str], folder: Path) -> CLIPTokenizer:
    """Write ``vocab.json`` and ``merges.txt`` into ``folder`` and return the tokenizer that reads them.

    They are laid out as CLIP's: all bytes, all bytes at the end of a word, what is merged, and the special tokens. So
    every word of the prompts is a token, and any other text falls into smaller pieces.
    """
    from transformers import CLIPTokenizer

    characters, merges = _merges(prompts)
    tokens = [*characters, *(f"{c}</w>" for c in characters), *map("".join, merges), *SPECIAL_TOKENS]
    folder.mkdir(parents=True)
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(dict.fromkeys(tokens))})
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    # Written for transformers 4 and 5 alike, whose own savings do not hold the same files.
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"})
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    longest = max(len(tokenizer(prompt).input_ids) for prompt in prompts)
    tokenizer.model_max_length = max(longest, RECIPE["min_length"])
    return tokenizer


def _merges(prompts: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the characters that stand for the 256 bytes, and the merges that make each word of the prompts one."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    unbounded = sum(map(len, map(str.encode, prompts))) + 2 * len(characters)  # more than there can be merges
    trainer = trainers.BpeTrainer(
        vocab_size=unbounded,
        min_frequency=0,
        show_progress=False,
        initial_alphabet=characters,
        end_of_word_suffix="</w>",
    )
    learner.train_from_iterator(prompts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return characters, [(first, second) for first, second in merges]


def _text_encoder(tokenizer: CLIPTokenizer, kind: type | None = None) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        **RECIPE["text"],
        projection_dim=RECIPE["text"]["hidden_size"],
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (kind or CLIPTextModel)(config).eval()


def _word_tokenizer(prompts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words of the prompts, with T5's special ones."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for prompt in prompts for word in prompt.lower().split()})
    tokens = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    text = RECIPE["text"]
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=text["hidden_size"],
        d_kv=text["hidden_size"] // text["num_attention_heads"],
        d_ff=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
    )
    return T5EncoderModel(config).eval()


def _unet(images: ImageData, args: dict[str, Any]) -> UNet2DConditionModel:
    widths = args["unet_channels"]
    return UNet2DConditionModel(
        sample_size=images.images.shape[-1] // _factor(args),
        in_channels=RECIPE["latent_channels"],
        out_channels=RECIPE["latent_channels"],
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        cross_attention_dim=RECIPE["text"]["hidden_size"],
        attention_head_dim=RECIPE["attention_heads"],  # the number of heads, for all its name
        norm_num_groups=RECIPE["norm_num_groups"],
    )


def _autoencoder(images: ImageData, args: dict[str, Any]) -> AutoencoderKL:
    widths = args["vae_channels"]
    channels, side = images.images.shape[1:3]
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        latent_channels=RECIPE["latent_channels"],
        norm_num_groups=RECIPE["norm_num_groups"],
        sample_size=side,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def _train(vae: Any, images: ImageData, updates: int) -> None:  # noqa: ANN401  (attributes of diffusers)
    """Train for the squared error of the pixels and a small weight on the divergence from the normal distribution."""
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=RECIPE["weight_decay"])
    # The schedule divides by its number of warm-up steps, which is none of a single one.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["max_lr"], total_steps=max(updates, 10))
    epoch = -(-len(images) // RECIPE["batch"])
    batches: tuple[torch.Tensor, ...] = ()
    console = Console(stderr=True)
    steps = track(
        range(updates), "training the autoencoder", console=console, transient=True, disable=updates < PROGRESS_FROM
    )
    vae.train()
    for update in steps:
        if update % epoch == 0:
            batches = torch.randperm(len(images)).split(RECIPE["batch"])
        x0 = images.x0(batches[update % epoch])
        posterior = vae.encode(x0).latent_dist
        error = (vae.decode(posterior.sample()).sample - x0).square().mean()
        loss = error + RECIPE["kl_weight"] * posterior.kl().mean() / x0[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    vae.eval()


@torch.no_grad()
def _latent_std(vae: Any, images: ImageData) -> float:  # noqa: ANN401
    """Return the standard deviation of all values of the latents of all images, drawn as training draws them."""
    batches = torch.arange(len(images)).split(RECIPE["batch"])
    latents = torch.cat([vae.encode(images.x0(batch)).latent_dist.sample() for batch in batches])
    return float(latents.double().std())
