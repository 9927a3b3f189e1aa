"""Low-rank adapters (LoRA) of a network: adding, checkpointing and saving them for plain diffusers."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from atdiff.core.errors import UserError
from atdiff.pipelines.families import as_diffusers
from atdiff.pipelines.families.sd import UNET_LORA_TARGETS
from atdiff.pipelines.latent_model import LatentPipeline
from atdiff.system.files import written_aside
from atdiff.system.fingerprint import fingerprint
from atdiff.system.quiet import quiet_libraries

__all__ = [
    "TARGET_MODULES", "add_lora", "frozen_fingerprint", "kohya_lora", "load_lora", "load_lora_state", "lora_state",
    "save_lora",
]  # fmt: skip

TARGET_MODULES = UNET_LORA_TARGETS
ADAPTER = "default"
WEIGHTS = "pytorch_lora_weights.safetensors"
KOHYA = "kohya_lora_weights.safetensors"  # if both files exist, diffusers loads its own


def add_lora(
    unet: Any,  # noqa: ANN401  (a network of diffusers)
    *,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] = TARGET_MODULES,
    dropout: float = 0.0,
) -> None:
    """Freeze a network and add low-rank adapters, in place; only their float32 weights are trained.

    An adapter adds ``alpha / rank * B A x`` to the output of a layer. ``B`` starts at zero, so the network's function
    is unchanged at first; ``A`` is drawn from torch's global generator. (`LoRA <https://arxiv.org/abs/2106.09685>`_,
    `LCM-LoRA <https://arxiv.org/abs/2311.05556>`_)

    Args:
        unet: the network.
        rank: rank of every adapter.
        alpha: see above; equal to ``rank`` when None.
        target_modules: suffixes of the names of the layers that get one.
        dropout: probability of dropping each entry of an adapter's input in training.

    Raises:
        UserError: a number is out of range, a target matches no layer, or peft is not installed.
    """
    if rank < 1:
        raise UserError(f"the LoRA rank is {rank}: expected 1 or more; 64 is usual.")
    if alpha is not None and alpha <= 0:
        raise UserError(f"the LoRA alpha is {alpha}: expected a number above 0; the rank is usual.")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"the LoRA dropout is {dropout}: expected 0 or more and less than 1.")
    _require_adapters(unet)
    _check_targets(unet, target_modules)
    _require_peft()
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.requires_grad_(False)
    scale: Any = rank if alpha is None else alpha  # peft annotates int, but accepts any number
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=list(target_modules), lora_dropout=dropout)
    unet.add_adapter(config, adapter_name=ADAPTER)
    cast_training_params(unet, dtype=torch.float32)


def lora_state(unet: Any) -> dict[str, Tensor]:  # noqa: ANN401  (a network of diffusers)
    """Return only the weights of the adapters, for a checkpoint; they share memory with the network's."""
    from peft import get_peft_model_state_dict

    return {name: weight.detach() for name, weight in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items()}


def frozen_fingerprint(unet: nn.Module) -> str:
    """Return the SHA-256 of the weights under the adapters, the same before and after adapters are added.

    See :func:`atdiff.system.fingerprint.fingerprint`.
    """
    weights = unet.named_parameters()
    return fingerprint({name.replace(".base_layer.", "."): one for name, one in weights if ".lora_" not in name})


def load_lora_state(unet: Any, state: Mapping[str, Tensor]) -> None:  # noqa: ANN401  (a network of diffusers)
    """Load the result of :func:`lora_state` into a network with the same adapters."""
    from peft import set_peft_model_state_dict

    differing = set(state) ^ set(lora_state(unet))
    assert not differing, sorted(differing)
    set_peft_model_state_dict(unet, dict(state), adapter_name=ADAPTER)


