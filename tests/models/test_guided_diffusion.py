"""The import of ADM checkpoints against recorded outputs and an independent implementation of the network."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from atdiff.core.errors import UserError
from atdiff.models.guided_diffusion import (
    ADM_CIFAR10,
    ADMUNet2DModel,
    adm_unet,
    convert_state_dict,
    import_adm,
    infer_arch,
    published_noise,
    read_adm_checkpoint,
)

GOLDEN = Path(__file__).parent.parent / "data" / "guided_unet.npz"
SMALL: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
PLAIN: dict[str, dict[str, Any]] = {
    "class_conditional": {"num_classes": 10},
    "class_conditional_additive": {"num_classes": 7, "use_scale_shift_norm": False},
    "two_res_blocks": {"num_res_blocks": 2},
    "three_res_blocks_new_order": {"num_res_blocks": 3, "use_new_attention_order": True},
    "attention_at_every_level": {"attention_resolutions": (1, 2, 4), "channel_mult": (1, 2, 3)},
    "attention_on_top_only": {"attention_resolutions": (1,), "use_new_attention_order": True},
    "attention_in_the_middle_only": {"attention_resolutions": ()},
    "attention_beyond_the_levels": {"attention_resolutions": [2, 16]},
    "convolutions_resample": {
        "resblock_updown": False,
        "num_res_blocks": 2,
        "channel_mult": (1, 2, 2),
        "attention_resolutions": (1, 4),
    },
    "improved_diffusion": {
        "resblock_updown": False,
        "num_res_blocks": 3,
        "channel_mult": (1, 2, 2, 2),
        "attention_resolutions": (2, 4),
        "num_head_channels": -1,
        "num_heads": 4,
    },
    "additive_time": {"use_scale_shift_norm": False, "use_new_attention_order": True},
    "additive_time_convolutions": {"use_scale_shift_norm": False, "resblock_updown": False},
    "one_head_of_each_width": {"num_head_channels": -1, "attention_resolutions": (1, 2)},
    "one_level": {"channel_mult": (1,), "attention_resolutions": (1,), "num_res_blocks": 2},
    "other_channels": {"in_channels": 1, "out_channels": 1, "dropout": 0.5},
    "narrowing": {"channel_mult": (1, 3, 1)},
}
BEYOND: dict[str, dict[str, Any]] = {
    "heads_over_widths": {"num_head_channels": -1, "num_heads": 4, "attention_resolutions": (1, 2)},
    "heads_new_order": {
        "num_head_channels": -1,
        "num_heads": 2,
        "attention_resolutions": (1, 2),
        "use_new_attention_order": True,
        "num_classes": 5,
    },
    "half_width_first": {"model_channels": 64, "channel_mult": (0.5, 1)},
    "double_width_first": {"channel_mult": (2, 1), "num_classes": 3},
}


class Residual(nn.Module):
    def __init__(self, width: int, out: int, time: int, scale_shift: bool, resample: str | None = None) -> None:
        super().__init__()
        self.resample, self.scale_shift = resample, scale_shift
        conv = nn.Conv2d(width, out, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, out * (1 + scale_shift)))
        conv = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), conv)
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2) if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.in_layers[2](self._resampled(self.in_layers[:2](x)))
        emb = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            hidden = self.out_layers[1:](self.out_layers[0](hidden) * (1 + scale) + shift)
        else:
            hidden = self.out_layers(hidden + emb)
        return self.skip_connection(self._resampled(x)) + hidden


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        batch, width, *size = x.shape
        qkv = self.qkv(self.norm(x).flatten(2))
        channels = width // self.heads
        if self.new_order:
            q, k, v = qkv.reshape(batch, 3, self.heads, channels, -1).unbind(1)
        else:
            q, k, v = qkv.reshape(batch, self.heads, 3, channels, -1).unbind(2)
        weight = torch.einsum("bhct,bhcs->bhts", q, k).div(math.sqrt(channels)).softmax(-1)
        mixed = torch.einsum("bhts,bhcs->bhct", weight, v).reshape(batch, width, -1)
        return x + self.proj_out(mixed).reshape(batch, width, *size)


class Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Reference(nn.Module):
    """guided-diffusion's U-Net, written from its description; modules are named as in its state dicts."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__()
        self.arch = arch
        base, factors, blocks = arch["model_channels"], arch["channel_mult"], arch["num_res_blocks"]
        self.time, self.scale_shift = 4 * base, arch.get("use_scale_shift_norm", False)
        self.time_embed = nn.Sequential(nn.Linear(base, self.time), nn.SiLU(), nn.Linear(self.time, self.time))
        if arch.get("num_classes"):
            self.label_emb = nn.Embedding(arch["num_classes"], self.time)
        width = int(base * factors[0])
        skips = [width]
        inputs = [nn.ModuleList([nn.Conv2d(arch["in_channels"], width, 3, padding=1)])]
        for level, factor in enumerate(factors):
            for _ in range(blocks):
                inputs.append(self._block(width, int(base * factor), level))
                width = int(base * factor)
                skips.append(width)
            if level < len(factors) - 1:
                inputs.append(nn.ModuleList([self._resampler(width, "down")]))
                skips.append(width)
        self.input_blocks = nn.ModuleList(inputs)
        self.middle_block = nn.ModuleList(
            [self._residual(width, width), self._attention(width), self._residual(width, width)]
        )
        outputs = []
        for level, factor in reversed(list(enumerate(factors))):
            for index in range(blocks + 1):
                block = self._block(width + skips.pop(), int(base * factor), level)
                width = int(base * factor)
                if level and index == blocks:
                    block.append(self._resampler(width, "up"))
                outputs.append(block)
        self.output_blocks = nn.ModuleList(outputs)
        final = nn.Conv2d(width, arch["out_channels"], 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), final)

    def _residual(self, width: int, out: int, resample: str | None = None) -> nn.Module:
        return Residual(width, out, self.time, self.scale_shift, resample)

    def _attention(self, width: int) -> nn.Module:
        channels = self.arch.get("num_head_channels", -1)
        heads = self.arch.get("num_heads", 1) if channels == -1 else width // channels
        return SelfAttention(width, heads, self.arch.get("use_new_attention_order", False))

    def _resampler(self, width: int, direction: str) -> nn.Module:
        if self.arch.get("resblock_updown", False):
            return self._residual(width, width, direction)
        return Down(width) if direction == "down" else Up(width)

    def _block(self, width: int, out: int, level: int) -> nn.ModuleList:
        block = nn.ModuleList([self._residual(width, out)])
        if 2**level in self.arch["attention_resolutions"]:
            block.append(self._attention(out))
        return block

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        half = self.arch["model_channels"] // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timesteps[:, None].float() * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        if labels is not None:
            emb = emb + self.label_emb(labels)
        x, skips = self.input_blocks[0][0](x), []
        skips.append(x)
        for block in self.input_blocks[1:]:
            for layer in block:
                x = layer(x, emb)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:
                x = layer(x, emb)
        return self.out(x)


