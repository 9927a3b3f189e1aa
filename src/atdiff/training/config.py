"""What one training run is made of: a tree of typed settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, ValidatorFunctionWrapHandler, WithJsonSchema, WrapValidator

from atdiff.core.choices import (
    WHITE,
    BasePrecision,
    Crop,
    Direction,
    Distance,
    Method,
    Norm,
    Order,
    PairName,
    Precision,
    PredictionAlias,
    PredictionType,
    Scale,
    Site,
    Solver,
    Target,
    Unreadable,
    Variance,
    Weighting,
    order_of,
    prediction_word,
    scheduler_word,
)

__all__ = [
    "ADAMW",
    "BUCKET_STEP",
    "DECAYS",
    "ENDING",
    "PIXEL_MODELS",
    "SELF",
    "SMALL_PIPELINES",
    "AdversaryConfig",
    "ConsistencyConfig",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "SchedulerConfig",
    "Settings",
    "TrainConfig",
    "TrainingConfig",
    "ValidationConfig",
]

# What is said of values out of range is the text beside the range.
Count = Annotated[int, Field(ge=1), "must be at least 1"]
Natural = Annotated[int, Field(ge=0), "must not be negative"]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Guidance = Annotated[Finite, "must be finite and 0 or more: 0 and 1 are no guidance; null for that of the network"]
Beta = Annotated[float, Field(ge=0, lt=1), "must lie in [0, 1); [0.9, 0.999] is usual"]

PIXEL_MODELS = ("mlp", "unet", "dit", "adm")
SELF = "self"  # as consistency.teacher: what training starts from, a few-step model too
SMALL_PIPELINES = ("tiny-sd", "tiny-sd3", "tiny-flux")
_ModelWord = Literal["mlp", "unet", "dit", "adm", "pipeline", "tiny-sd", "tiny-sd3", "tiny-flux"]
_FUNCTION = r"^.+\.py:[A-Za-z_]\w*$"


def _or_function(value: Any, check: ValidatorFunctionWrapHandler) -> Any:  # noqa: ANN401
    """Let ``FILE.py:FUNCTION`` pass, and check any other value; a union would show in the place of a mistake."""
    return value if isinstance(value, str) and re.match(_FUNCTION, value) else check(value)


_SCHEMA = {"anyOf": [{"enum": list(get_args(_ModelWord))}, {"type": "string", "pattern": _FUNCTION}]}
ModelName = Annotated[_ModelWord, WrapValidator(_or_function), WithJsonSchema(_SCHEMA)]


_SAID = {"type": "string", "enum": [*get_args(PredictionType), *get_args(PredictionAlias)]}
Predicted = Annotated[
    PredictionType | Literal["v"] | None,  # v until the noise schedule tells which one
    BeforeValidator(prediction_word),
    WithJsonSchema({"anyOf": [_SAID, {"type": "null"}]}),
]


BUCKET_STEP = 64  # pixels, as in kohya's scripts
ADAMW = "torch.optim.AdamW"
_DecayWord = Literal["constant", "linear", "cosine"]
DECAYS: tuple[str, ...] = get_args(_DecayWord)
ENDING = ("linear", "cosine")  # at the last pass
_CLASS = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$"


def _or_class(value: Any, check: ValidatorFunctionWrapHandler) -> Any:  # noqa: ANN401
    """Let the path of a class pass, and check any other value; see :func:`_or_function`."""
    return value if isinstance(value, str) and re.match(_CLASS, value) else check(value)


_DECAY_SCHEMA = {"anyOf": [{"enum": list(DECAYS)}, {"type": "string", "pattern": _CLASS}]}
DecayName = Annotated[_DecayWord, WrapValidator(_or_class), WithJsonSchema(_DECAY_SCHEMA)]


def optimizer_path(name: Any) -> Any:  # noqa: ANN401
    """Return the path of an optimizer's class; a word without dots is one of torch's."""
    return f"torch.optim.{name}" if isinstance(name, str) and "." not in name else name


ClassPath = Annotated[str, BeforeValidator(optimizer_path)]


class Settings:
    """A section of settings; pydantic reads it from files and checks what is written there."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}


