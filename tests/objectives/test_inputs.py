"""User input to the three lines: accepted if its meaning is clear, otherwise a one-sentence error."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    LCMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from atdiff import Adversary, ConsistencyObjective, DenoisingObjective, MLP2DModel, Teacher, UserError
from atdiff.models.call import compute_dtype, predict
from atdiff.pipelines.families import trainable_copy

FLOW = FlowMatchEulerDiscreteScheduler
V = LCMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
NETWORK = MLP2DModel(width=8, num_blocks=1)
CLASSES = MLP2DModel(width=8, num_blocks=1, num_class_embeds=3)


def half(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


def images(batch: int = 4) -> Tensor:
    return torch.rand(batch, 1, 8, 8) * 2 - 1


def denoising(**options: Any) -> DenoisingObjective:
    return DenoisingObjective(DDPMScheduler(), **options)


def consistency(**options: Any) -> ConsistencyObjective:
    return ConsistencyObjective(V, **options)


OBJECTIVES = [denoising, consistency]


@pytest.mark.parametrize(
    ("scheduler", "word", "means"),
    [
        (DDPMScheduler(), "v", "v_prediction"),
        (DDPMScheduler(), "V-Prediction", "v_prediction"),
        (DDPMScheduler(), "x0", "sample"),
        (DDPMScheduler(), "x_start", "sample"),
        (DDPMScheduler(), "eps", "epsilon"),
        (DDPMScheduler(), "noise", "epsilon"),
        (DDPMScheduler(), "pred_noise", "epsilon"),
        (DDPMScheduler(), "pred_x0", "sample"),
        (DDPMScheduler(), "pred_v", "v_prediction"),
        (FLOW(), "vpred", "flow"),
        (DDPMScheduler(prediction_type="v_prediction"), None, "v_prediction"),
        (FLOW(), "v", "flow"),
        (FLOW(), "velocity", "flow"),
        (FLOW(), "flow_prediction", "flow"),
        (FLOW(), "flow-matching", "flow"),
        (lambda t: (1 - t, t), "x0", "sample"),
        (lambda t: (1 - t, t), "velocity", "flow"),
        (EDMEulerScheduler(), "EDM", "edm"),
    ],
)
def test_prediction_aliases_are_accepted(scheduler: Any, word: Any, means: str) -> None:
    assert DenoisingObjective(scheduler, word).prediction_type == means
    if means in ("sample", "v_prediction") and not callable(scheduler):
        assert ConsistencyObjective(scheduler, word).prediction_type == means
        assert Teacher(half, scheduler, word).prediction_type == means


@pytest.mark.parametrize(
    ("scheduler", "word"),
    [
        (DDPMScheduler(), "velocity"),  # of the flow, or v?
        (DDPMScheduler(), "flow"),
        (DDPMScheduler(), "score"),
        (FLOW(), "eps"),
        (FLOW(), "x0"),
        (EDMEulerScheduler(), "v"),
        (lambda t: (1 - t, t), "v"),
        (lambda t: (1 - t, t), "edm"),
        (FLOW(), 5),
    ],
)
def test_prediction_names_that_do_not_fit_are_rejected(scheduler: Any, word: Any) -> None:
    with pytest.raises(UserError, match=f"prediction_type={word!r} does not fit .*; expected '"):
        DenoisingObjective(scheduler, word)


@pytest.mark.parametrize("said", ["epsilon", "sample"])
def test_empty_prediction_name_means_the_schedulers(said: str) -> None:
    objective = DenoisingObjective(DDPMScheduler(prediction_type=said), "")  # type: ignore[arg-type]
    assert objective.prediction_type == said


@pytest.mark.parametrize("make", OBJECTIVES)
def test_bytes_are_scaled_to_minus_one_to_one(make: Callable[..., Any]) -> None:
    x0 = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    torch.testing.assert_close(make().draw(x0).x0.flatten(), torch.tensor([-1.0, -0.6, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", OBJECTIVES)
def test_every_floating_dtype_trains(make: Callable[..., Any], dtype: torch.dtype) -> None:
    network = copy.deepcopy(NETWORK)
    for loss in Adversary("l2", 0.1, 2).passes(make(), network, images().to(dtype)):
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        loss.backward()


def image_mistakes() -> list[tuple[Any, str]]:
    x0 = images()
    return [
        (x0 * 127.5 + 127.5, "expected [-1, 1]; give images as torch.uint8"),
        ((x0 * 127.5 + 127.5).long(), "x0 is of torch.int64, expected floats"),
        (x0 > 0, "x0 is of torch.bool"),
        (x0.numpy(), "x0 is of type ndarray"),
        ([x0, torch.zeros(4)], "x0 is of type list"),
        ({"images": x0}, "x0 is of type dict"),
        (x0[:0], "x0 has the shape (0, 1, 8, 8)"),
        (torch.zeros(4), "x0 has the shape (4,)"),
        (torch.zeros(4, 8, 8, 3, dtype=torch.uint8), "with channels last; use x0.permute(0, 3, 1, 2)"),
        (torch.tensor(0.0), "x0 has the shape ()"),
        (x0.index_fill(0, torch.tensor([1]), float("nan")), "x0 ranges from nan to nan"),
        (x0.index_fill(0, torch.tensor([1]), float("inf")), "expected finite values"),
    ]


@pytest.mark.parametrize(("x0", "says"), image_mistakes(), ids=lambda one: one if isinstance(one, str) else "")
@pytest.mark.parametrize("make", OBJECTIVES)
def test_ambiguous_images_are_rejected(make: Callable[..., Any], x0: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        list(Adversary(passes=1).passes(make(), half, x0))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_image_without_a_batch_axis_is_rejected() -> None:
    with pytest.raises(UserError, match=r"the images are \(1, 8, 8\), expected \(B, C, H, W\)"):
        next(Adversary(passes=1).passes(denoising(), unet(), images()[0]))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((4, 3, 8, 8), "but the network has in_channels=1; give images (B, 1, H, W)"),
        ((4, 8, 8, 1), "but the network has in_channels=1; use x0.permute(0, 3, 1, 2)"),
    ],
)
def test_images_of_wrong_channel_count_are_rejected(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(UserError) as error:
        next(Adversary(passes=1).passes(denoising(), unet(), torch.rand(shape) * 2 - 1))
    assert str(shape) in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        # cos((0.41 + 0.008) / 1.008 * pi / 2)
        (LCMScheduler(prediction_type="v_prediction", beta_schedule="linear"), "at timestep 409, not 0.7953"),
        (LCMScheduler(num_train_timesteps=100), "num_train_timesteps 100, not 1000"),
        (EDMEulerScheduler(), "a schedule of kind 'edm', not 'vp'"),
    ],
)
def test_teacher_schedule_differences_are_named(teacher: Any, says: str) -> None:
    with pytest.raises(UserError, match="of teacher and student differ") as error:
        ConsistencyObjective(V, teacher=Teacher(half, teacher))
    assert says in str(error.value)


def batch_mistakes() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"class_labels": torch.arange(3)}, "class_labels has the shape (3,), expected one row for each of the 4"),
        ({"class_labels": torch.tensor(1)}, "class_labels has the shape ()"),
        ({"class_labels": [0, 1, 2, 0]}, "class_labels is of type list, expected a tensor"),
        ({"encoder_hidden_states": torch.zeros(1, 3, 5)}, "has the shape (1, 3, 5), expected one row for each"),
        ({"return_dict": False}, "functools.partial(network, return_dict=...)"),
        ({"noise": torch.zeros(4, 1, 8, 1)}, "noise is (4, 1, 8, 1), expected a tensor with the shape of the samples"),
        ({"noise": 0.0}, "noise is float"),
        ({"weights": torch.ones(3)}, "weights has the shape (3,), expected one number per sample, (4,)"),
        ({"timesteps": torch.ones(3).long()}, "timesteps has the shape (3,), expected one number per sample"),
        ({"timesteps": torch.full((4,), 1000)}, "timesteps contain 1000, expected whole numbers from 0 to 999"),
        ({"timesteps": torch.full((4,), -1)}, "timesteps contain -1, expected"),
        ({"timesteps": torch.full((4,), 3.5)}, "timesteps contain 3.5, expected"),
    ]


@pytest.mark.parametrize(("given", "says"), batch_mistakes(), ids=lambda one: one if isinstance(one, str) else "")
@pytest.mark.parametrize("make", OBJECTIVES)
def test_inputs_that_do_not_match_the_samples_are_rejected(
    make: Callable[..., Any], given: dict[str, Any], says: str
) -> None:
    if make is consistency and "timesteps" in given:
        given = {"timesteps": given["timesteps"], "next_timesteps": torch.zeros(4).long()}
    with pytest.raises(UserError) as error:
        make().draw(images(), **given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("scheduler", "timesteps", "says"),
    [
        (FLOW(), torch.full((4,), 1001.0), "timesteps contain 1001, expected numbers from 0 to 1000"),
        (lambda t: (1 - t, t), torch.full((4,), 500.0), "timesteps contain 500, expected numbers from 0 to 1"),
        (EDMEulerScheduler(), torch.full((4,), -torch.inf), "expected finite numbers"),
    ],
)
def test_timesteps_outside_the_schedule_are_rejected(scheduler: Any, timesteps: Tensor, says: str) -> None:
    with pytest.raises(UserError) as error:
        DenoisingObjective(scheduler, "flow" if callable(scheduler) else None).draw(images(), timesteps=timesteps)
    assert says in str(error.value)


def test_scalar_timestep_applies_to_all_samples() -> None:
    for one in (7, torch.tensor(7)):
        assert denoising().draw(images(), timesteps=one).timesteps.tolist() == [7] * 4  # type: ignore[arg-type]


def test_timesteps_without_next_timesteps_are_rejected() -> None:
    with pytest.raises(UserError, match="given together"):
        consistency().draw(images(), timesteps=torch.full((4,), 500))


@pytest.mark.parametrize("make", OBJECTIVES)
def test_perturbation_of_wrong_shape_is_rejected(make: Callable[..., Any]) -> None:
    objective = make()
    with pytest.raises(UserError, match=r"delta is \(4, 1, 1, 1\), expected"):
        objective.compute(half, objective.draw(images()), torch.zeros(4, 1, 1, 1))


def test_conditions_cannot_be_added_to_a_batch() -> None:
    objective = denoising()
    with pytest.raises(UserError, match="class_labels cannot be added to a batch"):
        next(Adversary().passes(objective, half, objective.draw(images()), class_labels=torch.zeros(4).long()))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: [x],
        lambda x: {"sample": x},
        lambda x: {"sample": x, "extra": x},
        lambda x: {"prediction": x},
        lambda x: UNet2DOutput(sample=x),
        lambda x: SimpleNamespace(sample=x),
    ],
)
@pytest.mark.parametrize("make", OBJECTIVES)
def test_common_output_types_are_read(make: Callable[..., Any], wrapped: Callable[[Tensor], Any]) -> None:
    objective = make()
    batch = objective.draw(images())
    found = objective.loss(lambda x, t: wrapped(half(x, t)), batch)
    torch.testing.assert_close(found, objective.loss(half, batch))


def test_first_entry_of_an_output_without_sample_is_read() -> None:
    from dataclasses import dataclass

    @dataclass
    class Output(BaseOutput):
        prediction: Tensor
        hidden: Tensor

    x = images()
    assert predict(lambda x, t: Output(x, x + 1), x, torch.zeros(4)) is x


OUTPUTS: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: None, "the network returned a NoneType"),
    (lambda x: x.detach().numpy(), "the network returned a ndarray"),
    (lambda x: {"a": x, "b": x}, "a dict with a, b, expected a tensor"),
    (lambda x: {}, "the network returned an empty dict, expected a tensor"),
    (lambda x: (), "the network returned a tuple"),
    (lambda x: torch.distributions.Normal(x, 1.0), "the network returned a Normal"),
    (lambda x: x.flatten(1), "the network returned the shape (4, 64) for samples of (4, 1, 8, 8)"),
    (lambda x: x[:2], "the network returned the shape (2, 1, 8, 8)"),
    (lambda x: x[..., :4], "the network returned the shape (4, 1, 8, 4)"),
    (lambda x: x.mean(), "the network returned the shape ()"),
    (lambda x: x[0], "the network returned the shape (1, 8, 8)"),
    (lambda x: x.repeat(1, 3, 1, 1), "returned 3 channels"),
]


@pytest.mark.parametrize(("output", "says"), OUTPUTS, ids=[says for _, says in OUTPUTS])
@pytest.mark.parametrize("make", OBJECTIVES)
def test_other_outputs_are_rejected(make: Callable[..., Any], output: Callable[[Tensor], Any], says: str) -> None:
    objective = make()
    with pytest.raises(UserError) as error:
        objective.loss(lambda x, t: output(x), objective.draw(images()))
    assert says in str(error.value)
    with pytest.raises(UserError) as error:
        ConsistencyObjective(V, teacher=Teacher(lambda x, t: output(x), V)).draw(images())
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.tensor([0, 1, 2, 3]), "class_labels range from 0 to 3, but the network has labels 0 to 2"),
        (torch.tensor([-1, 1, 2, 0]), "class_labels range from -1 to 2"),
        (torch.tensor([0.0, 1.0, 2.0, 0.0]), "class_labels are (4,) of torch.float32, expected one integer per sample"),
        (torch.eye(4, 3).long(), "class_labels are (4, 3) of torch.int64"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda net: net, functools.partial, torch.compile])
@pytest.mark.parametrize("make", OBJECTIVES)
def test_labels_unknown_to_the_network_are_rejected(
    make: Callable[..., Any], wrap: Callable[[Any], Any], labels: Tensor, says: str
) -> None:
    objective = make()
    with pytest.raises(UserError) as error:
        objective.loss(wrap(CLASSES), objective.draw(images(), class_labels=labels))
    assert says in str(error.value)


def test_small_integer_labels_are_accepted() -> None:
    objective, labels = denoising(), torch.tensor([0, 1, 2, 0])
    batch = objective.draw(images(), class_labels=labels)
    expected = objective.loss(CLASSES, batch)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        batch.conditions["class_labels"] = labels.to(dtype)
        torch.testing.assert_close(objective.loss(CLASSES, batch), expected)


def test_null_label_needs_an_embedding() -> None:
    objective = denoising(label_dropout=0.1, null_label=3)
    with pytest.raises(UserError, match="null_label=3 is outside the network's labels 0 to 2;"):
        objective.loss(CLASSES, objective.draw(images(), class_labels=torch.zeros(4).long()))


def test_images_from_0_to_1_warn_once() -> None:
    objective = denoising()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            objective.draw(torch.rand(4, 1, 8, 8))
    assert [str(one.message)[:37] for one in told] == ["no value in two batches was negative:"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective = denoising()
        for _ in range(5):
            objective.draw(images())


def test_values_are_only_checked_at_the_start() -> None:
    objective = denoising()
    for _ in range(2):
        objective.draw(images())
    objective.draw(torch.full((4, 1, 8, 8), float("nan")))  # left to a gradient scaler or a skipped step


# --- weights in another dtype than the images, without autocast ---


def unet() -> Any:
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
        num_class_embeds=3,
    )  # fmt: skip


def conditional() -> Any:
    return UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32, time_cond_proj_dim=6,
    )  # fmt: skip


def dit() -> Any:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3, norm_num_groups=4,
    )  # fmt: skip


def sd3() -> Any:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
    )  # fmt: skip


def flux() -> Any:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip


LABELS = {"class_labels": torch.tensor([0, 1, 2, 0])}
TEXT = {"encoder_hidden_states": torch.randn(4, 3, 8)}
PROMPT = {**TEXT, "pooled_projections": torch.randn(4, 8)}
NETWORKS: dict[str, tuple[Callable[[], Any], Any, dict[str, Tensor]]] = {
    "mlp": (lambda: MLP2DModel(width=8, num_blocks=1, num_class_embeds=3), DDPMScheduler(), LABELS),
    "unet": (unet, DDPMScheduler(), LABELS),
    "sdxl": (
        conditional,
        DDPMScheduler(),
        {**TEXT, "text_embeds": torch.randn(4, 8), "time_ids": torch.full((4, 6), 1023.0)}
        | {"timestep_cond": torch.randn(4, 6)},
    ),
    "dit": (dit, DDPMScheduler(), LABELS),
    "sd3": (sd3, FLOW(), PROMPT),
    "sd3-denoiser": (lambda: trainable_copy(sd3()), FLOW(), PROMPT),
    "flux-denoiser": (lambda: trainable_copy(flux()), FLOW(), PROMPT),
}


@pytest.mark.parametrize("direction", ["gradient", "residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_in_another_dtype_train_without_autocast(name: str, dtype: torch.dtype, direction: Any) -> None:
    make, scheduler, conditions = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    objective = DenoisingObjective(scheduler)
    batch = objective.draw(images(), **conditions)
    expected = objective.loss(network, batch)
    network.to(dtype)
    torch.testing.assert_close(objective.loss(network, batch), expected, rtol=0.05, atol=0.02)
    adversary = Adversary("l2", 0.2, 2, direction=direction)
    for loss in adversary.passes(objective, network, batch):
        assert loss.dtype == torch.float32
        loss.backward()
        assert adversary.delta is not None
        assert adversary.delta.dtype == torch.float32
    assert adversary.delta is not None
    assert adversary.delta.any()
    assert adversary.nonfinite == 0
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    assert gradients
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)


def ddp(network: nn.Module) -> nn.Module:
    wrapped = nn.Module()
    wrapped.module = network
    wrapped.forward = network.forward  # type: ignore[method-assign]
    return wrapped


def lora(network: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(network, LoraConfig(r=2, target_modules=["linear_1", "linear_2"]))  # type: ignore[arg-type]


WRAPS: dict[str, Callable[[Any], Any]] = {
    "ddp": ddp,
    "compiled": functools.partial(torch.compile, backend="eager"),
    "partial": lambda network: functools.partial(network, return_dict=False),
    "method": lambda network: network.forward,
    "peft": lora,
    "both": lambda network: ddp(torch.compile(network, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_wrapped_networks_keep_their_dtype(wrap: Callable[[Any], Any]) -> None:
    network = unet().to(torch.bfloat16)
    model = wrap(network)
    assert compute_dtype(model) == torch.bfloat16
    objective = denoising()
    loss = objective.loss(model, objective.draw(images(), **LABELS)).mean()
    loss.backward()
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("site", ["student", "teacher"])
@pytest.mark.parametrize("own", [True, False])
def test_consistency_models_train_in_half_precision(site: Any, own: bool) -> None:
    student, teacher = (unet().to(torch.bfloat16) for _ in range(2))
    target = None if own else copy.deepcopy(student)
    objective = consistency(teacher=Teacher(teacher, V), target=target, site=site)
    adversary = Adversary("l2", 0.2, 2, target="invariant")
    for loss in adversary.passes(objective, student, images(), **LABELS):
        assert loss.dtype == torch.float32
        loss.backward()
    assert adversary.delta is not None
    assert adversary.delta.any()


def test_timesteps_and_sizes_are_not_rounded() -> None:
    seen: dict[str, Any] = {}

    class Net(nn.Linear):
        def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:  # type: ignore[override]
            seen.update(conditions, x=x, t=t)
            return x

    network = Net(1, 1).to(torch.bfloat16)
    conditions = {
        "time_ids": torch.full((4, 6), 1023.0),
        "guidance": torch.full((4,), 3.3),
        "embedding": torch.ones(4, 2),
    }
    t = torch.full((4,), 999.7)
    out = predict(network, images(), t, conditions)
    assert out.dtype == torch.float32
    assert seen["x"].dtype == seen["embedding"].dtype == torch.bfloat16
    assert torch.equal(seen["t"], t)
    assert torch.equal(seen["added_cond_kwargs"]["time_ids"], conditions["time_ids"])
    assert torch.equal(seen["guidance"], conditions["guidance"])
