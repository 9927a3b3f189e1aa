"""The settings of a training run: a tree of typed dataclasses."""

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

# The text beside a range is the error message for values outside it.
Count = Annotated[int, Field(ge=1), "must be at least 1"]
Natural = Annotated[int, Field(ge=0), "must not be negative"]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Guidance = Annotated[Finite, "must be finite and 0 or more: 0 and 1 mean no guidance; null for the network's default"]
Beta = Annotated[float, Field(ge=0, lt=1), "must lie in [0, 1); [0.9, 0.999] is usual"]

PIXEL_MODELS = ("mlp", "unet", "dit", "adm")
SELF = "self"  # as consistency.teacher: training.init itself, even if it is a few-step model
SMALL_PIPELINES = ("tiny-sd", "tiny-sd3", "tiny-flux")
_ModelWord = Literal["mlp", "unet", "dit", "adm", "pipeline", "tiny-sd", "tiny-sd3", "tiny-flux"]
_FUNCTION = r"^.+\.py:[A-Za-z_]\w*$"


def _or_function(value: Any, check: ValidatorFunctionWrapHandler) -> Any:  # noqa: ANN401
    """Accept ``FILE.py:FUNCTION`` and validate anything else; a union type would show up in error locations."""
    return value if isinstance(value, str) and re.match(_FUNCTION, value) else check(value)


_SCHEMA = {"anyOf": [{"enum": list(get_args(_ModelWord))}, {"type": "string", "pattern": _FUNCTION}]}
ModelName = Annotated[_ModelWord, WrapValidator(_or_function), WithJsonSchema(_SCHEMA)]


_SAID = {"type": "string", "enum": [*get_args(PredictionType), *get_args(PredictionAlias)]}
Predicted = Annotated[
    PredictionType | Literal["v"] | None,  # v until resolved by the noise schedule
    BeforeValidator(prediction_word),
    WithJsonSchema({"anyOf": [_SAID, {"type": "null"}]}),
]


BUCKET_STEP = 64  # pixels, as in kohya's scripts
ADAMW = "torch.optim.AdamW"
_DecayWord = Literal["constant", "linear", "cosine"]
DECAYS: tuple[str, ...] = get_args(_DecayWord)
ENDING = ("linear", "cosine")  # decays that end at the last pass
_CLASS = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$"


def _or_class(value: Any, check: ValidatorFunctionWrapHandler) -> Any:  # noqa: ANN401
    """Accept a class path and validate anything else; see :func:`_or_function`."""
    return value if isinstance(value, str) and re.match(_CLASS, value) else check(value)


_DECAY_SCHEMA = {"anyOf": [{"enum": list(DECAYS)}, {"type": "string", "pattern": _CLASS}]}
DecayName = Annotated[_DecayWord, WrapValidator(_or_class), WithJsonSchema(_DECAY_SCHEMA)]


def optimizer_path(name: Any) -> Any:  # noqa: ANN401
    """Return the class path of an optimizer; a name without dots is in ``torch.optim``."""
    return f"torch.optim.{name}" if isinstance(name, str) and "." not in name else name


ClassPath = Annotated[str, BeforeValidator(optimizer_path)]


