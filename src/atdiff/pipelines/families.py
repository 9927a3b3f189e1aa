"""What differs between families of latent pipelines: their parts, their conditions, and the scale of their latents."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import LCMScheduler
from torch import Tensor

from atdiff.core.errors import UserError
from atdiff.core.noise import dynamic_mu, flow_shift
from atdiff.models.call import image_tokens
from atdiff.models.transformers import FluxDenoiser

__all__ = ["FAMILIES", "Asked", "Family", "absent_parts", "family_of", "known_class", "usual_guidance_scale"]


class Asked(NamedTuple):
    """What conditions depend on besides the prompts.

    Attributes:
        image_size: pixels along a side.
        tokens: how many a T5 cuts or fills a prompt to; None for the pipeline's own number.
        negative: whether it is what guidance points away from.
    """

    image_size: int
    tokens: int | None = None
    negative: bool = False


class Family:
    """Stable Diffusion 1.x and 2.x, and what the others have in common with it.

    Attributes:
        parts: of the pipeline that turn a prompt into conditions.
        network: the part that is trained.
        guidance_scale: with which images are drawn; diffusers' default, but for SDXL, which has that of SD.
        embeddings: names of what ``encode_prompt`` returns, in its order, as arguments of the pipeline's call.
        any_size: whether pictures of other sizes than the published one have fitting latents.
        has_t5: whether prompts go through a T5, or are filled up as if they did.
        lora_targets: ends of names of layers that get adapters; None for those of LCM-LoRA.
    """

    parts: tuple[str, ...] = ("tokenizer", "text_encoder")
    network = "unet"
    guidance_scale = 7.5
    embeddings: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    any_size = False
    has_t5 = False
    lora_targets: tuple[str, ...] | None = None

    def latent_shape(self, pipeline: Any, image_size: int | None = None) -> tuple[int, int, int]:  # noqa: ANN401
        """Channels, height and width of the latents of pictures of ``image_size``, or of the published size."""
        config = getattr(pipeline, self.network).config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if image_size is not None and self.any_size:
            height = width = image_size // pixels_per_latent(pipeline)
        return config.in_channels, height, width

    def is_guided(self, network: Any, guidance_scale: float) -> bool:  # noqa: ANN401
        """Whether a step takes the network twice at that guidance scale, with the prompt and without."""
        return guidance_scale > 1 and not self.is_told_guidance(network)

    def usual_guidance(self, network: Any, scheduler: Any) -> float:  # noqa: ANN401
        """Return the scale to draw with where nothing says another: none on top of a distilled network.

        A consistency model that is not told the scale was distilled from a guided teacher, and has it in its weights.
        """
        distilled = isinstance(scheduler, LCMScheduler)
        return 1.0 if distilled and not self.is_told_guidance(network) else self.guidance_scale

    def is_told_guidance(self, network: Any) -> bool:  # noqa: ANN401
        """Whether the scale is an input of the network."""
        return network.config.get("time_cond_proj_dim") is not None

    def conditions(self, pipeline: Any, prompts: list[str], asked: Asked) -> dict[str, Tensor]:  # noqa: ANN401
        """Return what the network is conditioned on, with a row a prompt."""
        return {"encoder_hidden_states": self._asked(pipeline, prompts, asked)[0].float()}

    def _asked(self, pipeline: Any, prompts: list[str], asked: Asked) -> Sequence[Tensor]:  # noqa: ANN401
        """Return the embeddings of prompts, or those that guidance points away from."""
        encoded = self._encode(pipeline, prompts, pipeline.text_encoder.device, asked.negative, asked.tokens)
        # SD gives (states, negative states), SDXL and SD3 the pooled pair after them.
        return encoded[int(asked.negative) :: 2]

    def _encode(
        self,
        pipeline: Any,  # noqa: ANN401
        prompts: list[str],
        device: torch.device,
        guided: bool,
        tokens: int | None,
    ) -> Sequence[Tensor]:
        """Return what the pipeline's ``encode_prompt`` does."""
        encoded: Sequence[Tensor] = pipeline.encode_prompt(device=device, **self._prompts(prompts, guided, tokens))
        return encoded

    def _prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        """Return the prompts, and whether guidance points away from any, as arguments of ``encode_prompt``."""
        return {"prompt": prompts, "num_images_per_prompt": 1, "do_classifier_free_guidance": guided}

    def latent_scale(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
        """Mean and factor with which the pipeline unscales latents."""
        return 0.0, vae.config.scaling_factor

    def call_options(self, pipeline: Any, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:  # noqa: ANN401
        """Return the prompts as arguments of the pipeline's call: tensors of a row a prompt."""
        found = self._encode(pipeline, prompts, getattr(pipeline, self.network).device, guided, tokens)
        return {name: table for name, table in zip(self.embeddings, found, strict=False) if table is not None}

    def timestep_shift(
        self,
        scheduler: Any,  # noqa: ANN401
        latent_shape: tuple[int, int, int],
        network: Any = None,  # noqa: ANN401
    ) -> float | None:
        """Return the shift of training's timesteps where the scheduler alone does not tell it."""
        return None


class StableDiffusionXL(Family):
    """SDXL: two text encoders, a pooled prompt and the picture's size."""

    parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    embeddings = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

    def conditions(self, pipeline: Any, prompts: list[str], asked: Asked) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`; ``time_ids`` are those of an uncropped picture."""
        states, pooled = self._asked(pipeline, prompts, asked)
        size = [asked.image_size, asked.image_size]
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=states.device)
        return {
            "encoder_hidden_states": states.float(),
            "text_embeds": pooled.float(),
            "time_ids": time_ids.repeat(len(prompts), 1),
        }

    def latent_scale(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
        """See :meth:`Family.latent_scale`; some autoencoders of SDXL have a mean and a scale a channel."""
        config = vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super().latent_scale(vae)
        columns = torch.tensor([mean, std], dtype=vae.dtype, device=vae.device).view(2, 1, -1, 1, 1)
        return columns[0], config.scaling_factor / columns[1]


def _t5_length(tokens: int | None) -> dict[str, int]:
    return {} if tokens is None else {"max_sequence_length": tokens}


class _Flow(Family):
    """What the transformers of text-to-image flows have in common."""

    network = "transformer"
    any_size = True
    has_t5 = True

    def latent_scale(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
        """See :meth:`Family.latent_scale`."""
        return vae.config.shift_factor or 0.0, vae.config.scaling_factor

    def timestep_shift(
        self,
        scheduler: Any,  # noqa: ANN401
        latent_shape: tuple[int, int, int],
        network: Any = None,  # noqa: ANN401
    ) -> float | None:
        """Return the dynamic shift that the pipelines have for that many tokens.

        Args:
            scheduler: of the pipeline.
            latent_shape: channels, height and width.
            network: whose tokens are counted; published ones have a token for 2 x 2 latents.
        """
        tokens = image_tokens(network, latent_shape)
        return None if dynamic_mu(scheduler, tokens) is None else flow_shift(scheduler, tokens)


# Queries, keys, values and outputs of pictures and of text, as in diffusers' train_dreambooth_lora_sd3.py.
_JOINT_ATTENTION = (
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
)  # fmt: skip


class StableDiffusion3(_Flow):
    """SD3 and SD3.5: two CLIPs, and a T5 that may be left out."""

    parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    guidance_scale = 7.0
    embeddings = StableDiffusionXL.embeddings
    lora_targets = _JOINT_ATTENTION

    def conditions(self, pipeline: Any, prompts: list[str], asked: Asked) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`."""
        states, pooled = self._asked(pipeline, prompts, asked)
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}

    def _prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        named = dict.fromkeys(("prompt", "prompt_2", "prompt_3"), prompts)
        return {**named, "do_classifier_free_guidance": guided, **_t5_length(tokens)}


class Flux(_Flow):
    """Flux: a CLIP for the pooled prompt, a T5, latents packed 2 x 2, and guidance that the network is told."""

    parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    guidance_scale = FluxDenoiser.guidance
    embeddings = ("prompt_embeds", "pooled_prompt_embeds")
    lora_targets = _JOINT_ATTENTION

    def latent_shape(self, pipeline: Any, image_size: int | None = None) -> tuple[int, int, int]:  # noqa: ANN401
        """See :meth:`Family.latent_shape`."""
        side = pipeline.default_sample_size if image_size is None else image_size // pixels_per_latent(pipeline)
        return pipeline.vae.config.latent_channels, side, side

    def is_guided(self, network: Any, guidance_scale: float) -> bool:  # noqa: ANN401
        """See :meth:`Family.is_guided`: the network is told the scale if anything, and is taken once."""
        return False

    def is_told_guidance(self, network: Any) -> bool:  # noqa: ANN401
        """See :meth:`Family.is_told_guidance`: Flux.1 dev is, Flux.1 schnell is not."""
        return bool(network.config.guidance_embeds)

    def usual_guidance(self, network: Any, scheduler: Any) -> float:  # noqa: ANN401
        """See :meth:`Family.usual_guidance`; 1, which is none, for a network that can have none."""
        return self.guidance_scale if self.is_told_guidance(network) else 1.0

    def conditions(self, pipeline: Any, prompts: list[str], asked: Asked) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`."""
        device = pipeline.text_encoder.device
        states, pooled, _ = self._encode(pipeline, prompts, device, asked.negative, asked.tokens)
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}

    def _prompts(self, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:
        """There is nothing that guidance points away from."""
        return {"prompt": prompts, "prompt_2": prompts, **_t5_length(tokens)}


class DiT(Family):
    """Class-conditional DiT: its prompts are numbers of classes. (`<https://arxiv.org/abs/2212.09748>`_)"""

    parts = ()
    network = "transformer"
    guidance_scale = 4.0
    embeddings = ("class_labels",)

    def conditions(self, pipeline: Any, prompts: list[str], asked: Asked) -> dict[str, Tensor]:  # noqa: ANN401
        """See :meth:`Family.conditions`; int64 ``class_labels``, the null label after the classes."""
        null = pipeline.transformer.config.num_embeds_ada_norm
        labels = [null if asked.negative else int(prompt) for prompt in prompts]
        return {"class_labels": torch.tensor(labels, device=pipeline.vae.device)}

    def call_options(self, pipeline: Any, prompts: list[str], guided: bool, tokens: int | None) -> dict[str, Any]:  # noqa: ANN401
        """See :meth:`Family.call_options`."""
        return {"class_labels": torch.tensor([int(prompt) for prompt in prompts])}


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "StableDiffusionPipeline": Family(),
        "StableDiffusionXLPipeline": StableDiffusionXL(),
        "StableDiffusion3Pipeline": StableDiffusion3(),
        "FluxPipeline": Flux(),
        "DiTPipeline": DiT(),
        "LatentConsistencyModelPipeline": Family(),
    }
)
"""By class of diffusers' pipeline."""