def reference(arch: dict[str, Any], seed: int = 0) -> Reference:
    """Return a reference network with non-zero random weights, in double precision."""
    torch.manual_seed(seed)
    network = Reference(arch).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            # Softmax over small scores would hide a wrong order of q, k and v.
            parameter.normal_(std=1.5 / math.sqrt(fan_in))
    return network


def inputs(arch: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    labels = arch.get("num_classes")
    drawn = {
        "sample": torch.randn(2, arch["in_channels"], arch["image_size"], arch["image_size"]).double(),
        "timestep": torch.tensor([3, 871]),
    }
    return drawn | ({"class_labels": torch.tensor([labels - 1, 1])} if labels else {})


@torch.no_grad()
def converted_output(network: Reference, arch: dict[str, Any]) -> Tensor:
    unet = adm_unet(**arch).double().eval()
    unet.load_state_dict(convert_state_dict(network.state_dict(), arch))
    return unet(**inputs(arch)).sample


def assert_same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert expected.std() > 0.05
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in ("x", "t", "out")}
        return tensors | {"arch": ast.literal_eval(str(arrays["arch"]))}


@torch.no_grad()
def test_reference_reproduces_the_recorded_output(golden: dict[str, Any]) -> None:
    network = Reference(golden["arch"]).eval()
    network.load_state_dict(read_adm_checkpoint(GOLDEN), strict=True)
    torch.testing.assert_close(network(golden["x"], golden["t"]), golden["out"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("source", ["stored", "given", "inferred"])
def test_import_reproduces_the_recorded_output(golden: dict[str, Any], source: str, tmp_path: Path) -> None:
    if source == "stored":
        unet = import_adm(GOLDEN)
    elif source == "given":
        unet = import_adm(GOLDEN, golden["arch"])
    else:
        torch.save(read_adm_checkpoint(GOLDEN), tmp_path / "ema.pt")
        unet = import_adm(tmp_path / "ema.pt", num_head_channels=16, use_new_attention_order=True)
    assert type(unet) is UNet2DModel
    assert not unet.training
    output = unet(golden["x"], golden["t"]).sample
    torch.testing.assert_close(output, golden["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*PLAIN, *BEYOND])
def test_variants_match_the_reference(name: str) -> None:
    arch = SMALL | {**PLAIN, **BEYOND}[name]
    network = reference(arch)
    with torch.no_grad():
        expected = network(*inputs(arch).values())
    assert_same(converted_output(network, arch), expected, 1e-5)
    assert type(adm_unet(**arch)) is (UNet2DModel if name in PLAIN else ADMUNet2DModel)


@pytest.mark.parametrize(
    "change",
    [{"use_new_attention_order": True}, {"num_head_channels": 32}, {"num_head_channels": -1, "num_heads": 1}],
    ids=str,
)
def test_wrong_heads_or_order_change_the_output(change: dict[str, Any]) -> None:
    network = reference(SMALL)
    right, wrong = converted_output(network, SMALL), converted_output(network, SMALL | change)
    assert (right - wrong).abs().max() > 1e-2 * right.abs().max()


@pytest.mark.parametrize("name", [*PLAIN, *BEYOND])
def test_architecture_is_inferred_from_shapes(name: str) -> None:
    arch = SMALL | {**PLAIN, **BEYOND}[name]
    if name == "attention_beyond_the_levels":
        arch["attention_resolutions"] = (2,)
    with torch.device("meta"):
        shapes = Reference(arch).state_dict()
    untold = ("image_size", "num_heads", "num_head_channels", "use_new_attention_order", "dropout")
    found = infer_arch(shapes, **{key: arch[key] for key in untold if key in arch})
    if name == "one_level":
        del found["resblock_updown"]  # nothing resamples
    defaults = {"dropout": 0.0, "num_classes": None, "use_new_attention_order": False}
    for key, value in found.items():
        assert value == (defaults | arch)[key], key


ADM_IMAGENET: dict[str, Any] = {
    "in_channels": 3,
    "model_channels": 256,
    "out_channels": 6,
    "num_res_blocks": 2,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


@pytest.mark.parametrize(
    "arch",
    [
        ADM_CIFAR10,
        ADM_IMAGENET
        | {"image_size": 64, "model_channels": 192, "num_res_blocks": 3, "channel_mult": (1, 2, 3, 4)}
        | {"attention_resolutions": (2, 4, 8), "dropout": 0.1, "num_classes": 1000}
        | {"num_head_channels": 64, "use_new_attention_order": True},
        ADM_IMAGENET
        | {"image_size": 128, "channel_mult": (1, 1, 2, 3, 4), "attention_resolutions": (4, 8, 16)}
        | {"num_heads": 4, "num_classes": 1000},
        ADM_IMAGENET
        | {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (8, 16, 32)}
        | {"num_head_channels": 64},
        ADM_IMAGENET
        | {"image_size": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "attention_resolutions": (16, 32, 64)}
        | {"num_head_channels": 64, "num_classes": 1000},
    ],
    ids=lambda arch: str(arch["image_size"]),
)
def test_published_checkpoints_need_no_arguments(arch: dict[str, Any]) -> None:
    with torch.device("meta"):
        shapes = Reference(arch).state_dict()
        found = infer_arch(shapes)
        converted = convert_state_dict(shapes, found)
        expected = adm_unet(**arch).state_dict()
    defaults = {"dropout": 0.0, "num_classes": None, "use_new_attention_order": False}
    assert found == defaults | arch
    assert {key: value.shape for key, value in converted.items()} == {k: v.shape for k, v in expected.items()}


# From the flags in the READMEs of guided-diffusion, improved-diffusion and DDPM-IP.
@pytest.mark.parametrize(
    ("channels", "blocks", "mult", "updown", "noise"),
    [
        (192, 3, (1, 2, 3, 4), True, ("cosine", 1000)),  # ImageNet-64
        (256, 2, (1, 1, 2, 3, 4), True, ("linear", 1000)),  # ImageNet-128
        (256, 2, (1, 1, 2, 2, 4, 4), True, ("linear", 1000)),  # ImageNet-256 and LSUN
        (256, 2, (0.5, 1, 1, 2, 2, 4, 4), True, ("linear", 1000)),  # ImageNet-512
        (128, 3, (1, 2, 2, 2), True, ("cosine", 1000)),  # CIFAR-10 of ADM-IP
        (256, 3, (1, 1, 2, 3, 4), True, ("cosine", 1000)),  # FFHQ-128 of ADM-IP
        (128, 3, (1, 2, 2, 2), False, ("cosine", 1000)),  # CIFAR-10 of improved-diffusion
        (192, 3, (1, 2, 3, 4), False, ("cosine", 4000)),  # class-conditional ImageNet-64 of improved-diffusion
        (128, 2, (1, 1, 2, 2, 4, 4), False, ("linear", 1000)),  # LSUN bedroom of improved-diffusion
        (128, 2, (1, 2, 2, 2), True, None),
        (128, 3, (1, 2, 2), True, None),
    ],
)
def test_published_architectures_carry_their_betas(
    channels: int, blocks: int, mult: tuple[float, ...], updown: bool, noise: tuple[str, int] | None
) -> None:
    arch = ADM_CIFAR10 | {"model_channels": channels, "num_res_blocks": blocks, "channel_mult": mult}
    arch |= {"resblock_updown": updown, "attention_resolutions": (8,)}
    with torch.device("meta"):
        assert published_noise(adm_unet(**arch)) == noise
        assert published_noise(adm_unet(**(arch | {"num_heads": 4, "num_head_channels": -1}))) == noise


def test_cifar10_network_has_the_size_of_the_reference() -> None:
    with torch.device("meta"):
        weights = adm_unet(**ADM_CIFAR10).parameters()
        expected = Reference(ADM_CIFAR10).parameters()
    assert sum(weight.numel() for weight in weights) == sum(weight.numel() for weight in expected)


def test_dropout_reaches_every_residual_block() -> None:
    unet = adm_unet(**SMALL | {"dropout": 0.3})
    blocks = [module for name, module in unet.named_modules() if name.endswith("conv2")]
    dropouts = [module.p for name, module in unet.named_modules() if name.endswith(".dropout")]
    assert dropouts == [0.3] * len(blocks)


@torch.no_grad()
@pytest.mark.parametrize("name", ["class_conditional", "attention_at_every_level", *BEYOND])
def test_saved_network_gives_the_same_output(name: str, tmp_path: Path) -> None:
    arch = SMALL | {**PLAIN, **BEYOND}[name]
    unet = adm_unet(**arch).eval()
    unet.load_state_dict(convert_state_dict(reference(arch).state_dict(), arch))
    unet.save_pretrained(tmp_path)
    opened = type(unet).from_pretrained(tmp_path)
    drawn = inputs(arch) | {"sample": inputs(arch)["sample"].float()}
    torch.testing.assert_close(opened(**drawn).sample, unet(**drawn).sample, rtol=0, atol=0)


@torch.no_grad()
def test_plain_diffusers_opens_the_pipeline(golden: dict[str, Any], tmp_path: Path) -> None:
    DDPMPipeline(import_adm(GOLDEN), DDPMScheduler()).save_pretrained(tmp_path)
    unet = DiffusionPipeline.from_pretrained(tmp_path).unet
    assert type(unet) is UNet2DModel
    output = unet(golden["x"], golden["t"]).sample
    torch.testing.assert_close(output, golden["out"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", BEYOND)
def test_diffusers_opens_pipelines_of_the_adm_class(name: str, tmp_path: Path) -> None:
    arch = SMALL | BEYOND[name]
    unet = adm_unet(**arch).eval()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    opened = DiffusionPipeline.from_pretrained(tmp_path).unet
    drawn = inputs(arch) | {"sample": inputs(arch)["sample"].float()}
    torch.testing.assert_close(opened(**drawn).sample, unet(**drawn).sample, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".npz"])
def test_every_file_format_gives_the_same_weights(suffix: str, tmp_path: Path) -> None:
    weights = {key: value.float() for key, value in reference(SMALL).state_dict().items()}
    path = tmp_path / f"adm{suffix}"
    if suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in weights.items()})
    elif suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path)
    read = read_adm_checkpoint(path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], weights[key]) for key in weights)
    unet = import_adm(path, num_head_channels=16, image_size=8)
    assert torch.equal(unet.conv_in.weight, weights["input_blocks.0.0.weight"])


def test_explicit_num_heads_overrides_head_channels() -> None:
    weights = reference(SMALL).state_dict()
    assert infer_arch(weights, num_heads=2)["num_head_channels"] == -1
    assert infer_arch(weights, num_heads=None)["num_head_channels"] == 64


@pytest.mark.parametrize("key", ["middle_block.1.qkv.weight", "output_blocks.3.0.skip_connection.bias"])
@pytest.mark.parametrize("fault", ["missing", "mis-shaped"])
def test_missing_or_misshaped_key_is_named(key: str, fault: str) -> None:
    weights = reference(SMALL).state_dict()
    tensor = weights.pop(key)
    if fault == "mis-shaped":
        weights[key] = tensor[:-1]
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        convert_state_dict(weights, SMALL)


def test_unexpected_key_is_named() -> None:
    weights = reference(SMALL).state_dict() | {"output_blocks.9.0.conv.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"'output_blocks\.9\.0\.conv\.weight'.*not part of the network"):
        convert_state_dict(weights, SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"model_channels": 64},
        {"num_classes": 10},
        {"num_res_blocks": 2},
        {"attention_resolutions": (1, 2)},
        {"resblock_updown": False},
        {"use_scale_shift_norm": False},
        {"channel_mult": (1, 2, 2)},
    ],
    ids=str,
)
def test_mismatched_architecture_is_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="The key '"):
        convert_state_dict(reference(SMALL).state_dict(), SMALL | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": 3}, "unexpected keyword argument 'widths'"),
        ({"dims": 3}, "dims=3"),
        ({"conv_resample": False, "resblock_updown": False}, "conv_resample=False"),
        ({"num_heads_upsample": 2, "num_head_channels": -1}, "num_heads_upsample=2"),
        ({"model_channels": 48}, "model_channels=48"),
        ({"num_head_channels": 48}, "num_head_channels=48"),
        ({"num_head_channels": -1, "num_heads": 0}, "num_heads=0"),
    ],
)
def test_invalid_architecture_is_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adm_unet(**SMALL | change)


