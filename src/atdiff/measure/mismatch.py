"""Mismatch between a network's input distributions in sampling and in training; see :func:`measure_mismatch`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase

from atdiff.core.errors import UserError
from atdiff.core.noise import NoiseSchedule, network_time
from atdiff.core.prediction import make_prediction, resolve_prediction_type, to_clean, to_noise
from atdiff.core.specs import NO_CORRECTION
from atdiff.data.sources import to_uint8
from atdiff.measure.latents import LatentRun, TrueLatents
from atdiff.measure.robustness import place_of
from atdiff.measure.runs import Notify, Prepared, RunsConfig, TrueData, counted, measure_runs, say, silent
from atdiff.metrics.distances import GaussianFit, sliced_wasserstein
from atdiff.metrics.features.extractors import extract, feature_layers, make_extractor
from atdiff.models.call import class_embeddings, predict
from atdiff.models.inference import evaluating
from atdiff.pipelines.model import TrainedModel
from atdiff.sampling.corrections import Correction, make_correction
from atdiff.sampling.generate import denoise_steps, generate, image_generators
from atdiff.sampling.schedulers import default_sampler, make_scheduler
from atdiff.system.fingerprint import network_fingerprint

__all__ = ["MismatchConfig", "measure_mismatch", "mismatch_of_runs"]

# The Frechet distance needs the eigenvalues of D x D matrices: under a second at D = 784, a minute at 4,096.
FRECHET_PIXELS = 4_096


@dataclass(frozen=True)
class MismatchConfig(RunsConfig):
    """Trajectories to compare with noised real images, and how; ``num`` also sets the number of samples."""

    sampler: str | None  # None for the default sampler of each run
    steps: int
    num: int = field(default=2048, kw_only=True)
    batch_size: int = field(default=512, kw_only=True)
    extractor: str | None = field(default="digits-classifier", kw_only=True)  # for features of ``x0_hat``
    weights: Path | None = field(default=None, kw_only=True)  # local file with the extractor's weights
    correction: str = field(default=NO_CORRECTION, kw_only=True)

    def check(self, training_scheduler: Any) -> None:  # noqa: ANN401  (any diffusers scheduler)
        """Raise a ``UserError``, before any compute, if networks of this scheduler cannot be measured like this."""
        if self.num < 2:
            raise UserError(f"num={self.num} samples are too few for a variance; use 2 or more; 2048 is usual.")
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
    data: TrueData,
    config: MismatchConfig,
    extractor: FeatureExtractorBase | None = None,
    device: torch.device | str = "cpu",
    notify: Notify = silent,
) -> list[dict[str, Any]]:
    """Compare a sampler's ``x_t`` with noised real images at the same noise level, at every network evaluation.

    In training a network sees ``alpha_t x0 + sigma_t noise`` of real images; in sampling it sees the result of its own
    earlier steps. The samples are those of ``generate``. Real images are drawn with replacement, with noise independent
    of the samples', and a class-conditional network samples their labels. For a latent pipeline both are latents,
    guided and conditioned on the captions as in sampling. Finite sets from one distribution differ too, so each value
    has a floor (suffix ``_floor``): the same quantity with a second noised real set instead of the samples.

    Args:
        extractor: for ``frechet_features``, which are otherwise omitted, as for latents.

    Returns:
        Per evaluation ``t`` (the sampler's timestep), ``level`` (see :func:`atdiff.core.noise.noise_level`), ``alpha``,
        ``sigma`` and the values of :func:`_distances`; Heun's sampler has two per timestep. The last record, with ``t``
        None and level 0, compares the final samples, in [-1, 1], with the images themselves.

    Raises:
        UserError: as for ``config.check``, or images or labels do not fit the network.
        FloatingPointError: the samples are not finite.
    """
    _check_run(denoiser, data, config)
    if isinstance(denoiser.model, nn.Module):
        denoiser.model.to(device)
    sampler, batches = config.sampler_for(denoiser.scheduler), -(-config.num // config.at_once(denoiser))
    advance = counted(notify, 3 * denoiser.evaluations(sampler, config.steps) * batches)  # samples and two real sets
    keep = extractor is not None
    sets = [_TrueImages(denoiser, data, config, number, device) for number in (0, 1)]
    sampling = _Probe(make_correction(config.correction), keep, advance)
    samples = _sampled(denoiser, config, sets[0], sampling, device)
    scheduler = denoiser.sampling_scheduler(sampler, config.steps)
    schedule, timesteps = NoiseSchedule(denoiser.scheduler), scheduler.timesteps
    records = []
    for i, t in enumerate(timesteps):
        # The time as passed to the network: an EDM sampler may count its timesteps in other units.
        told = network_time(scheduler, t)
        true = [images.shown(told, _Probe(None, keep, advance)) for images in sets]
        compared = _compare(_Seen.cat(sampling.seen[i :: len(timesteps)]), *true, extractor=extractor)
        records.append({**place_of(schedule, told), "t": t.item(), **compared})
    seen = [_Seen(x0, None, to_uint8(x0) if keep else None) for x0 in (samples, *(images.x0 for images in sets))]
    final = {"t": None, "level": 0.0, "alpha": 1.0, "sigma": 0.0}
    return [*records, final | _compare(*seen, extractor=extractor)]


def _sampled(
    denoiser: TrainedModel, config: MismatchConfig, true: _TrueImages, probe: _Probe, device: torch.device | str
) -> Tensor:
    """Return samples for the labels or captions of the real images."""
    sampler = config.sampler_for(denoiser.scheduler)
    if not isinstance(denoiser, LatentRun):
        return generate(
            denoiser.model, denoiser.scheduler, sampler=sampler, steps=config.steps, num=config.num,
            shape=denoiser.image_shape, seed=config.seed, batch_size=config.batch_size, class_labels=true.labels,
            correction=probe, device=device,
        )  # fmt: skip
    drawn: list[Tensor] = []
    with evaluating(denoiser.model):
        for part in true.batches():
            scheduler = denoiser.sampling_scheduler(sampler, config.steps)
            generators = image_generators(config.seed, range(part.start, part.stop))
            shape = (len(generators), *denoiser.image_shape)
            x = randn_tensor(shape, generator=generators, device=torch.device(device))
            *_, x = denoise_steps(
                denoiser.model,
                scheduler,
                x * getattr(scheduler, "init_noise_sigma", 1.0),
                generators=generators,
                model_kwargs=true.conditions(part),
                correction=probe,
            )
            drawn.append(x.float().cpu())
    latents = torch.cat(drawn)
    if not latents.isfinite().all():
        raise FloatingPointError(f"latents of {denoiser.source} are not finite; the network is broken.")
    return latents


def mismatch_of_runs(
    runs: Sequence[str],
    config: MismatchConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    notify: Notify = silent,
) -> list[dict[str, Any]]:
    """Store :func:`measure_mismatch` of runs in ``out/mismatch.json``; see :func:`~atdiff.measure.runs.measure_runs`.

    An entry also lists the distances that are ``left_out``, and why.
    """

    def check(denoiser: TrainedModel, data: TrueData) -> None:
        _check_run(denoiser, data, config)
        denoiser.check_corrections([config.correction])

    def prepare(denoiser: TrainedModel, data: TrueData) -> Prepared:
        extractor = None
        if config.extractor is not None and not isinstance(data, TrueLatents):
            extractor = make_extractor(config.extractor, weights=config.weights, device=device, data=data)

        def measured(advance: Notify) -> tuple[list[dict[str, Any]], dict[str, Any]]:
            records = measure_mismatch(denoiser, data, config, extractor, device, advance)
            left_out = _left_out(denoiser, config, extractor, records[-1])
            for line in left_out:
                say(f"{denoiser.source}: {line}")
            return records, {"left_out": left_out}

        settings = {
            "sampler": config.sampler_for(denoiser.scheduler),
            "steps": config.steps,
            "correction": config.correction,
            "sample_seed": config.seed,
            "num": config.num,
            "extractor": None if extractor is None else config.extractor,
        }
        return Prepared(settings, measured, {} if extractor is None else {"features": network_fingerprint(extractor)})

    return measure_runs(runs, config, out, "mismatch", check=check, prepare=prepare, guided=True, notify=notify)


def _left_out(
    denoiser: TrainedModel, config: MismatchConfig, extractor: FeatureExtractorBase | None, record: dict[str, Any]
) -> list[str]:
    """Return one line for each distance that a record lacks, with the reason."""
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
    """Inputs of the network and its predictions, on the CPU."""

    x: Tensor  # (N, C, H, W), in the schedule's coordinates
    noise_norm: Tensor | None  # norm of noise_hat, (N,)
    clean: Tensor | None  # x0_hat, uint8, same shape as x

    @classmethod
    def cat(cls, batches: Sequence[_Seen]) -> _Seen:
        """Concatenate the batches of one timestep."""
        columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*batches, strict=True)]
        return cls(*columns)


class _Probe(Correction):
    """Wraps a correction, and records inputs and predictions without changing them."""

    def __init__(self, inner: Correction | None, keep_clean: bool, advance: Callable[[], None]) -> None:
        self.inner, self.keep_clean, self.advance = inner or Correction(), keep_clean, advance
        self.moves_steps = self.inner.moves_steps
        self.seen: list[_Seen] = []  # one per call

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
    """Real images or latents drawn from the data, each with its own noise, the same at every timestep."""

    def __init__(
        self, denoiser: TrainedModel, data: TrueData, config: MismatchConfig, number: int, device: torch.device | str
    ) -> None:
        rng = np.random.default_rng([config.seed, number])
        self.indices = torch.from_numpy(rng.integers(len(data), size=config.num))
        self.data, self.denoiser, self.batch_size, self.device = data, denoiser, config.at_once(denoiser), device
        self.labels: Tensor | None = None
        if isinstance(data, TrueLatents):
            self.x0 = data.x0(self.indices, device)
        else:
            self.x0 = data.x0(self.indices)
            if class_embeddings(denoiser.model) and data.labels is not None:
                self.labels = data.labels[self.indices]
        self.noise = torch.from_numpy(rng.standard_normal(self.x0.shape, dtype=np.float32))

    def batches(self) -> list[slice]:
        """Return the slice of each batch."""
        num = len(self.indices)
        return [slice(start, min(start + self.batch_size, num)) for start in range(0, num, self.batch_size)]

    def conditions(self, part: slice) -> dict[str, Tensor]:
        """Return the network's conditions for a batch, on the device."""
        if isinstance(self.data, TrueLatents):
            found = self.data.conditions(self.indices[part], self.device)
        else:
            found = {} if self.labels is None else {"class_labels": self.labels[part]}
        return {name: value.to(self.device) for name, value in found.items()}

    def shown(self, t: Tensor, probe: _Probe) -> _Seen:
        """Run the network on the images noised to timestep ``t``, and return what the probe recorded."""
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
            # Further output channels are a learned variance.
            probe(output[:, : x0.shape[1]], x_t, timesteps, schedule, prediction_type)
        return _Seen.cat(probe.seen)


class _Points(NamedTuple):
    """Inputs of the distances, float64."""

    x: Tensor  # (N, D)
    noise_norm: Tensor | None  # (N,)
    features: Tensor | None  # (N, F)

    @classmethod
    def of(cls, seen: _Seen, extractor: FeatureExtractorBase | None) -> _Points:
        features = None
        if extractor is not None and seen.clean is not None:
            features = extract(seen.clean, extractor)[feature_layers(extractor)[0]]
        return cls(seen.x.flatten(1).double(), seen.noise_norm, features)


def _compare(sampled: _Seen, true: _Seen, again: _Seen, *, extractor: FeatureExtractorBase | None) -> dict[str, float]:
    """Return the distances of the samples to the real set, and those of the second real set as floors."""
    samples, reference, others = (_Points.of(seen, extractor) for seen in (sampled, true, again))
    fits: dict[str, GaussianFit] = {}  # of the reference set, shared by both comparisons
    floors = _distances(others, reference, fits)
    return _distances(samples, reference, fits) | {f"{name}_floor": value for name, value in floors.items()}


def _distances(points: _Points, true: _Points, fits: dict[str, GaussianFit]) -> dict[str, float]:
    """Compare points ``x`` with real ones ``y``, each of ``D`` values in the units of the schedule's x_t.

    - ``mean_bias``: ``||mean(x) - mean(y)||_2 / sqrt(D)``;
    - ``variance_ratio``, ``variance_bias``: ratio and difference of the mean over pixels of ``var(x)`` and ``var(y)``;
    - ``sliced_wasserstein``: sliced Wasserstein distance over 256 projections;
    - ``frechet_pixels``: between Gaussian fits; omitted if D > 4,096 or a set has fewer than D samples;
    - ``noise_norm_ratio``, ``noise_norm_std_ratio``: mean and standard deviation of ``||noise_hat||_2`` at ``x`` over
      those at ``y``, the exposure bias of `Ning et al. <https://arxiv.org/abs/2308.15321>`_, section 3;
    - ``frechet_features``: between features of ``x0_hat`` in 8 bits; omitted if a set has fewer samples than features.
    """
    bias = points.x.mean(dim=0) - true.x.mean(dim=0)
    # A ratio of means: in a mean of ratios, a pixel that hardly varies in the data would dominate.
    variance, true_variance = points.x.var(dim=0).mean().item(), true.x.var(dim=0).mean().item()
    out = {
        "mean_bias": bias.square().mean().sqrt().item(),
        "variance_ratio": variance / true_variance,
        "variance_bias": variance - true_variance,
        "sliced_wasserstein": sliced_wasserstein(points.x, true.x),
    }
    if points.x.shape[1] <= FRECHET_PIXELS:
        out |= _frechet("frechet_pixels", points.x, true.x, fits)
    if points.noise_norm is not None and true.noise_norm is not None:
        out["noise_norm_ratio"] = (points.noise_norm.mean() / true.noise_norm.mean()).item()
        out["noise_norm_std_ratio"] = (points.noise_norm.std() / true.noise_norm.std()).item()
    if points.features is not None and true.features is not None:
        out |= _frechet("frechet_features", points.features, true.features, fits)
    return out


def _frechet(name: str, x: Tensor, true: Tensor, fits: dict[str, GaussianFit]) -> dict[str, float]:
    """Return the Frechet distance under its name; empty with fewer samples than dimensions."""
    if min(len(x), len(true)) < true.shape[1]:
        return {}
    if name not in fits:
        fits[name] = GaussianFit(true)
    return {name: fits[name].frechet(GaussianFit(x))}


def _check_run(denoiser: TrainedModel, data: TrueData, config: MismatchConfig) -> None:
    config.check(denoiser.scheduler)
    if isinstance(data, TrueLatents):  # encoded by the pipeline itself, so they fit
        return
    shape, classes = tuple(data.images.shape[1:]), denoiser.num_classes
    if shape != tuple(denoiser.image_shape):
        raise UserError(
            f"{data.name} has images of shape {shape} but {denoiser.source} generates "
            f"{tuple(denoiser.image_shape)}: give the images that it was trained on with --data."
        )
    if classes and (data.num_classes is None or data.num_classes > classes):
        found = "no labels" if data.num_classes is None else f"{data.num_classes} classes"
        raise UserError(
            f"{data.name} has {found} but {denoiser.source} is conditional on {classes} classes: give the images "
            "that it was trained on with --data."
        )