def absent_parts(index: Mapping[str, Any]) -> dict[str, None]:
    """Return the optional parts that a saved pipeline lacks, as arguments that tell its loader so.

    Args:
        index: what its ``model_index.json`` holds.
    """
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        return {}
    return {part: None for part in ("text_encoder_3", "tokenizer_3") if index.get(part, [None])[0] is None}


def known_class(cls: type, names: Collection[str]) -> str | None:
    """Return which of ``names`` a class is called, or the nearest class that it derives from; None for another."""
    return next((base.__name__ for base in cls.__mro__ if base.__name__ in names), None)


def family_of(pipeline: Any) -> Family:  # noqa: ANN401
    """Return the family of a loaded pipeline, of one of the classes of :data:`FAMILIES` or a class derived from one.

    Raises:
        UserError: it is of another class.
    """
    name = known_class(type(pipeline), FAMILIES)
    if name is None:
        raise UserError(f"a {type(pipeline).__name__} is not taken: expected a {' or a '.join(FAMILIES)}.")
    return FAMILIES[name]


def pixels_per_latent(pipeline: Any) -> int:  # noqa: ANN401
    """Pixels along the side of a latent."""
    return int(2 ** (len(pipeline.vae.config.block_out_channels) - 1))


def usual_guidance_scale(
    config: Mapping[str, Any],
    family: Family,
    network: Any,  # noqa: ANN401
    scheduler: Any,  # noqa: ANN401
) -> float:
    """Return the scale that the settings name, or the one that the network was made for."""
    trained, usual = config.get("consistency") or {}, family.usual_guidance(network, scheduler)
    said = trained.get("sample_guidance")
    if said is not None:
        return float(said)
    if trained.get("mode") == "distillation" and family.is_told_guidance(network):
        low, high = trained.get("guidance") or (usual, usual)
        return float(min(max(usual, low), high))
    return float((config.get("sampling") or {}).get("guidance_scale", usual))
