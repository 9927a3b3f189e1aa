"""A denoiser small enough to train on a CPU in seconds."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

__all__ = ["MLP2DModel"]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, width)
        self.project = nn.Linear(width, width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return hidden + self.project(nn.functional.silu(self.expand(self.norm(hidden) + embedding)))


class MLP2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A residual MLP on flattened images, with the interface of ``UNet2DModel``.

    ``DiffusionPipeline.from_pretrained`` loads a pipeline with this network once ``atdiff.models.mlp`` is imported.

    Args:
        sample_size: height and width of the image in pixels.
        in_channels: channels of ``x_t``.
        out_channels: channels of the output; twice ``in_channels`` for a learned variance.
        width: width of the hidden layers.
        num_blocks: number of residual blocks.
        num_class_embeds: number of classes (including the null label, if any) for class-conditional training.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        out_channels: int = 1,
        width: int = 256,
        num_blocks: int = 3,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        pixels = sample_size * sample_size
        self.time_proj = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(64, width)
        self.class_embedding = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.proj_in = nn.Linear(in_channels * pixels, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(num_blocks))
        self.proj_out = nn.Linear(width, out_channels * pixels)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Return the prediction for ``sample`` ``(B, C, H, W)`` at ``timestep`` (a number or ``(B,)``).

        Raises:
            ValueError: class labels are given to an unconditional network, or missing from a conditional one.
        """
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                "class_labels must be given exactly when num_class_embeds is set; got "
                f"class_labels={'None' if class_labels is None else 'a tensor'}, "
                f"num_class_embeds={self.config['num_class_embeds']}."
            )
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        embedding = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        hidden = self.proj_in(sample.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        output = self.proj_out(hidden).view(sample.shape[0], -1, *sample.shape[2:])
        return UNet2DOutput(sample=output) if return_dict else (output,)
