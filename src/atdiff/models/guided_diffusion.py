"""Import of guided-diffusion (ADM) U-Nets: the same network and weights as diffusers' ``UNet2DModel``.

(`Dhariwal and Nichol, 2021 <https://arxiv.org/abs/2105.05233>`_, `code <https://github.com/openai/guided-diffusion>`_.)
Checkpoints of improved-diffusion, ADM-IP, ADM-ES and ADM-AT share the format.
"""

from __future__ import annotations

import ast
import dataclasses
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

# DiffusionPipeline.from_pretrained looks this name up in the module of ADMUNet2DModel to learn how to load it.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from torch import Tensor

from atdiff.core.errors import UserError

__all__ = [
    "ADM_CIFAR10",
    "ADMArchitecture",
    "ADMUNet2DModel",
    "adm_unet",
    "convert_state_dict",
    "import_adm",
    "infer_arch",
    "published_noise",
    "read_adm_checkpoint",
]

ADM_CIFAR10: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 3,
    "model_channels": 128,
    "out_channels": 6,
    "num_res_blocks": 3,
    "attention_resolutions": (2, 4),
    "dropout": 0.3,
    "channel_mult": (1, 2, 2, 2),
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
}
"""The unconditional CIFAR-10 ADM with learned variance that ADM-IP, ADM-ES and ADM-AT share
(https://github.com/forever208/DDPM-IP); factors 2 and 4 put attention at 16 and 8 pixels."""

_NEW_HEADS: dict[str, Any] = {"num_head_channels": 64, "use_new_attention_order": True}

Noise = tuple[Literal["linear", "cosine"], int]

# By (model_channels, num_res_blocks, channel_mult, resblock_updown), from the READMEs of guided-diffusion,
# improved-diffusion and DDPM-IP: the arguments that weights do not determine, where they differ from the default of
# `infer_arch`, and the betas and timesteps of all published networks with these widths. Other networks of
# improved-diffusion take their 4,000 timesteps rescaled to 1,000.
_PUBLISHED: dict[tuple[int, int, tuple[float, ...], bool], tuple[dict[str, Any] | None, Noise]] = {
    (128, 3, (1, 2, 2, 2), True): (  # CIFAR-10, ImageNet-32 (ADM-IP, -ES, -AT)
        {key: ADM_CIFAR10[key] for key in ("image_size", "dropout", "num_head_channels", "use_new_attention_order")},
        ("cosine", 1000),
    ),
    # ImageNet-64, CelebA-64, LSUN tower
    (192, 3, (1, 2, 3, 4), True): ({"dropout": 0.1, **_NEW_HEADS}, ("cosine", 1000)),
    (256, 3, (1, 1, 2, 3, 4), True): ({"dropout": 0.1, **_NEW_HEADS}, ("cosine", 1000)),  # FFHQ-128
    (256, 2, (1, 1, 2, 3, 4), True): ({"num_heads": 4}, ("linear", 1000)),  # ImageNet-128
    (256, 2, (1, 1, 2, 2, 4, 4), True): (None, ("linear", 1000)),  # ImageNet-256, LSUN
    (256, 2, (0.5, 1, 1, 2, 2, 4, 4), True): (None, ("linear", 1000)),  # ImageNet-512
    # improved-diffusion: CIFAR-10, ImageNet-64, class-conditional ImageNet-64, LSUN bedroom
    (128, 3, (1, 2, 2, 2), False): ({"image_size": 32, "num_heads": 4}, ("cosine", 1000)),
    (128, 3, (1, 2, 3, 4), False): ({"num_heads": 4}, ("cosine", 1000)),
    (192, 3, (1, 2, 3, 4), False): ({"num_heads": 4}, ("cosine", 4000)),
    (128, 2, (1, 1, 2, 2, 4, 4), False): ({"num_heads": 1}, ("linear", 1000)),
}

_STEM = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}
_NORM_GROUPS = 32
_UNREADABLE = (
    OSError, EOFError, ValueError, RuntimeError,
    pickle.UnpicklingError, zipfile.BadZipFile, safetensors.SafetensorError,
)  # fmt: skip
_FLAT = "expected a flat dict of tensors as guided-diffusion saves it"


