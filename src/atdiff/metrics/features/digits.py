"""What the small classifiers share as torch-fidelity extractors: their penultimate layer and their logits."""

from __future__ import annotations

from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase

__all__ = ["ClassifierFeatures"]


class ClassifierFeatures(FeatureExtractorBase):
    """An extractor whose ``network`` ends in a layer of 64 features and one of logits.

    Features: ``"64"``, the penultimate layer, and ``"logits"``, of the classes.
    """

    network: nn.Sequential

    def features_of(self, x0: Tensor) -> tuple[Tensor, ...]:
        """Return the requested features of images ``(N, C, H, W)`` as the network takes them."""
        features = self.network[:-1](x0)
        found = {"64": features}
        if "logits" in self.features_list:
            found["logits"] = self.network[-1](features)
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The features on offer."""
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The logits for the Inception score, else the penultimate layer."""
        return "logits" if metric == "isc" else "64"
