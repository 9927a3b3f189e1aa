"""Reads the class and the weights variants of a saved pipeline from its files, without loading it."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import struct
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from atdiff.core.errors import UserError

__all__ = [
    "FAMILY_MODULES",
    "LATENTS",
    "PIXELS",
    "check_class",
    "check_variant",
    "choose_variant",
    "class_name",
    "file_names",
    "is_single_file",
    "no_pipeline",
    "variants_of",
    "weights_in",
]

FAMILY_MODULES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "DiTPipeline": "dit",
    "LatentConsistencyModelPipeline": "lcm",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
    "Lumina2Pipeline": "lumina2",
    "QwenImagePipeline": "qwen",
    "CogView4Pipeline": "cogview4",
    "AuraFlowPipeline": "auraflow",
    "WanPipeline": "wan",
}
"""The registry of families: the module in ``atdiff.pipelines.families`` for each diffusers pipeline class."""
LATENTS = tuple(FAMILY_MODULES)
"""diffusers pipeline classes that sample in latent space, from a text or a class."""
PIXELS = (
    "DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ScoreSdeVePipeline", "KarrasVePipeline",
    "ConsistencyModelPipeline",
)  # fmt: skip
"""diffusers pipeline classes that sample in pixel space."""

INDEX = "model_index.json"
LORA = "pytorch_lora_weights.safetensors"
# File names in diffusers and transformers: diffusion_pytorch_model.fp16.safetensors,
# model.fp16-00001-of-00002.safetensors; in older versions diffusion_pytorch_model-00001-of-00002.fp16.safetensors.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
)
_UNUSED = ("safety_checker", "image_encoder")  # parts that are not loaded or not used here


def class_name(index: Mapping[str, Any]) -> str:
    """Return a pipeline's class from its ``model_index.json``, which lists a custom class with its file."""
    name = index.get("_class_name")
    return str(name[-1] if isinstance(name, list | tuple) and name else name)


def check_class(source: str, index: Mapping[str, Any] | Path, *, pixels: bool = True) -> None:
    """Check that a pipeline is of a supported class.

    Args:
        source: as the user named it, for messages.
        index: content of its ``model_index.json``, or its folder; a damaged file is left to the loader.
        pixels: whether pixel-space pipelines are accepted too.

    Raises:
        UserError: it is of another class; the message lists the supported ones.
    """
    if isinstance(index, Path):
        try:
            index = dict(json.loads((index / INDEX).read_text()))
        except (OSError, ValueError, TypeError):
            return
    name = class_name(index)
    if name in LATENTS or (pixels and name in PIXELS):
        return
    of_pixels = f", or a pixel-space one ({', '.join(PIXELS)})" if pixels else ""
    raise UserError(f"{source} is a {name}: expected a {' or a '.join(LATENTS)}{of_pixels}{_remedy(source, name)}.")


def _remedy(source: str, name: str) -> str:
    plain = name.replace("Img2Img", "")
    if plain in LATENTS:
        return (
            f"; if it has the parts of a {plain}, convert it with diffusers' "
            f"`{plain}.from_pretrained({source!r}).save_pretrained(FOLDER)`"
        )
    spec = importlib.util.find_spec("diffusers")
    known = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""
    if f'"{name}"' in known:
        return ""
    return f"; if your {name} derives from one of these, write that class as _class_name into model_index.json"


def file_names(location: str) -> list[str]:
    """Return the files of a pipeline in a folder or on the hub, such as ``unet/config.json``; empty if unknown."""
    folder = Path(location)
    if folder.is_dir():
        return [file.relative_to(folder).as_posix() for file in sorted(folder.glob("*/*"))]
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(location)
    except Exception:  # network or hub failure, or an invalid id: the loader gives the better error
        return []


def variants_of(names: Collection[str], parts: Collection[str]) -> dict[str, set[str | None]]:
    """Return the weights variants of each part of a pipeline, None for plain weights; parts without any are left out.

    Args:
        names: of its files; see :func:`file_names`.
        parts: of the pipeline.
    """
    found: dict[str, set[str | None]] = {}
    for name in names:
        part, _, file = name.rpartition("/")
        weights = _WEIGHTS.fullmatch(file)
        if weights is not None and part in parts:
            found.setdefault(part, set()).add(weights["variant"])
    return found


