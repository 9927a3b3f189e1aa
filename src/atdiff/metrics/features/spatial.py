"""The spatial features of sFID, as a torch-fidelity extractor."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

__all__ = ["SPATIAL", "SpatialInception"]

SPATIAL = "inception-v3-spatial"
CHANNELS = 7  # of 17 x 17 positions: 2,023 features, about as many as the pooled ones


class SpatialInception(FeatureExtractorBase):
    """torch-fidelity's ``inception-v3-compat`` with one more feature, ``"spatial"``, ``(N, 2023)``.

    sFID (`Nash et al., 2021 <https://arxiv.org/abs/2103.03841>`_) is taken on the first 7 channels of ``mixed_6/conv``,
    as in `guided-diffusion's evaluator <https://github.com/openai/guided-diffusion/tree/main/evaluations>`_. In
    torch-fidelity's names that is the 1x1 branch of ``Mixed_6d``, after its ReLU; the graph counts its blocks from
    ``mixed``, which is ``Mixed_5b``.

    Args:
        name: the name under which it is registered.
        features_list: which features to return.
        feature_extractor_weights_path: weights of ``inception-v3-compat``; downloaded when None.
        **kwargs: torch-fidelity's other options.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(name, features_list)
        # Where only the spatial features are asked for, the network runs up to the first layer behind them.
        others = [feature for feature in features_list if feature != "spatial"] or ["768"]
        self.network = FeatureExtractorInceptionV3(
            name, others, feature_extractor_weights_path=feature_extractor_weights_path, **kwargs
        )
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
        """The features on offer."""
        return "spatial", *FeatureExtractorInceptionV3.get_provided_features_list()

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The spatial features for distances, the ordinary logits for the Inception score."""
        return (
            FeatureExtractorInceptionV3.get_default_feature_layer_for_metric(metric) if metric == "isc" else "spatial"
        )

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile may wrap it; not around a hook."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """A batch of one small image."""
        return FeatureExtractorInceptionV3.get_dummy_input_for_compile()


if SPATIAL not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(SPATIAL, SpatialInception)
