"""The spatial features of sFID, as a torch-fidelity extractor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from atdiff.metrics.features.weights import FileExtractor
from atdiff.metrics.registry import SPATIAL

__all__ = ["SpatialInception"]

CHANNELS = 7  # of 17 x 17 positions: 2,023 features, about as many as the pooled ones


class SpatialInception(FileExtractor):
    """torch-fidelity's ``inception-v3-compat`` with one more feature, ``"spatial"``, ``(N, 2023)``.

    sFID (`Nash et al., 2021 <https://arxiv.org/abs/2103.03841>`_) uses the first 7 channels of ``mixed_6/conv``, as in
    `guided-diffusion's evaluator <https://github.com/openai/guided-diffusion/tree/main/evaluations>`_: the 1x1 branch
    of torch-fidelity's ``Mixed_6d``, after its ReLU, since the evaluator's graph counts from ``Mixed_5b``.
    """

    def load(self, path: Path | None, **options: Any) -> None:  # noqa: ANN401
        """See :meth:`atdiff.metrics.features.weights.FileExtractor.load`; the file is ``inception-v3-compat``'s."""
        # If only the spatial features are requested, the network stops at the first layer after them.
        others = [feature for feature in self.features_list if feature != "spatial"] or ["768"]
        weights = None if path is None else str(path)
        self.network = FeatureExtractorInceptionV3(self.name, others, feature_extractor_weights_path=weights, **options)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output[:, :CHANNELS].flatten(1).float()

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the requested features of uint8 images ``(N, 3, H, W)``."""
        found = dict(zip(self.network.features_list, self.network(input), strict=True))
        assert self._spatial is not None
        found["spatial"], self._spatial = self._spatial, None
        return tuple(found[feature] for feature in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The available features."""
        return "spatial", *FeatureExtractorInceptionV3.get_provided_features_list()

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The spatial features for distances, the ordinary logits for the Inception score."""
        return (
            FeatureExtractorInceptionV3.get_default_feature_layer_for_metric(metric) if metric == "isc" else "spatial"
        )

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile may wrap it: no, because of the hook."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """A batch of one small image."""
        return FeatureExtractorInceptionV3.get_dummy_input_for_compile()


if SPATIAL not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(SPATIAL, SpatialInception)