class Settings:
    """Base class of a section of settings, which pydantic reads from files and validates."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}


@dataclass
class DataConfig(Settings):
    """The training data.

    Attributes:
        name: ``digits``, an image folder, an ``.npz`` or ``.parquet`` file, or a dataset on the hub.
        split: split of the dataset.
        image_size: crop and resize to this many pixels; null for images that already have the same size, or, for
            pipelines, the pipeline's own size.
        channels: 3 converts to RGB, 1 to greyscale; null for images that already have the same number of channels.
        crop: resizing method for ``image_size``: ``bicubic`` (antialiased), or ``adm`` (halved with a box filter
            first, as in guided-diffusion).
        background: colour to composite transparent pixels onto, a name or ``#rrggbb``; null drops the alpha channel
            and keeps the colours hidden under it.
        image_column: image column of a table; default: the first one with images.
        label_column: label column of a table (whole numbers or text); default: the first one with classes.
        labels: train and evaluate only on images of these classes, given by number; null for all. Classes keep their
            numbers and captions.
        flip: mirror half of the images left to right; for pipelines, both versions are encoded.
        class_conditional: pass the labels to the network.
        captions: one caption per class, which turns labelled images into text-to-image data; or one caption for all
            images of a folder without classes.
        caption_column: caption column of a table; default: the first one with text.
        caption_tokens: token length for the T5 of SD3 and Flux, to which captions are truncated or padded; null for
            the pipeline's own (256 and 512). A smaller value reduces the cache and the cost of a pass.
        buckets: crop each image to the bucket of the nearest aspect ratio instead of a square; each batch comes from
            one bucket. Text-to-image data only.
        bucket_step: bucket sides are multiples of this many pixels. Bucket areas are at most that of ``image_size``,
            and sides range from half of it to twice it.
        limit: train and evaluate only on this many images, from the first; null for all. Evaluation commands with
            ``--data`` or ``--split`` use all images. Text-to-image data only.
        streaming: read and encode captioned webdataset shards, parquet files and hub datasets one batch at a time,
            without an image list in memory or a copy on disk; only the latents are kept.
        unreadable: files that cannot be read as images: ``refuse`` lists them in an error before training, ``skip``
            leaves them out.
        latents: folder from ``atdiff encode`` to train on instead of images. All settings above except ``flip`` are
            then those it was encoded with. Pipelines only.
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
    """The network.

    Attributes:
        name: ``mlp``, ``unet`` (``UNet2DModel``), ``dit`` or ``adm``, on pixels; ``pipeline``, the latent network of
            the pipeline in ``training.init`` (Stable Diffusion, SD3, Flux, DiT and others); ``FILE.py:FUNCTION``, a
            function that makes a pipeline for the data; ``tiny-sd``, ``tiny-sd3`` or ``tiny-flux``, small pipelines
            made by ``studies/small_pipelines.py`` in the repository.
        args: arguments of the network's constructor, or of the function.
        variant: weights variant of the pipelines in ``training.init`` and ``consistency.teacher``, such as ``fp16``;
            null for the weights without a variant, or the only variant. Training and its output are float32 either
            way.
        config: pipeline folder or hub id with the configuration and tokenizers, for a ``training.init`` in one file
            (``.safetensors``, ``.ckpt``); null for the hub configuration that diffusers infers from the weights.
        gradient_checkpointing: recompute activations in the backward pass instead of storing them.
    """

    name: ModelName = "mlp"
    args: dict[str, Any] = field(default_factory=dict)
    variant: str | None = None
    config: str | None = None
    gradient_checkpointing: bool = False


@dataclass
class LoraConfig(Settings):
    """Low-rank adapters (LoRA) of a pipeline's network, trained instead of its weights.

    Attributes:
        rank: rank of the adapters; 0 trains all weights.
        alpha: the adapters are scaled by ``alpha / rank``; null for ``alpha = rank``.
        targets: names of the layers to adapt; null for the pipeline's usual ones (LCM-LoRA's for Stable Diffusion).
        base_precision: precision of the frozen weights under the adapters, and of a teacher's: ``float32``, ``bf16``,
            or a quantisation of the linear layers with the rest in bf16: ``fp8`` or ``int8wo`` (8 bits, torchao),
            ``int8`` or ``nf4`` (8 and 4 bits, bitsandbytes, on a GPU). The adapters are float32.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] | None = None
    base_precision: BasePrecision = "float32"


@dataclass
class SchedulerConfig(Settings):
    """The forward process. Omitted settings are taken from ``training.init``; given ones must agree with it.

    Attributes:
        name: class name of a diffusers scheduler; null for the scheduler of ``training.init``, else
            ``DDPMScheduler``.
        args: arguments of its constructor; null for those of ``training.init``, else cosine betas.
    """

    name: str | None = None
    args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Replace an alias of the prediction type with diffusers' name for it."""
        if self.args and "prediction_type" in self.args:
            self.args = {**self.args, "prediction_type": scheduler_word(self.args["prediction_type"])}