@dataclass(frozen=True, kw_only=True)
class ADMArchitecture:
    """The constructor arguments of guided-diffusion's ``UNetModel``, under their names there.

    ``attention_resolutions`` are downsampling factors (1, 2, 4, ...), not sizes in pixels. ``num_head_channels`` takes
    precedence over ``num_heads`` unless it is -1. ``use_checkpoint`` and ``use_fp16`` do not change the function and
    are ignored.

    Raises:
        UserError: a combination that no published checkpoint uses and ``UNet2DModel`` cannot express, widths that are
            not multiples of the norms' 32 groups, or heads that do not divide the width.
    """

    image_size: int
    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    dropout: float = 0.0
    channel_mult: Sequence[float] = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    num_classes: int | None = None
    use_checkpoint: bool = False
    use_fp16: bool = False
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False

    def __post_init__(self) -> None:
        if self.dims != 2:
            raise UserError(f"dims={self.dims} is not supported: expected 2, an image model.")
        if not self.conv_resample and not self.resblock_updown:
            raise UserError("conv_resample=False is not supported without resblock_updown: set one of them to true.")
        if self.num_head_channels == -1 and self.num_heads_upsample not in (-1, self.num_heads):
            raise UserError(
                f"num_heads_upsample={self.num_heads_upsample} is not supported: expected -1 or the value of "
                f"num_heads, {self.num_heads}."
            )
        for width in self.widths:
            if width < 1 or width % _NORM_GROUPS:
                raise UserError(
                    f"channel_mult={tuple(self.channel_mult)} times model_channels={self.model_channels} "
                    f"gives {width} channels: expected multiples of {_NORM_GROUPS}, the number of groups of the norms."
                )
        self._check_heads()

    def _check_heads(self) -> None:
        name = "num_heads" if self.num_head_channels == -1 else "num_head_channels"
        divisor = getattr(self, name)
        for width in self.attention_widths:
            if divisor < 1 or width % divisor:
                raise UserError(
                    f"{name}={divisor} does not divide the {width} channels of an attention layer: give the "
                    "num_head_channels or num_heads that the network was trained with."
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(int(factor * self.model_channels) for factor in self.channel_mult)

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether each level has attention, finest first."""
        return tuple(2**level in self.attention_resolutions for level in range(len(self.widths)))

    @property
    def attention_widths(self) -> tuple[int, ...]:
        """Channels of every level with attention; the middle block always has it."""
        return *(width for width, attends in zip(self.widths, self.attends, strict=True) if attends), self.widths[-1]

    @property
    def head_dims(self) -> set[int]:
        """The distinct numbers of channels per head."""
        return {width // self.heads(width) for width in self.attention_widths}

    @property
    def is_plain(self) -> bool:
        """Whether ``UNet2DModel`` can express this architecture."""
        same_heads = len(self.head_dims) == 1 or self.num_heads == 1
        return same_heads and self.widths[0] == self.model_channels

    def heads(self, width: int) -> int:
        """Return the number of attention heads at ``width`` channels."""
        return self.num_heads if self.num_head_channels == -1 else width // self.num_head_channels


class ADMUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` for the two kinds of architecture that the plain class cannot express.

    These are a fixed number of heads over levels of different width (the ImageNet-128 ADM), and a first level whose
    width is not ``model_channels`` (the ImageNet-512 ADM). ``DiffusionPipeline.from_pretrained`` loads a pipeline with
    this network wherever atdiff is installed; do not use ``UNet2DModel.from_pretrained``. ``arch`` holds the arguments
    of ``ADMArchitecture``.
    """

    @register_to_config
    def __init__(self, arch: dict[str, Any]) -> None:
        architecture = _architecture(arch)
        channels = architecture.model_channels
        super().__init__(**_unet_config(architecture), time_embedding_dim=4 * channels)
        self.add_module("time_proj", Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0))
        self.add_module("time_embedding", TimestepEmbedding(channels, 4 * channels))
        for module in self.modules():
            if isinstance(module, Attention):
                module.heads = module.sliceable_head_dim = architecture.heads(module.inner_dim)
                module.scale = (module.inner_dim // module.heads) ** -0.5


def adm_unet(**arch: Any) -> UNet2DModel:  # noqa: ANN401  (the fields of ADMArchitecture)
    """Build the network of guided-diffusion's ``UNetModel(**arch)``, untrained and in training mode.

    It maps ``(B, in_channels, H, W)``, H and W divisible by ``2 ** (len(channel_mult) - 1)``, timesteps ``(B,)`` and,
    with ``num_classes``, ``class_labels`` ``(B,)`` to ``(B, out_channels, H, W)``. It is a plain ``UNet2DModel``, or an
    ``ADMUNet2DModel`` if that cannot express the architecture. Arguments are those of ``ADMArchitecture``.

    Raises:
        UserError: an argument is unknown, missing or unsupported.
    """
    architecture = _architecture(arch)
    if architecture.is_plain:
        return UNet2DModel(**_unet_config(architecture))
    return ADMUNet2DModel(dataclasses.asdict(architecture))


def convert_state_dict(state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert the weights of guided-diffusion's ``UNetModel(**arch)`` to those of ``adm_unet(**arch)``.

    The rows of each qkv convolution are ordered ``(3, heads, channels)`` in the new attention order and
    ``(heads, 3, channels)`` in the legacy one; both become three linear layers.

    Raises:
        UserError: a key is missing, unexpected or has another shape than ``arch`` implies; names the first one.
    """
    architecture = _architecture(arch)
    _check_shapes(state_dict, architecture)
    renames = _renames(architecture)
    converted = {}
    for key, tensor in state_dict.items():
        module, _, parameter = key.rpartition(".")
        name = f"{renames[module]}.{parameter}"
        if module.endswith(".qkv"):
            for part, rows in zip("qkv", _split_qkv(tensor, architecture), strict=True):
                converted[name.replace("to_qkv", f"to_{part}")] = rows
        else:
            converted[name] = tensor.squeeze(-1) if key.endswith(".proj_out.weight") else tensor
    return converted


def read_adm_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a guided-diffusion state dict from a ``.pt`` / ``.pth``, ``.safetensors`` or ``.npz`` file.

    Pickles are read with ``weights_only=True``. If any keys start with ``state_dict.``, only those are kept, without
    the prefix.

    Raises:
        UserError: the file is missing, of an unknown type, unreadable, or not a flat dict of tensors.
    """
    path = Path(path)
    content = _read(path)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} contains no state dict: {_FLAT}.")
    prefix = "state_dict."
    prefixed = {key.removeprefix(prefix): value for key, value in content.items() if str(key).startswith(prefix)}
    state_dict = prefixed or dict(content)
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise UserError(f"The entry {key!r} of {path} is a {type(value).__name__}: {_FLAT}.")
    return state_dict


def infer_arch(state_dict: Mapping[str, Tensor], **overrides: Any) -> dict[str, Any]:  # noqa: ANN401
    """Infer the arguments of ``ADMArchitecture`` from guided-diffusion weights.

    Weights do not determine the heads, their order, dropout and image size. These come from ``overrides``, else from
    the flags published for networks with exactly these widths and blocks, else they default to ``num_head_channels`` 64
    in the legacy order, dropout 0, and the image size that has 8 pixels at the coarsest level, as in the ADMs of
    ImageNet-256 and LSUN.

    Args:
        state_dict: keys and shapes of guided-diffusion's ``UNetModel``.
        overrides: arguments of ``ADMArchitecture`` that replace inferred ones; None counts as not given.

    Raises:
        UserError: a key that the inference needs is missing.
    """
    arch = _inferred(state_dict)
    levels = arch["channel_mult"]
    checkpoint = (arch["model_channels"], arch["num_res_blocks"], levels, arch["resblock_updown"])
    rule = {"image_size": 8 * 2 ** (len(levels) - 1), "dropout": 0.0, "use_new_attention_order": False}
    untold = rule | (_PUBLISHED.get(checkpoint, (None, None))[0] or {"num_head_channels": 64})
    return _override(arch | untold, overrides)


def import_adm(path: Path, arch: Mapping[str, Any] | None = None, **overrides: Any) -> UNet2DModel:  # noqa: ANN401
    """Import a guided-diffusion checkpoint as a diffusers model in evaluation mode.

    Args:
        path: a file that ``read_adm_checkpoint`` can read.
        arch: the arguments of ``ADMArchitecture``. Defaults to the dict literal in the ``arch`` entry of an ``.npz``
            file, else to ``infer_arch``.
        overrides: individual arguments that take precedence over ``arch``; None counts as not given.

    Raises:
        UserError: the file or the architecture is unusable, or a key is missing, unexpected or mis-shaped.
    """
    path = Path(path)
    state_dict = read_adm_checkpoint(path)
    stored = arch if arch is not None else _stored_arch(path)
    arguments = infer_arch(state_dict, **overrides) if stored is None else _override(stored, overrides)
    converted = convert_state_dict(state_dict, arguments)
    unet = adm_unet(**arguments)
    unet.load_state_dict(converted, strict=True)
    return unet.eval()


def published_noise(unet: UNet2DModel) -> Noise | None:
    """Return the betas and number of timesteps that all published networks of this architecture were trained with.

    Weights do not determine them. None if no network with these widths and blocks is published, or if the network takes
    more than ``x_t`` (an upsampler).
    """
    config: Any = unet.config
    channels = unet.time_embedding.linear_1.in_features
    if config.in_channels != 3:
        return None
    factors = tuple(width / channels for width in config.block_out_channels)  # 1.0 matches the key 1
    checkpoint = (channels, config.layers_per_block, factors, config.downsample_type == "resnet")
    return _PUBLISHED.get(checkpoint, (None, None))[1]


def _architecture(arch: Mapping[str, Any]) -> ADMArchitecture:
    try:
        return ADMArchitecture(**arch)
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(ADMArchitecture))
        reason = str(error).removeprefix("ADMArchitecture.__init__() ")
        raise UserError(f"The architecture of the checkpoint {reason}: expected values for {known}.") from error