@dataclass
class DataConfig(Settings):
    """Which images are learned.

    Attributes:
        name: ``digits``, an image folder, an ``.npz`` or ``.parquet`` file, or the name of a data set on the hub.
        split: which part of it.
        image_size: crop and resize to this many pixels; null expects images of one size, or for pipelines is theirs.
        channels: 1 or 3, to convert to greyscale or RGB; null expects images of one kind.
        crop: how ``image_size`` is had: ``bicubic``, antialiased, or ``adm``, halvings by a box filter before it, as in
            guided-diffusion.
        background: the colour that transparent pixels are composed on, a name or ``#rrggbb``; null drops the
            transparency and shows the colours that are hidden under it.
        image_column: of a table; default the first that holds images.
        label_column: of a table, whole numbers or text; default the first of classes.
        labels: keep only the images of these classes, by number, to train on and to be judged against; null for all.
            Classes keep their numbers and captions.
        flip: mirror half of the images left to right; those of pipelines are encoded both ways.
        class_conditional: give the labels to the network.
        captions: one a class, which makes text-to-image data of labelled images; or one for all images of a folder
            without classes.
        caption_column: of a table; default the first that holds text.
        caption_tokens: that the T5 of SD3 and Flux cuts or fills a caption to; null for the pipeline's own number (256
            and 512). Fewer make a smaller cache and faster passes.
        buckets: crop each image to the bucket of the nearest aspect ratio instead of a square; every batch is of one
            bucket. Text-to-image data only.
        bucket_step: pixels that the sides of buckets are multiples of. Their areas are at most that of
            ``image_size``, their sides from half of it to its double.
        limit: read only so many images; null for all. Text-to-image data only.
        streaming: of webdataset shards, parquet files and hub data sets with captions: read and encode their images one
            batch at a time, without a list of them in memory or a copy on the disk; the latents alone are kept.
        unreadable: what becomes of files that cannot be read as images: ``refuse`` lists them before training,
            ``skip`` leaves them out.
        latents: a folder that ``atdiff encode`` made, in the place of the images, of which none is read. What is read
            and how is then as it was encoded: of the settings above, only ``flip`` is the run's own. Pipelines only.
    """

    name: str = "digits"
    split: str = "train"
    image_size: int | None = None
    channels: int | None = None
    crop: Crop = "bicubic"
    background: str | None = WHITE
    image_column: str | None = None
    label_column: str | None = None
    labels: list[Natural] | None = None
    flip: bool = False
    class_conditional: bool = False
    captions: list[str] | None = None
    caption_column: str | None = None
    caption_tokens: int | None = None
    buckets: bool = False
    bucket_step: Count = BUCKET_STEP
    limit: int | None = None
    streaming: bool = False
    unreadable: Unreadable = "refuse"
    latents: str | None = None


@dataclass
class ModelConfig(Settings):
    """Which network, and its constructor's arguments.

    Attributes:
        name: ``mlp``, ``unet`` (``UNet2DModel``), ``dit`` or ``adm``, of pixels; ``pipeline``, the network of the
            pipeline that ``training.init`` names (Stable Diffusion, SD3, Flux, DiT and others), on its latents;
            ``FILE.py:FUNCTION``, a pipeline that the function makes for the data; ``tiny-sd``, ``tiny-sd3`` and
            ``tiny-flux``, small ones that ``studies/small_pipelines.py`` of the repository makes.
        args: of the constructor, or of the function.
        variant: of the weights of the pipelines that ``training.init`` and ``consistency.teacher`` name, such as
            ``fp16``; null for the plain ones, or the only ones. Training and what it leaves are float32 in any case.
        config: of ``training.init`` where that is a pipeline in one file (``.safetensors``, ``.ckpt``): a pipeline
            folder or hub id with its configuration and tokenizers; null for the one on the hub that diffusers finds for
            its weights.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    name: ModelName = "mlp"
    args: dict[str, Any] = field(default_factory=dict)
    variant: str | None = None
    config: str | None = None
    gradient_checkpointing: bool = False


@dataclass
class LoraConfig(Settings):
    """Low-rank adapters of a pipeline's U-Net, trained instead of its weights.

    Attributes:
        rank: of the adapters; 0 trains all weights.
        alpha: their scale times the rank; default the rank.
        targets: names of layers; null for those of LCM-LoRA.
        base_precision: of the frozen weights under the adapters, and of a teacher's: ``float32``, ``bf16``, or linear
            layers in fewer bits and the rest in bf16. These are ``fp8`` and ``int8wo``, 8 bits by torchao, and ``int8``
            and ``nf4``, 8 and 4 bits by bitsandbytes, on a GPU. The adapters are float32.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] | None = None
    base_precision: BasePrecision = "float32"