@dataclass
class ObjectiveConfig(Settings):
    """The training objective; see :class:`atdiff.DenoisingObjective`.

    Attributes:
        prediction_type: ``epsilon``, ``sample``, ``v_prediction``, ``flow`` or ``edm``, or an alias such as ``eps``,
            ``x0`` or ``v``; null for that of ``training.init``, else the scheduler's.
        variance: ``learned_range`` also learns the variance.
        timestep_sampler: distribution of training timesteps; ``loss-second-moment`` adapts to the loss.
        weighting: weight of the loss by signal-to-noise ratio.
        snr_gamma: gamma of ``min-snr`` and ``high-noise``.
        label_dropout: share of labels or captions replaced by the null label or empty prompt, for classifier-free
            guidance.
        ot: match noise to the images of a batch by minimum total squared distance, among images with equal conditions.
        nearest: give each image the nearest of this many noise samples; 4 is usual, 0 for none.
        explorative: give each image the one of this many noise samples with the smallest network error; 0 for none.
            Three noise samples cost one pass per batch, rounded up.
        input_perturbation: gamma of DDPM-IP; 0 for none.
        slowed_interpolation: gamma of MixFlow; 0 for none.
        reflow: train on this many pairs of noise and sample, generated by ``training.init``, instead of images, as in
            rectified flow; 0 for none. ``data.flip`` does not apply to pairs.
        reflow_steps: steps of the second-order sampler that generates the pairs.
        reflow_passes: number of ``training.passes`` charged for generating the pairs, so training starts after them;
            null for a third of a pass per evaluation and batch.
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
        """Replace an alias of the prediction type with its full name."""
        self.prediction_type = prediction_word(self.prediction_type)


@dataclass
class ConsistencyConfig(Settings):
    """Consistency distillation and training; see :class:`atdiff.ConsistencyObjective`.

    Attributes:
        mode: ``none`` trains a denoiser; ``distillation`` uses a teacher; ``training`` has none.
        teacher: a run, pipeline folder or hub id; default ``training.init``. ``self`` also uses ``training.init``, but
            allows a few-step model, which is then tuned with its original weights as teacher.
        solver: solver of the teacher's step.
        site: where the adversary perturbs: the ``student``'s input, or the ``teacher``'s estimate.
        pairs: how the two timesteps to compare are chosen.
        intervals: number of intervals in the timestep grid, which the sampler shares.
        distance: distance between the two values.
        huber_c: constant c of the Huber distances; null for the usual value.
        target_decay: decay of the moving average used as target; 0 for the network itself, without gradient.
        guidance: range of the teacher's classifier-free guidance scale, for latents.
        embed_guidance: give the network the scale as an input; no effect with LoRA, which trains without it.
        sample_guidance: guidance scale for sampling, in diffusers' convention. If null: 1 (no guidance) for a
            distilled network that does not take the scale as input, such as a LoRA, where a scale above 1 would apply
            guidance a second time; otherwise the pipeline's usual scale, clipped to ``guidance`` for a distilled
            network that takes it as input.
    """

    mode: Literal["none", "distillation", "training"] = "none"
    teacher: str | None = None
    solver: Solver = "ddim"
    site: Site = "student"
    pairs: PairName = "even"
    intervals: Count = 50
    distance: Distance = "pseudo-huber"
    huber_c: float | None = None
    target_decay: float = 0.95
    guidance: tuple[float, float] = (3.0, 15.0)
    embed_guidance: bool = True
    sample_guidance: Guidance | None = None


@dataclass
class AdversaryConfig(Settings):
    """The adversary, which perturbs the input; see :class:`atdiff.Adversary`. One pass is plain training.

    Attributes:
        norm: norm that measures a sample's perturbation.
        step_size: norm of one step, multiplied by the scale.
        dose: strength along the residual, instead of ``step_size``: ``auto``, or the ``k`` of ``k sigma_t (x0 -
            x0_hat)``, such as 0.15. If the method is not set, it is ``pgd`` in two passes along the residual.
        steps: number of sampling steps that ``dose: auto`` tunes for, such as 8; implies it.
        passes: forward-backward passes per batch.
        radius: maximum norm of the perturbation, multiplied by the scale; null for none.
        scale: factor of steps and radius by noise level: ``constant``, ``sigma``, ``high`` (high noise only) or
            ``middle``; null for ``constant`` on schedulers of the DDPM family and ``sigma`` on others.
        noise_levels: ``[low, high]``: perturb only samples with a noise level between them, from 0 (data) to 1
            (noise); null for all.
        rescale_noise: rescale each sample's perturbed noise to the norm of its original noise.
        method: ``free`` updates the weights at every pass, ``pgd`` at the last pass of a batch; ``equivariance`` adds
            a regulariser to the plain loss; ``soar`` (2 passes or more), ``adr`` (2), ``contrastive`` (1) and ``mac``
            (2) are rival methods without a step size.
        weight: weight of the term that ``equivariance`` (usually 1), ``soar`` (1), ``adr`` (1) and ``contrastive``
            (0.05) add to the plain loss; for ``mac``, weight of the half of the pairs with the smaller error (2). No
            effect with ``free`` and ``pgd``.
        direction: direction of the steps.
        order: ``consecutive`` repeats each batch for all its passes; ``staggered`` combines fresh and perturbed
            samples in every update.
        target: ``equivariant`` moves the network's target with the perturbation; ``invariant`` keeps it.
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
        """Fill in the method if only a dose is given, and replace old names of the order."""
        self.order = order_of(self.order)
        if self.steps is not None and self.dose is None:
            self.dose = "auto"
        if self.dose is not None and (self.method, self.passes, self.direction) == ("free", 1, "gradient"):
            self.method, self.passes, self.direction = "pgd", 2, "residual"