def _override(arch: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    # num_head_channels takes precedence, so overriding num_heads alone has to disable it.
    given = {name: value for name, value in overrides.items() if value is not None}
    silenced = {"num_head_channels": -1} if "num_heads" in given else {}
    return {**arch, **silenced, **given}


def _unet_config(arch: ADMArchitecture) -> dict[str, Any]:
    """Return the ``UNet2DModel`` arguments for an architecture, as far as they can express it."""
    resample, middle = ("resnet", "sample") if arch.resblock_updown else ("conv", "")
    prefix = "Resnet" if arch.resblock_updown else ""
    down, up = f"{prefix}Down{middle}Block2D", f"{prefix}Up{middle}Block2D"
    return {
        "sample_size": arch.image_size,
        "in_channels": arch.in_channels,
        "out_channels": arch.out_channels,
        "block_out_channels": arch.widths,
        "layers_per_block": arch.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if attends else down for attends in arch.attends),
        "up_block_types": tuple("AttnUpBlock2D" if attends else up for attends in reversed(arch.attends)),
        "downsample_type": resample,
        "upsample_type": resample,
        "downsample_padding": 1,
        "dropout": arch.dropout,
        # None means one head per width: correct for num_heads=1, and otherwise ADMUNet2DModel sets the heads.
        "attention_head_dim": min(arch.head_dims) if len(arch.head_dims) == 1 else None,
        "norm_num_groups": _NORM_GROUPS,
        # By default, scale_shift leaves the middle attention without a norm.
        "attn_norm_num_groups": _NORM_GROUPS,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if arch.use_scale_shift_norm else "default",
        "num_class_embeds": arch.num_classes,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def _renames(arch: ADMArchitecture) -> dict[str, str]:
    """Map guided-diffusion's module names to those of diffusers; qkv maps to a placeholder, ``to_qkv``."""
    renames = dict(_STEM)
    for kind, old, new in _blocks(arch):
        renames |= {f"{old}.{old_part}": f"{new}.{new_part}" for old_part, new_part in kind.items()}
    return renames


def _blocks(arch: ADMArchitecture) -> Iterator[tuple[dict[str, str], str, str]]:
    """Yield every block but the stem: its parts, and its names in guided-diffusion and diffusers."""
    per_level, last = arch.num_res_blocks + 1, len(arch.attends) - 1  # the last block of a level resamples
    for level, attends in enumerate(arch.attends):
        new, end = f"down_blocks.{level}", (level + 1) * per_level
        yield from _layers("input_blocks", end - arch.num_res_blocks, end, new, attends)
        if level < last:
            kind = _RESNET if arch.resblock_updown else {"op": "conv"}
            yield kind, f"input_blocks.{end}.0", f"{new}.downsamplers.0"
    yield _RESNET, "middle_block.0", "mid_block.resnets.0"
    yield _ATTENTION, "middle_block.1", "mid_block.attentions.0"
    yield _RESNET, "middle_block.2", "mid_block.resnets.1"
    for step, attends in enumerate(reversed(arch.attends)):
        new, end = f"up_blocks.{step}", (step + 1) * per_level
        yield from _layers("output_blocks", end - per_level, end, new, attends)
        if step < last:
            kind = _RESNET if arch.resblock_updown else {"conv": "conv"}
            yield kind, f"output_blocks.{end - 1}.{1 + attends}", f"{new}.upsamplers.0"


def _layers(old: str, first: int, end: int, new: str, attends: bool) -> Iterator[tuple[dict[str, str], str, str]]:
    for layer, number in enumerate(range(first, end)):
        yield _RESNET, f"{old}.{number}.0", f"{new}.resnets.{layer}"
        if attends:
            yield _ATTENTION, f"{old}.{number}.1", f"{new}.attentions.{layer}"


def _split_qkv(tensor: Tensor, arch: ADMArchitecture) -> list[Tensor]:
    """Split a qkv convolution's weight ``(3C, C, 1)`` or bias ``(3C,)`` into those of q, k and v."""
    rows = tensor.squeeze(-1) if tensor.ndim == 3 else tensor
    heads = arch.heads(len(rows) // 3)
    if arch.use_new_attention_order:
        parts = rows.unflatten(0, (3, heads, -1)).unbind(0)
    else:
        parts = rows.unflatten(0, (heads, 3, -1)).unbind(1)
    return [part.flatten(0, 1) for part in parts]


def _expected_shapes(arch: ADMArchitecture) -> dict[str, tuple[int, ...]]:
    """Return the guided-diffusion keys and shapes of an architecture, derived from the diffusers model."""
    with torch.device("meta"):
        weights = adm_unet(**dataclasses.asdict(arch)).state_dict()
    originals = {new: old for old, new in _renames(arch).items()}
    shapes = {}
    for key, tensor in weights.items():
        module, _, parameter = key.rpartition(".")
        if module.endswith((".to_k", ".to_v")):
            continue
        shape = tuple(tensor.shape)
        if module.endswith(".to_q"):
            module, shape = module.removesuffix("q") + "qkv", (3 * shape[0], *shape[1:])
        original = originals[module]
        if original.endswith((".qkv", ".proj_out")) and parameter == "weight":
            shape = (*shape, 1)
        shapes[f"{original}.{parameter}"] = shape
    return shapes


def _check_shapes(state_dict: Mapping[str, Tensor], arch: ADMArchitecture) -> None:
    expected = _expected_shapes(arch)
    fix = "give the architecture that the network was trained with, or an intact checkpoint"
    for key, shape in expected.items():
        if key not in state_dict:
            raise UserError(f"The key {key!r} is missing from the checkpoint: {fix}.")
        if tuple(state_dict[key].shape) != shape:
            found = tuple(state_dict[key].shape)
            raise UserError(f"The key {key!r} of the checkpoint has shape {found} where {shape} is expected: {fix}.")
    for key in state_dict:
        if key not in expected:
            raise UserError(f"The key {key!r} of the checkpoint is not part of the network: {fix}.")


def _weight(state_dict: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    """Return the shape of a weight, which must exist with ``ndim`` axes."""
    if key not in state_dict or state_dict[key].ndim != ndim:
        raise UserError(
            f"The checkpoint has no {ndim}-dimensional key {key!r}: expected the state dict of a "
            "guided-diffusion UNetModel."
        )
    return tuple(state_dict[key].shape)


def _inferred(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the arguments that the weights determine."""
    model_channels = _weight(state_dict, "time_embed.0.weight", 2)[1]
    levels, num_res_blocks, resblock_updown = _inferred_levels(state_dict)
    first_blocks = [f"input_blocks.{1 + level * (num_res_blocks + 1)}" for level in range(levels)]
    widths = [_weight(state_dict, f"{block}.0.out_layers.3.weight", 4)[0] for block in first_blocks]
    factors = (width / model_channels for width in widths)
    embedding = _weight(state_dict, f"{first_blocks[0]}.0.emb_layers.1.weight", 2)[0]
    classes = _weight(state_dict, "label_emb.weight", 2)[0] if "label_emb.weight" in state_dict else None
    return {
        "in_channels": _weight(state_dict, "input_blocks.0.0.weight", 4)[1],
        "model_channels": model_channels,
        "out_channels": _weight(state_dict, "out.2.weight", 4)[0],
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": tuple(
            2**level for level, block in enumerate(first_blocks) if f"{block}.1.qkv.weight" in state_dict
        ),
        "channel_mult": tuple(int(factor) if factor.is_integer() else factor for factor in factors),
        "num_classes": classes,
        "use_scale_shift_norm": embedding == 2 * widths[0],
        "resblock_updown": resblock_updown,
    }


def _inferred_levels(state_dict: Mapping[str, Tensor]) -> tuple[int, int, bool]:
    """Return the number of levels, the residual blocks per level, and whether residual blocks resample."""
    _weight(state_dict, "output_blocks.0.0.out_layers.3.weight", 4)
    blocks = 1 + max(int(match[1]) for key in state_dict if (match := re.match(r"output_blocks\.(\d+)\.", key)))
    upsamplings = [
        (int(match[1]), match[2] == "in_layers")
        for key in state_dict
        if (match := re.match(r"output_blocks\.(\d+)\.[12]\.(in_layers|conv)\.", key))
    ]
    last, resblock_updown = min(upsamplings, default=(blocks - 1, False))
    if blocks % (last + 1):
        raise UserError(
            f"The checkpoint has {blocks} output blocks, of which number {last} is the first to upsample: "
            "expected levels of equal length, so give an intact guided-diffusion checkpoint."
        )
    return blocks // (last + 1), last, resblock_updown


def _read(path: Path) -> Any:  # noqa: ANN401  (a pickle holds anything)
    pickled = partial(torch.load, map_location="cpu", weights_only=True)
    readers: dict[str, Callable[[Path], Any]] = {
        ".pt": pickled, ".pth": pickled, ".safetensors": safetensors.torch.load_file, ".npz": _read_npz,
    }  # fmt: skip
    if path.suffix not in readers:
        raise UserError(f"{path} has an unknown suffix: expected a file ending in {', '.join(readers)}.")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the path of a guided-diffusion checkpoint.")
    try:
        return readers[path.suffix](path)
    except _UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read as weights in {path.suffix} format ({type(error).__name__}): "
            "give an intact guided-diffusion checkpoint."
        ) from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "fiub"}


def _stored_arch(path: Path) -> dict[str, Any] | None:
    """Return the dict literal in the ``arch`` entry of an ``.npz`` file, if there is one."""
    if path.suffix != ".npz":
        return None
    with np.load(path, allow_pickle=False) as arrays:
        if "arch" not in arrays.files:
            return None
        literal = str(arrays["arch"])
    try:
        return dict(ast.literal_eval(literal))
    except (ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"The entry 'arch' of {path} is {literal!r}: expected a Python literal of a dict.") from error
