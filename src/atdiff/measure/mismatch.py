"""The law of a network's inputs while sampling against their law in training.

In training a network sees ``x_t = alpha_t x0 + sigma_t noise`` of true images; while sampling it sees what its own
earlier steps made. At every evaluation of a sampler two sets are compared: the sampler's ``x_t``, and truly noised
images at the same ``(alpha_t, sigma_t)``. With ``x`` of the first set and ``y`` of the second, both of ``D`` pixels and
in the units of the schedule's ``x_t``:

- ``mean_bias``: ``||mean(x) - mean(y)||_2 / sqrt(D)``;
- ``variance_ratio``, ``variance_bias``: the mean over pixels of ``var(x)``, over and minus that of ``var(y)``;
- ``sliced_wasserstein``: distance of ``x`` and ``y`` over 256 projections;
- ``frechet_pixels``: Frechet distance of Gaussian fits of ``x`` and ``y``; left out above 4,096 pixels, and where a
  set has fewer samples than pixels, whose covariance says nothing of most directions;
- ``noise_norm_ratio``, ``noise_norm_std_ratio``: mean and standard deviation of ``||noise_hat||_2`` at ``x`` over
  those at ``y``, whatever the network predicts: the measure of exposure bias of `Ning et al.
  <https://arxiv.org/abs/2308.15321>`_, section 3;
- ``frechet_features``: Frechet distance of an extractor's features of ``x0_hat``, in 8 bits, at ``x`` and at ``y``;
  left out where a set has fewer samples than features.

Of a latent pipeline ``x`` and ``y`` are latents, the network is guided as in sampling, both sides are told the captions
(or prompts) of the true images, and there are no features: its ``x0_hat`` would have to be decoded at every step.

Finite sets of one law differ too. So each figure has a *floor*, of the suffix ``_floor``: the same figure of a second
truly noised set in the place of ``x``. Only what is clear of the floor is mismatch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, network_time, noise_level
from atdiff.core.prediction import make_prediction, resolve_prediction_type, to_clean, to_noise
from atdiff.data.reading import AS_TRAINED, DataOptions
from atdiff.data.sources import ImageData, to_uint8
from atdiff.measure.cells import versions
from atdiff.measure.kept import Entries, Notify
from atdiff.measure.latents import LatentRun, TrueLatents
from atdiff.measure.stale import say
from atdiff.measure.subjects import open_subject
from atdiff.metrics.distances import GaussianFit, sliced_wasserstein
from atdiff.metrics.features.extractors import extract, feature_layers, make_extractor
from atdiff.models.call import class_embeddings, predict
from atdiff.models.inference import evaluating
from atdiff.pipelines.model import TrainedModel, reference_name
from atdiff.sampling.corrections import Correction, make_correction
from atdiff.sampling.generate import denoise_steps, generate, image_generators
from atdiff.sampling.schedulers import default_sampler, make_scheduler
from atdiff.system.fingerprint import network_fingerprint
from atdiff.system.locks import one_writer

__all__ = ["MismatchConfig", "measure_mismatch", "mismatch_of_runs"]

# The Frechet distance takes the eigenvalues of D x D matrices: under a second at D = 784, a minute at 4,096.
FRECHET_PIXELS = 4_096
MEASURED = "mismatch.json"


@dataclass(frozen=True)
class MismatchConfig:
    """Which trajectories are compared with truly noised images, and how.

    Attributes:
        sampler: a sampler by name; None for the default sampler of each run.
        steps: of the sampler.
        num: pictures sampled, and truly noised images in each of the two sets.
        seed: of the pictures, and of the images and the noise of the sets.
        extractor: whose features of ``x0_hat`` are compared; None for no such figures.
        weights: a local weights file of the extractor.
        data: the data set of the true images; None for each run's own.
        reading: how they are read, where that is another way than in training.
        prompts: of latent pipelines, for images without captions of their own: one a class, or taken in turn; None for
            those of the training.
        batch_size: pictures at once.
        correction: of the sampler; see :func:`atdiff.sampling.corrections.make_correction`.
        variant: of the weights of pipelines, such as ``fp16``; training folders know their own.
    """

    sampler: str | None
    steps: int
    num: int = 2048
    seed: int = 0
    extractor: str | None = "digits-classifier"
    weights: Path | None = None
    data: str | None = None
    reading: DataOptions = AS_TRAINED
    prompts: tuple[str, ...] | None = None
    batch_size: int = 512
    correction: str = "none"
    variant: str | None = None

    def check(self, training_scheduler: Any) -> None:  # noqa: ANN401  (any diffusers scheduler)
        """Find, before any compute, what cannot be measured on networks of this scheduler.

        Raises:
            UserError: too few pictures, a seed or batch size out of range, or a sampler, steps or correction that do
                not fit.
        """
        if self.num < 2:
            raise UserError(f"num={self.num} samples are too few for a variance; use 2 or more, 2048 as a rule.")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be 1 or more.")
        image_generators(self.seed, [self.num - 1])
        make_scheduler(self.sampler_for(training_scheduler), training_scheduler, self.steps)
        (make_correction(self.correction) or Correction()).check(NoiseSchedule(training_scheduler))

    def sampler_for(self, training_scheduler: Any) -> str:  # noqa: ANN401
        """Return the sampler for a network of this scheduler."""
        return self.sampler or default_sampler(training_scheduler)


@torch.no_grad()
def measure_mismatch(
    denoiser: TrainedModel,
    data: ImageData | TrueLatents,
    config: MismatchConfig,
    extractor: FeatureExtractorBase | None = None,
    device: torch.device | str = "cpu",
    notify: Notify = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Return one record for each evaluation of the network while sampling, and one for the final pictures.

    A record holds ``t`` (the sampler's timestep; None for the final images), ``level`` (1 for noise, 0 for data; see
    :func:`atdiff.core.noise.noise_level`), ``alpha``, ``sigma``, and the figures that the module describes. Those of
    the final images, which are within [-1, 1], compare with the images themselves, and lack the predicted noise. Heun's
    method evaluates twice at a timestep, first after its predictor.

    The pictures are those of ``generate`` with the same sampler, steps and seed. True images are drawn from ``data``
    with replacement, so that both sides are independent draws, and a class-conditional network samples the labels of
    the images drawn. With a correction, the sampler's ``noise_hat`` and ``x0_hat`` are the corrected ones.

    Args:
        denoiser: the network and the scheduler of its training; of latents as
            :func:`atdiff.measure.latents.latent_run` gives it.
        data: the true images, or latents.
        config: what to measure; its ``extractor``, ``weights`` and ``data`` are the caller's to resolve.
        extractor: for ``frechet_features``, else left out, as for latents.
        device: where the network is moved and run.
        notify: called with the number of batches through the network done and in all.

    Raises:
        UserError: as ``config.check``, images of another shape than the network's, or labels that do not fit it.
        FloatingPointError: the pictures are not finite.
    """
    config.check(denoiser.scheduler)
    _check_data(denoiser, data)
    if isinstance(denoiser.model, nn.Module):
        denoiser.model.to(device)
    counter, total = itertools.count(1), _batches(denoiser, config)

    def probe(correction: Correction | None = None) -> _Probe:
        return _Probe(correction, extractor is not None, lambda: notify(next(counter), total))

    sets = [_TrueImages(denoiser, data, config, number, device) for number in (0, 1)]
    sampling = probe(make_correction(config.correction))
    pictures = _sampled(denoiser, config, sets[0], sampling, device)
    scheduler = denoiser.sampling_scheduler(config.sampler_for(denoiser.scheduler), config.steps)
    schedule, timesteps = NoiseSchedule(denoiser.scheduler), scheduler.timesteps
    records: list[dict[str, Any]] = []
    for i, t in enumerate(timesteps):
        # As the network was told it: an EDM sampler may count its timesteps in other units.
        told = network_time(scheduler, t)
        seen = [_Seen.cat(sampling.seen[i :: len(timesteps)]), *(images.shown(told, probe()) for images in sets)]
        alpha, sigma = schedule(told.reshape(1))
        where = {"t": t.item(), "level": noise_level(alpha, sigma).item(), "alpha": alpha.item(), "sigma": sigma.item()}
        records.append(where | _compare(*seen, extractor=extractor))
    keep = extractor is not None
    seen = [_Seen(x0, None, to_uint8(x0) if keep else None) for x0 in (pictures, *(images.x0 for images in sets))]
    records.append({"t": None, "level": 0.0, "alpha": 1.0, "sigma": 0.0} | _compare(*seen, extractor=extractor))
    return records