@dataclass
class SchedulerConfig(Settings):
    """The forward process. What is left out is that of ``training.init``, and what is given must agree with it.

    Attributes:
        name: class name of a diffusers scheduler; null for that of ``training.init``, or ``DDPMScheduler``.
        args: of its constructor; null for those of ``training.init``, or cosine betas.
    """

    name: str | None = None
    args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Write out the prediction type that another name of it stands for, as diffusers calls it."""
        if self.args and "prediction_type" in self.args:
            self.args = {**self.args, "prediction_type": scheduler_word(self.args["prediction_type"])}


@dataclass
class ObjectiveConfig(Settings):
    """What is learned; see :class:`atdiff.DenoisingObjective`.

    Attributes:
        prediction_type: ``epsilon``, ``sample``, ``v_prediction``, ``flow`` or ``edm``, or another name, such as
            ``eps``, ``x0`` or ``v``; null for that of ``training.init``, or what the scheduler says.
        variance: ``learned_range`` learns it beside the mean.
        timestep_sampler: from which timesteps are drawn.
        weighting: of the loss by the signal-to-noise ratio.
        snr_gamma: of either weighting.
        label_dropout: share of labels replaced by the null label, for classifier-free guidance.
        ot: assign the noises of a batch to its images by least total squared distance, among images of equal
            conditions.
        nearest: of how many draws of its noise an image takes the nearest; 4 is usual, 0 for none.
        explorative: of how many draws of its noise an image takes the one at which the network errs least; 0 for none.
            Three draws are charged a pass per batch, rounded up.
        input_perturbation: gamma of DDPM-IP; 0 for none.
        slowed_interpolation: gamma of MixFlow; 0 for none.
        reflow: pairs of noise and sample, drawn from ``training.init``, that are trained on in the place of images, as
            in rectified flow; 0 for none. They are taken as they are drawn, whatever ``data.flip``.
        reflow_steps: of the sampler of second order that draws the pairs.
        reflow_passes: of ``training.passes`` that count as behind when training starts, since the pairs cost as much;
            null for a third of a pass an evaluation and batch.
    """

    prediction_type: Predicted = None
    variance: Variance = "fixed"
    timestep_sampler: Literal["uniform", "loss-second-moment", "logit-normal", "beta", "log-normal"] = "uniform"
    weighting: Weighting = "none"
    snr_gamma: float = 5.0
    label_dropout: float = 0.0
    ot: bool = False
    nearest: Natural = 0
    explorative: Natural = 0
    input_perturbation: float = 0.0
    slowed_interpolation: float = 0.0
    reflow: Natural = 0
    reflow_steps: Count = 16
    reflow_passes: Natural | None = None

    def __post_init__(self) -> None:
        """Write out the prediction type that another name of it stands for."""
        self.prediction_type = prediction_word(self.prediction_type)


@dataclass
class ConsistencyConfig(Settings):
    """Consistency distillation and training; see :class:`atdiff.ConsistencyObjective`.

    Attributes:
        mode: ``none`` trains a denoiser; ``distillation`` from a teacher; ``training`` without one.
        teacher: a run, pipeline folder or hub id; default ``training.init``. ``self`` takes that too, though it is a
            few-step model already, which is then tuned with itself, as it was, for a teacher.
        solver: of the teacher's step.
        site: which input the adversary perturbs.
        pairs: which timesteps are compared.
        intervals: of the grid of timesteps, which is also the sampler's.
        distance: between the two values.
        huber_c: of the distance; null for the usual one.
        target_decay: of the moving average that is the target; 0 for the network itself, without gradient.
        guidance: range of the teacher's classifier-free guidance scale, on latents.
        embed_guidance: tell the network the scale; LoRA trains without.
        sample_guidance: scale when sampling, as diffusers counts it. Null for 1, which is none, where the network was
            distilled without being told the scale, as LoRA is: a scale above guides it once more. Null for the usual
            one of the pipeline elsewhere, within ``guidance`` where the network was distilled and is told.
    """

    mode: Literal["none", "distillation", "training"] = "none"
    teacher: str | None = None
    solver: Solver = "ddim"
    site: Site = "student"
    pairs: PairName = "even"
    intervals: int = 50
    distance: Distance = "pseudo-huber"
    huber_c: float | None = None
    target_decay: float = 0.95
    guidance: tuple[float, float] = (3.0, 15.0)
    embed_guidance: bool = True
    sample_guidance: Guidance | None = None


@dataclass
class AdversaryConfig(Settings):
    """Who perturbs the input; see :class:`atdiff.Adversary`. One pass is plain training.

    Attributes:
        norm: of a sample's perturbation.
        step_size: norm of one step, times the scale.
        dose: of the residual, in place of ``step_size``: ``auto``, or the ``k`` of ``k sigma_t (x0 - x0_hat)``, such as
            0.15. With nothing else said of the method, it is ``pgd`` in two passes along the residual.
        steps: of the sampler that ``dose: auto`` is for, such as 8; implies it.
        passes: forward-backward passes a batch.
        radius: bound of the perturbation's norm, times the scale; null for none.
        scale: of steps by noise level: ``constant``, ``sigma``, ``high`` (high noise only) or ``middle``; null for
            ``constant`` on schedulers of the DDPM family and ``sigma`` on others.
        noise_levels: low and high: perturb only samples between them, from 0 (data) to 1 (noise); null for all.
        rescale_noise: give the perturbed noise of each sample the norm that its noise had.
        method: ``free`` updates the weights at every pass, ``pgd`` at the last of a batch; ``equivariance`` adds a
            regulariser to the plain loss; ``soar`` (2 passes or more), ``adr`` (2), ``contrastive`` (1) and ``mac`` (2)
            are rivals without steps.
        weight: of what ``equivariance`` (usually 1), ``soar`` (1), ``adr`` (1) and ``contrastive`` (0.05) add to the
            plain loss; of the half of the pairs that ``mac`` prefers (2). No effect with ``free`` and ``pgd``.
        direction: of the steps.
        order: which passes of a batch update the weights together.
        target: ``equivariant`` moves the network's target with the perturbation.
    """

    norm: Norm = "l2"
    step_size: float = 0.0
    dose: float | Literal["auto"] | None = None
    steps: int | None = None
    passes: int = 1
    radius: float | None = None
    scale: Scale | None = None
    noise_levels: tuple[float, float] | None = None
    rescale_noise: bool = False
    method: Method = "free"
    direction: Direction = "gradient"
    order: Annotated[Order, BeforeValidator(order_of)] = "consecutive"
    target: Target = "equivariant"
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Write out the method where a dose is all that is said, and today's word for the order."""
        self.order = order_of(self.order)
        if self.steps is not None and self.dose is None:
            self.dose = "auto"
        if self.dose is not None and (self.method, self.passes, self.direction) == ("free", 1, "gradient"):
            self.method, self.passes, self.direction = "pgd", 2, "residual"


