"""CLIP score: how well images match their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atdiff.core.errors import UserError
from atdiff.metrics.accumulator import Accumulator, Against, unknown_class
from atdiff.metrics.registry import CLIP_MODEL
from atdiff.system.locate import offline_reason
from atdiff.system.quiet import quiet_libraries

__all__ = ["ClipNetwork", "ClipScore"]

CLIP_SCORE, HUB_ID = CLIP_MODEL


class ClipScore(Accumulator):
    """The mean of ``100 cos(image, prompt)`` (`Hessel et al., 2021 <https://arxiv.org/abs/2104.08718>`_, without its
    factor 2.5), by torchmetrics' ``CLIPScore``, summed in float64.
    """

    @classmethod
    def load(cls, against: Against) -> ClipNetwork:
        """Load the CLIP model from the folder given as ``clip-score`` weights, else download it."""
        return _load(against.weights.get(CLIP_SCORE)).to(against.device)

    @classmethod
    def check(cls, against: Against, num: int, labels: Tensor | None) -> None:
        """Raise ``UserError`` if there are several prompts and labels are missing or have no prompt."""
        prompts = against.prompts
        if len(prompts) == 1:
            return
        if labels is None or len(labels) != num:
            raise UserError(f"{len(prompts)} prompts need a class label for each of the {num} images.")
        if (unknown := unknown_class(labels, len(prompts))) is not None:
            raise UserError(f"class {unknown} has no prompt: expected one prompt per class, got {list(prompts)}.")

    def __init__(self, against: Against, num: int, kept: Any = None) -> None:  # noqa: ANN401
        from torchmetrics.multimodal import CLIPScore  # from the clip extra

        super().__init__(against, num, kept)
        network: ClipNetwork = against.loaded
        load: Any = lambda: (network, network.processor)  # noqa: E731  (Any: it is declared as transformers' classes)
        self.metric: Any = CLIPScore(model_name_or_path=load).to(against.device)
        if self.metric.score.device.type != "mps":  # MPS has no float64
            self.metric.score = self.metric.score.double()

    @torch.no_grad()
    def add(self, values: Tensor, labels: Tensor | None) -> None:
        """Add uint8 images ``(B, C, H, W)`` and, if there are several prompts, their classes ``(B,)``."""
        prompts, images = self.against.prompts, values
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if len(prompts) == 1:
            asked = [prompts[0]] * len(images)
        else:
            assert labels is not None
            asked = [prompts[int(label)] for label in labels]
        self.metric.update(images.to(self.against.device), asked)

    def figures(self, seed: int) -> dict[str, float]:
        """Return the mean over all images."""
        return {"clip_score": self.metric.compute().item()}


class ClipNetwork(nn.Module):
    """A CLIP model whose features are tensors, as torchmetrics expects; transformers 5 wraps them."""

    def __init__(self, model: Any, processor: Any) -> None:  # noqa: ANN401  (of transformers)
        super().__init__()
        self.model, self.config, self.processor = model, model.config, processor

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """Return embeddings of images, ``(N, D)``."""
        return _pooled(self.model.get_image_features(pixels))

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings of texts, ``(N, D)``."""
        return _pooled(self.model.get_text_features(ids, attention_mask=mask))


def _pooled(output: Any) -> Tensor:  # noqa: ANN401
    return output if isinstance(output, Tensor) else output.pooler_output


def _load(weights: Path | None) -> ClipNetwork:
    from transformers import CLIPModel, CLIPProcessor

    source = HUB_ID if weights is None else str(weights)
    # A local folder is never looked up on the hub, and nothing in it is unpickled.
    options: dict[str, Any] = {"local_files_only": weights is not None or offline_reason() is not None}
    network: Any = CLIPModel
    try:
        with quiet_libraries():
            model, notes = network.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
            processor = CLIPProcessor.from_pretrained(source, **options)
    except Exception as error:  # the loader and its network stack raise many unrelated types
        reason = (weights is None and offline_reason()) or " ".join(str(error).split())[:200]
        raise UserError(
            f"the CLIP model {source} of clip_score cannot be loaded ({reason}): save {HUB_ID}, as safetensors and "
            f"with its tokenizer, and give the path of that folder as weights of {CLIP_SCORE}."
        ) from error
    if notes["missing_keys"]:
        raise UserError(f"{source} does not contain the weights of a CLIP model: its tensors do not match.")
    return ClipNetwork(model.eval(), processor)
