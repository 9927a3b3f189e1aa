"""CLIP score: how well pictures fit their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atdiff.core.errors import UserError
from atdiff.system.locate import offline_reason
from atdiff.system.quiet import quiet_libraries

__all__ = ["CLIP_SCORE", "ClipScore"]

CLIP_SCORE = "clip-score"
HUB_ID = "openai/clip-vit-large-patch14"  # torchmetrics' default


class ClipScore:
    """The mean of ``100 cos(picture, prompt)`` (`Hessel et al., 2021 <https://arxiv.org/abs/2104.08718>`_, without its
    factor 2.5), by torchmetrics' ``CLIPScore``, summed in float64.

    Args:
        prompts: one for all pictures, or one a class.
        weights: a local folder of a CLIP model as transformers saves it; when None,
            ``openai/clip-vit-large-patch14`` is downloaded.
        device: where the network runs.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(
        self, prompts: Sequence[str], *, weights: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        from torchmetrics.multimodal import CLIPScore  # of the clip extra

        self.prompts = list(prompts)
        load: Any = lambda: _load(weights)  # noqa: E731  (Any: it is declared as transformers' own classes)
        self.metric: Any = CLIPScore(model_name_or_path=load).to(device)
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        self.metric.reset()
        if self.metric.score.device.type != "mps":  # which has no float64
            self.metric.score = self.metric.score.double()

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor | None) -> None:
        """Take in uint8 pictures ``(N, C, H, W)`` and, where there are several prompts, their classes ``(N,)``."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if len(self.prompts) == 1:
            prompts = self.prompts * len(images)
        else:
            assert labels is not None
            prompts = [self.prompts[int(label)] for label in labels]
        self.metric.update(images.to(self.device), prompts)

    def result(self) -> float:
        """Return the mean over all pictures so far."""
        return self.metric.compute().item()


class _Embeddings(nn.Module):
    """A CLIP model whose features are tensors, as torchmetrics expects; transformers 5 wraps them."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401  (a transformers model)
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixels))

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _pooled(self.model.get_text_features(ids, attention_mask=mask))


def _pooled(output: Any) -> Tensor:  # noqa: ANN401
    return output if isinstance(output, Tensor) else output.pooler_output


def _load(weights: Path | None) -> tuple[_Embeddings, Any]:
    from transformers import CLIPModel, CLIPProcessor

    source = HUB_ID if weights is None else str(weights)
    # A folder is never looked up on the hub, nor anything unpickled from it.
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
        raise UserError(f"{source} does not hold the weights of a CLIP model: its tensors do not fit.")
    return _Embeddings(model.eval()), processor
