"""Networks by name."""

from __future__ import annotations

from typing import Any

from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from atdiff.core.errors import UserError
from atdiff.models.call import keep_labels
from atdiff.models.guided_diffusion import ADM_CIFAR10, adm_unet
from atdiff.models.mlp import MLP2DModel

__all__ = ["build_model"]


def build_model(
    name: str,
    args: dict[str, Any],
    *,
    image_shape: tuple[int, int, int],
    learned_variance: bool = False,
    num_class_embeds: int | None = None,
) -> nn.Module:
    """Build an untrained denoiser for images of ``image_shape`` ``(C, H, W)``.

    Args:
        name: ``mlp`` (:class:`MLP2DModel`), ``unet`` (``UNet2DModel``), ``dit`` (``DiTTransformer2DModel``,
            class-conditional) or ``adm`` (guided-diffusion's U-Net, by default at the paper's CIFAR-10 size).
        args: constructor arguments.
        image_shape: channels, height and width.
        learned_variance: double the output channels.
        num_class_embeds: for class-conditional networks, number of classes including the null label; a DiT adds its own
            null label.

    Raises:
        UserError: the name is unknown or the arguments are invalid.
    """
    channels, height, width = image_shape
    if height != width:
        raise UserError(f"images of {height}x{width} pixels are not square; set data.image_size to crop them.")
    outputs = channels * (2 if learned_variance else 1)
    try:
        if name == "adm":
            arch = {**ADM_CIFAR10, "num_classes": num_class_embeds, **args}
            return adm_unet(**{**arch, "image_size": height, "in_channels": channels, "out_channels": outputs})
        classes = {"mlp": MLP2DModel, "unet": UNet2DModel}
        shape = {"sample_size": height, "in_channels": channels, "out_channels": outputs}
        if name == "dit":
            return _dit(args, shape, num_class_embeds)
        if name not in classes:
            raise UserError(f"model {name!r} is unknown; expected one of mlp, unet, dit, adm.")
        model: nn.Module = classes[name](**shape, num_class_embeds=num_class_embeds, **args)
        return model
    except (TypeError, ValueError) as error:
        raise UserError(f"model {name!r} cannot be built from {args}: {' '.join(str(error).split())}") from None


def _dit(args: dict[str, Any], shape: dict[str, int], num_class_embeds: int | None) -> nn.Module:
    if num_class_embeds is None:
        raise UserError("model.name='dit' is conditioned on class labels; set data.class_conditional.")
    patch = args.get("patch_size", 2)
    if shape["sample_size"] % patch:
        raise UserError(
            f"images of {shape['sample_size']} pixels a side do not fit the DiT: expected a multiple of "
            f"patch_size={patch}; set data.image_size or model.args.patch_size."
        )
    model: Any = DiTTransformer2DModel(**shape, num_embeds_ada_norm=num_class_embeds, **args)
    keep_labels(model)
    return model
