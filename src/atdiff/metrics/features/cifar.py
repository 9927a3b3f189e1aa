"""A published CIFAR-10 classifier as an extractor: a network trained independently of the runs that it judges."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, relu
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from atdiff.core.errors import UserError
from atdiff.metrics.features.labels import ClassifierFeatures
from atdiff.metrics.features.weights import read_tensors

__all__ = ["CIFAR_RESNET56", "CifarResNet56"]

CIFAR_RESNET56 = "cifar-resnet56"
BUNDLED = Path(__file__).with_name(f"{CIFAR_RESNET56}.safetensors")  # convolutions in float16, the rest in float32
URL = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/resnet56-4bfd9763.th"
SIZE = 32  # pixels along an edge
WIDTHS, BLOCKS, CLASSES = (16, 32, 64), 9, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CifarResNet56(ClassifierFeatures):
    """ResNet-56 for CIFAR-10 (`He et al., 2015 <https://arxiv.org/abs/1512.03385>`_), 94.4 % accurate on its test set.

    The weights ship with atdiff. A local file may be the published one or just its tensors, saved by torch or as
    safetensors. Images of other sizes are resized to 32 x 32 pixels.
    """

    def load(self, path: Path | None, **options: Any) -> None:  # noqa: ANN401
        """See :meth:`atdiff.metrics.features.weights.FileExtractor.load`."""
        tensors = read_tensors(path or BUNDLED, f"the file of {URL}, or its tensors alone")
        with torch.random.fork_rng(devices=[]):
            self.network = _resnet56()
        # The published file was saved from within DataParallel.
        self.network.load_state_dict({name.removeprefix("module."): value for name, value in tensors.items()})

    def check(self, images: Tensor) -> None:
        """Raise ``UserError`` unless the images are uint8 and in colour; any size will do."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"{self.get_name()} was given {images.dtype} images of shape {tuple(images.shape)}: expected uint8 of "
                "shape (N, 3, H, W)."
            )

    @classmethod
    def normalise(cls, images: Tensor) -> Tensor:
        """Resize uint8 images to 32 x 32 pixels, and normalise them with the training mean and standard deviation."""
        pixels = images.to(cls.dtype) / 255.0
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (pixels - mean) / std


class _Block(nn.Module):
    """Two convolutions and a parameter-free shortcut, which subsamples pixels and zero-pads channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride, self.added = width // channels, (width - channels) // 2
        self.conv1 = nn.Conv2d(channels, width, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        found = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return relu(found + pad(shortcut, (0, 0, 0, 0, self.added, self.added)))


def _resnet56() -> nn.Sequential:
    """Build the network with the published parameter names."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), bn1=nn.BatchNorm2d(WIDTHS[0]), relu=nn.ReLU()
    )
    before = WIDTHS[0]
    for stage, width in enumerate(WIDTHS, 1):
        parts[f"layer{stage}"] = nn.Sequential(*(_Block(width if i else before, width) for i in range(BLOCKS)))
        before = width
    parts |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(before, CLASSES))
    return nn.Sequential(parts)


if CIFAR_RESNET56 not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(CIFAR_RESNET56, CifarResNet56)