def choose_variant(source: str, names: Collection[str], index: Mapping[str, Any], asked: str | None) -> str | None:
    """Return the weights variant of a pipeline to load: the requested one, or the only one.

    Parts that lack the variant use plain weights, as in diffusers.

    Args:
        source: as the user named it, for messages.
        names: of its files; see :func:`file_names`.
        index: content of its ``model_index.json``.
        asked: a variant such as ``fp16``; None for plain weights.

    Raises:
        UserError: it has no such variant, or no plain weights and several variants.
    """
    parts = [name for name, value in index.items() if isinstance(value, list | tuple) and name not in _UNUSED]
    found = variants_of(names, parts)
    if not found:
        return asked

    def complete(variant: str | None) -> bool:
        return all(variant in of_part or None in of_part for of_part in found.values())

    some = sorted({variant for of_part in found.values() for variant in of_part if variant is not None})
    usable = [variant for variant in some if complete(variant)]
    others = " or ".join(f"--variant {variant}" for variant in usable)
    if asked is not None:
        if asked in usable:
            return asked
        instead = "leave out --variant" if complete(None) else ""
        remedies = " or ".join(filter(None, [f"give {others}" if others else "", instead]))
        raise UserError(
            f"{source} has no {asked!r} weights, only {_listed(some, plain=complete(None))}: "
            f"{remedies or 'save it whole'} (model.variant in a recipe)."
        )
    if complete(None) or not usable:
        return None
    if len(usable) > 1:
        raise UserError(
            f"{source} has no plain weights, only {_listed(some, plain=False)}: give {others} (model.variant in a "
            "recipe)."
        )
    warnings.warn(f"{source} only has {usable[0]!r} weights, so these are used.", stacklevel=2)
    return usable[0]


def check_variant(run: str, variant: str | None) -> None:
    """Check that a local pipeline folder has the requested variant, if any.

    Raises:
        UserError: as for :func:`choose_variant`.
    """
    folder = Path(run).expanduser()
    if variant is None or (folder / "config.yaml").is_file():
        return
    try:
        index = dict(json.loads((folder / INDEX).read_text()))
    except (OSError, ValueError, TypeError):
        return
    choose_variant(run, file_names(str(folder)), index, variant)


def _listed(variants: Sequence[str], *, plain: bool) -> str:
    names = [*(["plain weights"] if plain else []), *map(repr, variants)]
    return " and ".join(names) or "none that diffusers knows"


def weights_in(pipeline: Path) -> int | None:
    """Return the number of weights of a saved pipeline's network, read from its safetensors; None without any."""
    files = [file for part in ("unet", "transformer") for file in sorted((pipeline / part).glob("*.safetensors"))]
    tensors = [one for file in files for name, one in _header(file).items() if name != "__metadata__"]
    return sum(math.prod(one["shape"]) for one in tensors) or None


def is_single_file(run: str) -> bool:
    """Whether a run is a single-file checkpoint of a whole pipeline, as shared outside of diffusers."""
    path = Path(run).expanduser()
    return path.suffix in (".safetensors", ".ckpt") and path.is_file() and not _is_lora(path)


def no_pipeline(run: str) -> UserError:
    """Return the error for an existing file or folder that is neither a training folder nor a pipeline."""
    path = Path(run).expanduser()
    if _is_lora(path):
        return UserError(f"{run} contains only LoRA weights: {_remedy_of_lora(run, path)}")
    if path.is_file():
        return UserError(
            f"{run} is not a run, which is a folder or a whole pipeline in one file (.safetensors, .ckpt): "
            "convert the file to a folder with "
            f"`StableDiffusionPipeline.from_single_file({run!r}).save_pretrained(FOLDER)` of diffusers, or the "
            "class of its family, and give that folder."
        )
    kind = _network(path)
    if kind is None:
        return UserError(f"{run} is neither a training folder (config.yaml) nor a pipeline ({INDEX}).")
    above = path.resolve().parent
    if (above / INDEX).is_file():
        return UserError(f"{run} is only a part of a pipeline ({kind}): give the folder above, {above}.")
    return UserError(
        f"{run} is only a part of a pipeline ({kind}): build the whole pipeline with `{_whole(kind)}`, and give "
        "that folder."
    )


def _whole(kind: str) -> str:
    """Return the diffusers call that builds a pipeline from a network."""
    if kind in ("UNet2DModel", "MLP2DModel", "ADMUNet2DModel"):
        return "DDPMPipeline(unet=NETWORK, scheduler=SCHEDULER).save_pretrained(FOLDER)"
    part = "unet" if kind.startswith("UNet") else "vae" if "Autoencoder" in kind else "transformer"
    if kind.startswith(("CLIP", "T5", "UMT5", "Gemma", "Glm", "Qwen2")):
        part = "text_encoder"
    return f"DiffusionPipeline.from_pretrained(PIPELINE, {part}=NETWORK).save_pretrained(FOLDER)"


def _network(folder: Path) -> str | None:
    """Return the class of the network saved in a folder, or None."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return str(config.get("_class_name") or config["architectures"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _is_lora(path: Path) -> bool:
    if path.is_dir():
        return (path / LORA).is_file() or (path / "adapter_config.json").is_file()
    if path.suffix != ".safetensors":
        return False
    return any("lora" in name.lower() for name in _header(path))


def _header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file, its tensors by name; empty if it cannot be read."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            found: dict[str, Any] = json.loads(opened.read(min(length, 2**26)))
    except (OSError, ValueError, struct.error):
        return {}
    return found


def _remedy_of_lora(run: str, path: Path) -> str:
    above = path.resolve().parent
    for folder in (above, above.parent):
        if (folder / "config.yaml").is_file():
            return f"give the training folder, {folder}, which names their pipeline."
    return (
        f"load them into their pipeline with `pipeline.load_lora_weights({run!r})` and `pipeline.fuse_lora()` of "
        "diffusers, save it with `pipeline.save_pretrained(FOLDER)`, and give that folder."
    )