def _sampled(
    denoiser: TrainedModel, config: MismatchConfig, true: _TrueImages, probe: _Probe, device: torch.device | str
) -> Tensor:
    """Return the pictures, or latents, that the sampler makes for the labels or captions of true ones."""
    sampler = config.sampler_for(denoiser.scheduler)
    if not isinstance(denoiser, LatentRun):
        return generate(
            denoiser.model,
            denoiser.scheduler,
            sampler=sampler,
            steps=config.steps,
            num=config.num,
            shape=denoiser.image_shape,
            seed=config.seed,
            batch_size=config.batch_size,
            class_labels=true.labels,
            correction=probe,
            device=device,
        )
    drawn: list[Tensor] = []
    with evaluating(denoiser.model):
        for part in true.batches():
            scheduler = denoiser.sampling_scheduler(sampler, config.steps)
            generators = image_generators(config.seed, range(part.start, part.stop))
            x = randn_tensor(
                (len(generators), *denoiser.image_shape), generator=generators, device=torch.device(device)
            )
            steps = denoise_steps(
                denoiser.model,
                scheduler,
                x * getattr(scheduler, "init_noise_sigma", 1.0),
                generators=generators,
                model_kwargs=true.conditions(part),
                correction=probe,
            )
            *_, x = steps
            drawn.append(x.float().cpu())
    latents = torch.cat(drawn)
    if not latents.isfinite().all():
        raise FloatingPointError(f"latents of {denoiser.source} are not finite; the network is broken.")
    return latents