@dataclass
class OptimizerConfig(Settings):
    """The optimizer and its learning rate.

    Attributes:
        name: the path of its class, such as ``bitsandbytes.optim.AdamW8bit``, ``prodigyopt.Prodigy``,
            ``schedulefree.AdamWScheduleFree`` or ``torch.optim.Muon``, which trains the matrices, and AdamW the rest.
        args: further arguments of the class.
        lr: the learning rate, after the warm-up and before the decay.
        betas: of AdamW; those of other classes are among ``args``.
        weight_decay: of AdamW, likewise.
        warmup_passes: over which the learning rate rises from 0.
        decay: of the learning rate until the last pass: ``constant``, ``linear``, ``cosine``, or the path of a class of
            ``torch.optim.lr_scheduler``, which steps once a pass after the warm-up.
        decay_args: of that class.
        grad_clip: norm that gradients are clipped to; null for none.
    """

    name: ClassPath = ADAMW
    args: dict[str, Any] = field(default_factory=dict)
    lr: Annotated[Finite, "must be finite and not negative; 1e-4 is usual"] = 1e-3
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Annotated[Finite, "must be finite and not negative; 0 or 0.01 is usual"] = 0.0
    warmup_passes: int = 0
    decay: DecayName = "constant"
    decay_args: dict[str, Any] = field(default_factory=dict)
    grad_clip: Annotated[float, Field(gt=0), "must be above 0; null clips nothing"] | None = 1.0

    def __post_init__(self) -> None:
        """Write out the path of one of torch's classes."""
        self.name = optimizer_path(self.name)