def test_missing_argument_is_named() -> None:
    with pytest.raises(UserError, match=r"missing.*'out_channels'"):
        adm_unet(**{key: value for key, value in SMALL.items() if key != "out_channels"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "is not a file"),
        ("weights.bin", b"", "unknown suffix"),
        ("broken.pt", b"no pickle", "cannot be read"),
        ("broken.npz", b"no archive", "cannot be read"),
        ("broken.safetensors", b"no header", "cannot be read"),
        ("list.pt", [1, 2], "contains no state dict"),
        ("nested.pt", {"model": {"weight": torch.zeros(1)}}, "'model'.*is a dict"),
        ("foreign.pt", {"conv.weight": torch.zeros(1)}, r"time_embed\.0\.weight"),
    ],
)
def test_unusable_file_is_rejected(name: str, content: object, message: str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=message):
        import_adm(tmp_path / name)


def test_stored_architecture_must_be_a_literal(tmp_path: Path) -> None:
    path = tmp_path / "adm.npz"
    np.savez(path, arch="__import__('os')", weight=np.zeros(1))
    with pytest.raises(UserError, match=r"'arch'.*Python literal"):
        import_adm(path)


def test_truncated_checkpoint_is_rejected() -> None:
    weights = reference(SMALL | {"num_res_blocks": 2}).state_dict()
    kept = {key: value for key, value in weights.items() if not key.startswith("output_blocks.5.")}
    with pytest.raises(UserError, match="5 output blocks"):
        infer_arch(kept)