@one_writer("folder")
def mismatch_of_runs(
    runs: Sequence[str],
    config: MismatchConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    notify: Notify = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Measure every run that ``out/mismatch.json`` does not hold yet, and write it after each.

    Args:
        runs: training folders, pipeline folders or hub ids.
        config: what to measure.
        out: a folder, made or gone on with, for ``mismatch.json``.
        device: where the networks run.
        notify: called with the number of batches through a network done and in all.

    Returns:
        One entry a run, in the order of ``runs``: ``run``, the recipe of its figures, and ``records`` as
        :func:`measure_mismatch` returns them. The file may hold others, of other runs or settings.

    Raises:
        UserError: a run cannot be loaded or measured, or ``out`` holds something else.
    """
    entries = Entries(out / MEASURED)
    subjects = [
        open_subject(run, config.data, config.reading, config.prompts, guided=True, variant=config.variant)
        for run in dict.fromkeys(runs)
    ]
    for denoiser, data in subjects:
        config.check(denoiser.scheduler)
        _check_data(denoiser, data)
        denoiser.check_corrections([config.correction])
    extractors = [_extractor(data, config, device) for _, data in subjects]
    recipes = [
        _recipe(denoiser, data, config, extractor)
        for (denoiser, data), extractor in zip(subjects, extractors, strict=True)
    ]

    def measured(number: int, advance: Notify) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        denoiser, data = subjects[number]
        records = measure_mismatch(denoiser, data, config, extractors[number], device, advance)
        left_out = _left_out(denoiser, config, extractors[number], records[-1])
        for line in left_out:
            say(f"{denoiser.source}: {line}")
        return records, {"left_out": left_out}

    return entries.complete(recipes, entries.missing(recipes), measured, notify)


def _extractor(
    data: ImageData | TrueLatents, config: MismatchConfig, device: torch.device | str
) -> FeatureExtractorBase | None:
    if config.extractor is None or isinstance(data, TrueLatents):
        return None
    return make_extractor(config.extractor, weights=config.weights, device=device, data=data)


def _left_out(
    denoiser: TrainedModel, config: MismatchConfig, extractor: FeatureExtractorBase | None, record: dict[str, Any]
) -> list[str]:
    """Return what a record lacks, and why, one line each."""
    pixels, few = math.prod(denoiser.image_shape), f"the {config.num} samples are fewer than its"
    lines = []
    if pixels > FRECHET_PIXELS:
        lines.append(f"no Frechet distance of x_t, whose {pixels} values are more than {FRECHET_PIXELS}.")
    elif "frechet_pixels" not in record:
        lines.append(f"no Frechet distance of x_t: {few} {pixels} values (--num {pixels}).")
    if isinstance(denoiser, LatentRun):
        lines.append("no features of x0_hat, which is a latent.")
    elif extractor is not None and "frechet_features" not in record:
        lines.append(f"no Frechet distance of the features of x0_hat: {few} dimensions.")
    return lines


class _Seen(NamedTuple):
    """Inputs of the network and what it makes of them, on the CPU."""

    x: Tensor  # (N, C, H, W), in the schedule's coordinates
    noise_norm: Tensor | None  # (N,), of noise_hat
    clean: Tensor | None  # x0_hat, uint8, like x

    @classmethod
    def cat(cls, batches: Sequence[_Seen]) -> _Seen:
        """Join batches of one timestep."""
        columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*batches, strict=True)]
        return cls(*columns)


class _Probe(Correction):
    """A correction that keeps what passes through it, and changes only what another one changes."""

    def __init__(self, inner: Correction | None, keep_clean: bool, advance: Callable[[], None]) -> None:
        self.inner, self.keep_clean, self.advance = inner or Correction(), keep_clean, advance
        self.moves_steps = self.inner.moves_steps
        self.seen: list[_Seen] = []  # one a call

    def check(self, schedule: NoiseSchedule) -> None:
        self.inner.check(schedule)

    def shift(self, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        return self.inner.shift(x_t, timesteps, schedule)

    def __call__(
        self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, schedule: NoiseSchedule, prediction_type: str
    ) -> Tensor:
        prediction = self.inner(prediction, x_t, timesteps, schedule, prediction_type)
        wide, wide_x, at = prediction.cpu().double(), x_t.cpu().double(), timesteps.cpu()
        noise_norm = to_noise(wide, wide_x, at, schedule, prediction_type).flatten(1).norm(dim=1)
        clean = to_uint8(to_clean(wide, wide_x, at, schedule, prediction_type)) if self.keep_clean else None
        self.seen.append(_Seen(x_t.float().cpu(), noise_norm, clean))
        self.advance()
        return prediction

    def after_step(self, x: Tensor, x0_hat: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
        return self.inner.after_step(x, x0_hat, timesteps, schedule)


class _TrueImages:
    """Images, or latents, drawn from the data, each with its own noise, which is the same at every timestep."""

    def __init__(
        self,
        denoiser: TrainedModel,
        data: ImageData | TrueLatents,
        config: MismatchConfig,
        number: int,
        device: torch.device | str,
    ) -> None:
        rng = np.random.default_rng([config.seed, number])
        self.indices = torch.from_numpy(rng.integers(len(data), size=config.num))
        self.data, self.denoiser, self.batch_size, self.device = data, denoiser, _batch_size(denoiser, config), device
        self.labels: Tensor | None = None
        if isinstance(data, TrueLatents):
            self.x0 = data.x0(self.indices, device)
        else:
            self.x0 = data.x0(self.indices)
            if class_embeddings(denoiser.model) and data.labels is not None:
                self.labels = data.labels[self.indices]
        self.noise = torch.from_numpy(rng.standard_normal(self.x0.shape, dtype=np.float32))

    def batches(self) -> list[slice]:
        """Return the places of each batch."""
        num = len(self.indices)
        return [slice(start, min(start + self.batch_size, num)) for start in range(0, num, self.batch_size)]

    def conditions(self, part: slice) -> dict[str, Tensor]:
        """Return what the network is told of a batch, on the device."""
        if isinstance(self.data, TrueLatents):
            found = self.data.conditions(self.indices[part], self.device)
        else:
            found = {} if self.labels is None else {"class_labels": self.labels[part]}
        return {name: value.to(self.device) for name, value in found.items()}

    def shown(self, t: Tensor, probe: _Probe) -> _Seen:
        """Show the images, noised to the timestep ``t``, to the network, and return what the probe keeps of it."""
        scheduler = self.denoiser.scheduler
        schedule = NoiseSchedule(scheduler)
        prediction_type = resolve_prediction_type(schedule, scheduler)
        prediction = make_prediction(prediction_type, schedule)
        for batch in self.batches():
            x0, noise = self.x0[batch].to(self.device), self.noise[batch].to(self.device)
            timesteps = t.to(self.device).expand(len(x0))
            x_t = schedule.add_noise(x0, noise, timesteps)
            inputs = prediction.network_input(x_t, schedule.levels(timesteps, x_t)[1])
            output = predict(self.denoiser.model, inputs, timesteps, self.conditions(batch))
            # Channels beyond those of the images are a learned variance.
            probe(output[:, : x0.shape[1]], x_t, timesteps, schedule, prediction_type)
        return _Seen.cat(probe.seen)


class _Law(NamedTuple):
    """What distances are taken of, float64."""

    x: Tensor  # (N, D)
    noise_norm: Tensor | None  # (N,)
    features: Tensor | None  # (N, F)

    @classmethod
    def of(cls, seen: _Seen, extractor: FeatureExtractorBase | None) -> _Law:
        """Flatten the inputs and extract the features of the clean images."""
        features = None
        if extractor is not None and seen.clean is not None:
            features = extract(seen.clean, extractor)[feature_layers(extractor)[0]]
        return cls(seen.x.flatten(1).double(), seen.noise_norm, features)


def _compare(sampled: _Seen, true: _Seen, again: _Seen, *, extractor: FeatureExtractorBase | None) -> dict[str, float]:
    """Return the figures of the sampler's set, and as floors those of the second true set."""
    sampled_law, true_law, again_law = (_Law.of(seen, extractor) for seen in (sampled, true, again))
    fits: dict[str, GaussianFit] = {}  # of the true set, which both are compared with
    floors = _distances(again_law, true_law, fits)
    return _distances(sampled_law, true_law, fits) | {f"{name}_floor": value for name, value in floors.items()}


def _distances(law: _Law, true: _Law, fits: dict[str, GaussianFit]) -> dict[str, float]:
    bias = law.x.mean(dim=0) - true.x.mean(dim=0)
    # A ratio of means, not a mean of ratios: a pixel that hardly varies in the data would outweigh all others.
    variance, true_variance = law.x.var(dim=0).mean().item(), true.x.var(dim=0).mean().item()
    out = {
        "mean_bias": bias.square().mean().sqrt().item(),
        "variance_ratio": variance / true_variance,
        "variance_bias": variance - true_variance,
        "sliced_wasserstein": sliced_wasserstein(law.x, true.x),
    }
    if law.x.shape[1] <= FRECHET_PIXELS:
        out |= _frechet("frechet_pixels", law.x, true.x, fits)
    if law.noise_norm is not None and true.noise_norm is not None:
        out["noise_norm_ratio"] = (law.noise_norm.mean() / true.noise_norm.mean()).item()
        out["noise_norm_std_ratio"] = (law.noise_norm.std() / true.noise_norm.std()).item()
    if law.features is not None and true.features is not None:
        out |= _frechet("frechet_features", law.features, true.features, fits)
    return out


def _frechet(name: str, x: Tensor, true: Tensor, fits: dict[str, GaussianFit]) -> dict[str, float]:
    """Return the distance by its name; nothing where there are fewer samples than dimensions."""
    if min(len(x), len(true)) < true.shape[1]:
        return {}
    if name not in fits:
        fits[name] = GaussianFit(true)
    return {name: fits[name].frechet(GaussianFit(x))}


def _batch_size(denoiser: TrainedModel, config: MismatchConfig) -> int:
    return min(config.batch_size, denoiser.most_at_once) if isinstance(denoiser, LatentRun) else config.batch_size


def _batches(denoiser: TrainedModel, config: MismatchConfig) -> int:
    """Return the number of batches through the network: those of the sampler and of two true sets."""
    evaluations = denoiser.evaluations(config.sampler_for(denoiser.scheduler), config.steps)
    return 3 * evaluations * -(-config.num // _batch_size(denoiser, config))


def _check_data(denoiser: TrainedModel, data: ImageData | TrueLatents) -> None:
    if isinstance(data, TrueLatents):  # which were encoded by the pipeline itself
        return
    shape, classes = tuple(data.images.shape[1:]), denoiser.num_classes
    if shape != tuple(denoiser.image_shape):
        raise UserError(
            f"{data.name} has images of shape {shape} but {denoiser.source} makes {tuple(denoiser.image_shape)}: name "
            "the images that it was trained on."
        )
    if classes and (data.num_classes is None or data.num_classes > classes):
        found = "no labels" if data.num_classes is None else f"{data.num_classes} classes"
        raise UserError(
            f"{data.name} has {found} but {denoiser.source} is conditional on {classes} classes: name the images that "
            "it was trained on."
        )


def _recipe(
    denoiser: TrainedModel,
    data: ImageData | TrueLatents,
    config: MismatchConfig,
    extractor: FeatureExtractorBase | None,
) -> dict[str, Any]:
    features = {} if extractor is None else {"features": network_fingerprint(extractor)}
    return {
        "run": denoiser.source,
        "sampler": config.sampler_for(denoiser.scheduler),
        "steps": config.steps,
        "correction": config.correction,
        "sample_seed": config.seed,
        "num": config.num,
        "extractor": None if extractor is None else config.extractor,
        "reference": reference_name(denoiser, config.data, config.reading),
        "weights": denoiser.weights_name,
        "dtype": "float32",
        **denoiser.recipe,
        "fingerprints": {**denoiser.fingerprints(), "reference": data.fingerprint(), **features},
        "versions": versions(),
    }