@dataclass
class TrainingConfig(Settings):
    """How long, how fast, and what is written meanwhile.

    Attributes:
        passes: forward-backward passes in all, the unit in which arms are compared.
        batch_size: images a pass and process, micro-batches included.
        accumulate: micro-batches a weight update.
        ema_decay: of the exponential moving average, stepped at every weight update.
        ema_warmup: raise that decay from 0, as ``min(ema_decay, (1 + n) / (10 + n))`` after ``n`` updates, so that the
            initial weights are no part of the average, however short the run.
        precision: ``no`` (float32), ``bf16``, ``fp16``, or ``auto``: ``bf16`` where the device has it, else ``no``.
        compile: run the network through ``torch.compile``.
        shard: split weights, gradients, optimizer state and averages over the processes (FSDP), for networks that are
            too large for one GPU.
        seed: of the weights, the order of the data and every draw.
        init: a run, pipeline folder or hub id whose (EMA) weights training starts from, with its noise schedule and
            prediction type.
        log_every: passes between lines of ``metrics.jsonl``.
        sample_every: passes between grids of samples; 0 for none but the last.
        checkpoint_every: passes between checkpoints; the last one is always written.
        keep_checkpoints: how many of the newest are kept; the one of the lowest mean loss is kept beside them.
        max_skipped: steps that may be skipped because a gradient is not finite; at one more the run ends.
        tracker: a tracker of Accelerate, such as ``tensorboard``, ``wandb`` or ``trackio``, which gets the lines of
            ``metrics.jsonl``, the settings and the grids of samples as well.
    """

    passes: Count = 1000
    batch_size: Count = 128
    accumulate: Count = 1
    ema_decay: Annotated[float, Field(ge=0, lt=1), "must lie in [0, 1); 0.999 is usual"] = 0.999
    ema_warmup: bool = True
    precision: Precision = "no"
    compile: bool = False
    shard: bool = False
    seed: Natural = 0
    init: str | None = None
    log_every: Count = 100
    sample_every: Natural = 0
    checkpoint_every: Count = 1000
    keep_checkpoints: Count = 2
    max_skipped: Natural = 20
    tracker: str | None = None


@dataclass
class ValidationConfig(Settings):
    """Images of prompts of yours, drawn while a pipeline is trained, at each of several numbers of steps.

    They are drawn with every grid of samples (``training.sample_every``) by the average weights, from the same noise at
    each number of steps, and change nothing of the training.

    Attributes:
        prompts: one an image; null draws none. Of DiT, numbers of classes.
        negative_prompt: what guidance points away from; null for nothing.
        guidance_scale: as diffusers counts it; null for that of the samples.
        steps: of the sampler, a grid each.
    """

    prompts: list[str] | None = None
    negative_prompt: str | None = None
    guidance_scale: Guidance | None = None
    steps: list[Count] = field(default_factory=lambda: [4, 8])


@dataclass
class TrainConfig(Settings):
    """One training run.

    Attributes:
        data: which images are learned.
        model: which network.
        scheduler: the forward process.
        objective: what is learned.
        consistency: consistency distillation and training.
        lora: low-rank adapters of a pipeline.
        adversary: who perturbs the input.
        optimizer: the optimizer and its learning rate.
        training: how long, how fast, and what is written meanwhile.
        validation: images of prompts, drawn meanwhile.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