def save_lora(folder: Path, latent: LatentPipeline, unet: Any, scheduler: Any) -> None:  # noqa: ANN401
    """Save the adapters in the format of plain diffusers' ``load_lora_weights``, with the scheduler beside them.

    ``alpha / rank`` is folded into the saved weights, since not every version of diffusers reads it from a file. Once
    complete, the folder has ``pytorch_lora_weights.safetensors``, ``scheduler/``, the one to sample with, and, if
    ComfyUI and AUTOMATIC1111 do not read the former, ``kohya_lora_weights.safetensors`` (:func:`kohya_lora`).
    """
    config = unet.peft_config[ADAPTER]
    scale = config.lora_alpha / config.r
    state = {name: weight * scale if ".lora_B." in name else weight for name, weight in lora_state(unet).items()}
    with written_aside(folder) as partial:
        # Keep peft's names: diffusers' convert_state_dict_to_diffusers renames only those of attention, and its loader,
        # which goes by the first name, then drops them.
        layers = {f"{latent.family.network}_lora_layers": state}
        type(latent.pipeline).save_lora_weights(partial, **layers, safe_serialization=True)
        scheduler.save_pretrained(partial / "scheduler")
        kohya = kohya_lora(latent, unet)
        if kohya is not None:
            save_file(kohya[0], partial / KOHYA, metadata=kohya[1])


def kohya_lora(latent: LatentPipeline, unet: Any) -> tuple[dict[str, Tensor], dict[str, str]] | None:  # noqa: ANN401
    """Return the adapters under the names of kohya's trainer, and its metadata; None if diffusers' names will do.

    Layer ``L`` becomes ``lora_unet_L`` with underscores for dots, with the weights ``.lora_down.weight``,
    ``.lora_up.weight`` and ``.alpha``, which the reader divides by the rank. (`sd-scripts
    <https://github.com/kohya-ss/sd-scripts/blob/main/networks/lora.py>`_)
    """
    config, family = unet.peft_config[ADAPTER], latent.family
    found: dict[str, Tensor] = {}
    for name, weight in lora_state(unet).items():
        layer, _, which = name.rpartition(".lora_")
        own = family.kohya_layer(layer, unet)
        if own is None:
            return None
        prefix = f"lora_unet_{own.replace('.', '_')}"
        found[f"{prefix}.lora_{'down' if which == 'A.weight' else 'up'}.weight"] = weight.cpu().contiguous()
        found[f"{prefix}.alpha"] = torch.tensor(float(config.lora_alpha))
    version = family.kohya_version(unet, latent.prediction_type)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(float(config.lora_alpha)),
        "ss_v2": str((version or "").startswith("sd_v2")),
    }
    return found, metadata if version is None else {**metadata, "ss_base_model_version": version}


def load_lora(latent: LatentPipeline, folder: Path) -> None:
    """Load saved adapters and their scheduler onto a pipeline, in place.

    Raises:
        UserError: the folder has no such files, they belong to another network, or peft is not installed.
    """
    if not (folder / WEIGHTS).is_file() or not (folder / "scheduler").is_dir():
        raise UserError(f"{folder} contains no LoRA weights: expected {WEIGHTS} and scheduler/.")
    _require_peft()
    try:
        with quiet_libraries():  # it warns that the text encoders have no adapters
            latent.pipeline.load_lora_weights(str(folder), weight_name=WEIGHTS)
    except Exception as error:  # peft, safetensors and the loaders raise many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the LoRA weights in {folder} cannot be loaded onto {latent.source} ({reason}): give the pipeline "
            "that they were trained on."
        ) from error
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    latent.pipeline.register_modules(scheduler=getattr(diffusers, name).from_pretrained(folder / "scheduler"))


def _require_peft() -> None:
    if importlib.util.find_spec("peft") is None:  # part of the lcm extra
        raise UserError("LoRA needs the package peft: pip install 'atdiff[lcm]'.")


def _require_adapters(network: nn.Module) -> None:
    if not hasattr(network, "add_adapter"):
        name = type(as_diffusers(network)).__name__
        raise UserError(f"diffusers does not support LoRA for {name}: leave out lora.rank to train all weights.")


def _check_targets(unet: nn.Module, targets: Sequence[str]) -> None:
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not targets:
        raise UserError("the list of LoRA target modules is empty: expected layer-name suffixes, such as to_q.")
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in layers} - {"0", "2"})
            nearest = difflib.get_close_matches(target, kinds, n=3, cutoff=0.0)
            raise UserError(
                f"no layer matches the LoRA target {target!r}: expected layer-name suffixes, such as {nearest}."
            )