@dataclass
class OptimizerConfig(Settings):
    """The optimizer and its learning rate.

    Attributes:
        name: class path, such as ``bitsandbytes.optim.AdamW8bit``, ``prodigyopt.Prodigy``,
            ``schedulefree.AdamWScheduleFree`` or ``torch.optim.Muon``, which trains the matrices and leaves the rest
            to AdamW.
        args: further arguments of the class.
        lr: learning rate, after the warm-up and before the decay.
        betas: AdamW's betas; for other classes, use ``args``.
        weight_decay: AdamW's weight decay; for other classes, use ``args``.
        warmup_passes: passes over which the learning rate rises from 0.
        decay: learning-rate schedule until the last pass: ``constant``, ``linear``, ``cosine``, or the path of a class
            in ``torch.optim.lr_scheduler``, which steps once per pass after the warm-up.
        decay_args: arguments of that class.
        grad_clip: maximum gradient norm; null for no clipping.
    """

    name: ClassPath = ADAMW
    args: dict[str, Any] = field(default_factory=dict)
    lr: Annotated[Finite, "must be finite and not negative; 1e-4 is usual"] = 1e-3
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Annotated[Finite, "must be finite and not negative; 0 or 0.01 is usual"] = 0.0
    warmup_passes: int = 0
    decay: DecayName = "constant"
    decay_args: dict[str, Any] = field(default_factory=dict)
    grad_clip: Annotated[float, Field(gt=0), "must be above 0, or null for no clipping"] | None = 1.0

    def __post_init__(self) -> None:
        """Expand the bare name of a torch class to its path."""
        self.name = optimizer_path(self.name)


@dataclass
class TrainingConfig(Settings):
    """Length, speed and output of training.

    Attributes:
        passes: total number of forward-backward passes, the unit in which arms are compared.
        batch_size: images per pass and process, over all micro-batches.
        accumulate: micro-batches per weight update.
        ema_decay: decay of the exponential moving average (EMA), which is updated at every weight update.
        ema_warmup: ramp up the decay as ``min(ema_decay, (1 + n) / (10 + n))`` after ``n`` updates, so that the
            average forgets the initial weights even in a short run.
        precision: ``no`` (float32), ``bf16``, ``fp16``, or ``auto``: ``bf16`` if the device supports it, else ``no``.
        compile: run the network through ``torch.compile``.
        shard: shard weights, gradients, optimizer state and averages across processes (FSDP), for networks too large
            for one GPU.
        seed: seed of the weights, the order of the data and all random draws.
        init: a run, pipeline folder or hub id to start from: its (EMA) weights, noise schedule and prediction type.
        log_every: passes between lines of ``metrics.jsonl``.
        sample_every: passes between sample grids; 0 for the last one only.
        checkpoint_every: passes between checkpoints; the last one is always written.
        keep_checkpoints: number of newest checkpoints to keep, in addition to the one with the lowest mean loss.
        max_skipped: number of updates that may be skipped for a non-finite gradient; one more ends the run.
        tracker: an Accelerate tracker, such as ``tensorboard``, ``wandb`` or ``trackio``, that also receives the lines
            of ``metrics.jsonl``, the settings and the sample grids.
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
    """Samples from your own prompts while a pipeline trains, at several step counts.

    They are generated with every sample grid (``training.sample_every``), with the EMA weights and from the same noise
    at each number of steps, and do not affect training.

    Attributes:
        prompts: one prompt per image, or class numbers for DiT; null for no validation.
        negative_prompt: negative prompt for guidance; null for none.
        guidance_scale: guidance scale in diffusers' convention; null for that of the sample grids.
        steps: step counts of the sampler, one grid each.
    """

    prompts: list[str] | None = None
    negative_prompt: str | None = None
    guidance_scale: Guidance | None = None
    steps: list[Count] = field(default_factory=lambda: [4, 8])


@dataclass
class TrainConfig(Settings):
    """One training run.

    Attributes:
        data: the training data.
        model: the network.
        scheduler: the forward process.
        objective: the training objective.
        consistency: consistency distillation and training.
        lora: low-rank adapters of a pipeline.
        adversary: the adversary, which perturbs the input.
        optimizer: the optimizer and its learning rate.
        training: length, speed and output of training.
        validation: samples from your own prompts during training.
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
