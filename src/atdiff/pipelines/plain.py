"""Sampling a trained model with plain diffusers: the class of the saved pipeline, and the code on the model card."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)
from diffusers.configuration_utils import FrozenDict

from atdiff.core.noise import NoiseSchedule, Traits, dynamic_mu, flow_shift
from atdiff.core.prediction import resolve_prediction_type
from atdiff.pipelines.families import FAMILIES, Family, absent_parts
from atdiff.pipelines.loading import single_file_config
from atdiff.system.locate import hub_location, run_config
from atdiff.system.pipeline_files import class_name, is_single_file

__all__ = ["model_kind", "pipeline_class", "usage"]

IMAGES, STEPS = 4, 10  # in a card's code; consistency models use 4 steps
WIDTH = 88  # longest line of the code
# LoRA base networks do not take the guidance scale as an input, except Flux.1 dev.
UNTOLD = {"time_cond_proj_dim": None, "guidance_embeds": True}
EVEN = (FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler)  # can be given even steps; solvers cannot
GENERATORS = f"[torch.Generator().manual_seed(i) for i in range({IMAGES})]"


def pipeline_class(network: Any, scheduler: Any) -> Any:  # noqa: ANN401  (any network, any diffusers scheduler)
    """Return the diffusers pipeline class that samples correctly with a pixel network and its scheduler.

    ``DDPMPipeline`` starts from noise of variance 1 and passes ``x_t`` to the network unscaled, without class labels.
    ``ConsistencyModelPipeline`` scales both as the scheduler requires and passes class labels, with any scheduler that
    has the methods it calls; flow schedulers, which do no scaling, lack them.
    """
    config = network.config
    exploding = NoiseSchedule(scheduler).traits.variance_exploding
    scales = exploding or float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0
    labelled = config.get("num_class_embeds") is not None
    fits = hasattr(scheduler, "scale_model_input") and isinstance(config.get("sample_size"), int)
    return ConsistencyModelPipeline if fits and (scales or labelled) else DDPMPipeline


def usage(folder: Path, config: Mapping[str, Any], repo_id: str) -> str:
    """Return the usage section of a model card: code that generates images in a few steps with diffusers alone.

    Args:
        folder: published weights of a finished run, ``pipeline`` or ``lora``.
        config: settings of the run.
        repo_id: repository that the code loads the weights from.
    """
    index = None if folder.name == "lora" else json.loads((folder / "model_index.json").read_text())
    if index is None or index.get("vae") is not None:
        return _fenced(_latent_code(folder, config, index, repo_id)) + _elsewhere(folder)
    network = json.loads((folder / "unet" / "config.json").read_text())
    return _Pixels(network, _scheduler(folder), index["unet"], config, repo_id).text()


def model_kind(folder: Path, config: Mapping[str, Any]) -> str:
    """Return what a finished run published, such as ``unconditional flow-matching model``.

    See :func:`usage` for the arguments. ``folder`` is a pipeline.
    """
    index = json.loads((folder / "model_index.json").read_text())
    if index.get("vae") is None:
        given = "class-conditional" if config["data"]["class_conditional"] else "unconditional"
    else:
        given = "class-conditional" if FAMILIES[class_name(index)].labelled else "text-to-image"
    if config["consistency"]["mode"] != "none":
        return f"{given} consistency model"
    scheduler = _scheduler(folder)
    predicts = resolve_prediction_type(NoiseSchedule(scheduler), scheduler, config["objective"]["prediction_type"])
    kinds = {"flow": "flow-matching model", "edm": "EDM diffusion model"}
    return f"{given} {kinds.get(predicts, 'diffusion model')}"


def _elsewhere(folder: Path) -> str:
    """Return a sentence on which file other programs load; empty unless the folder contains a LoRA."""
    files = [name for name in ("kohya_lora_weights.safetensors", "pytorch_lora_weights.safetensors")
             if (folder / name).is_file()]  # fmt: skip
    return f"\n\nIn ComfyUI and other programs, load `{files[0]}` and choose a sampler that matches." if files else ""


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _scheduler(folder: Path) -> Any:  # noqa: ANN401
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder / "scheduler")


@dataclass(frozen=True)
class _Pixels:
    """A saved pipeline with a pixel network: the configurations of its parts, and the network's class."""

    network: Mapping[str, Any]
    scheduler: Any
    network_class: tuple[str, str]
    config: Mapping[str, Any]
    repo_id: str

    @property
    def steps(self) -> int:
        """Number of steps in the code: few, and no more than the noise schedule has."""
        if self.distilled:
            return min(4, int(self.config["consistency"]["intervals"]))
        return min(STEPS, int(self.scheduler.config.num_train_timesteps))

    @property
    def distilled(self) -> bool:
        return bool(self.config["consistency"]["mode"] != "none")

    @property
    def learns_variance(self) -> bool:
        return bool(self.network["out_channels"] == 2 * self.network["in_channels"])

    @property
    def classes(self) -> int:
        """Number of classes, without the null class; 0 for an unconditional network."""
        embeds = self.network.get("num_class_embeds") or self.network.get("num_embeds_ada_norm") or 0
        return int(embeds) - int(embeds > 0 and self.config["objective"]["label_dropout"] > 0)

    @property
    def _traits(self) -> Traits:
        return NoiseSchedule(self.scheduler).traits

    def text(self) -> str:
        """Return code that calls a pipeline if one fits, else a sampling loop and why it is needed."""
        loop = self._loop()
        if loop is None:
            return _fenced(self._call())
        why, code = loop
        return (
            f"No diffusers pipeline supports this network ({why}), so call its network and scheduler directly:"
            f"\n\n{_fenced(code)}"
        )

    def _imports(self, *names: str) -> str:
        module, name = self.network_class
        own = ""
        if module.startswith("atdiff"):
            own = "from atdiff import MLP2DModel" if name == "MLP2DModel" else f"import {module}"
            own += "  # registers the network with diffusers\n"
        return f"{own}import torch\nfrom diffusers import {', '.join(sorted(names))}\n"

    def _call(self) -> str:
        traits, names, swap, options = self._traits, ["DiffusionPipeline"], "", ""
        if traits.has_shift:
            more, swap = _flow_euler(self.scheduler)
            names += more
            swap += _even(self.steps)
        elif self.distilled:
            pass
        elif traits.variance_exploding and type(self.scheduler).__name__ != "EDMEulerScheduler":
            names.append("EDMEulerScheduler")
            swap = "pipeline.scheduler = EDMEulerScheduler.from_config(pipeline.scheduler.config)\n"
        elif traits.integer_timesteps and self.learns_variance:
            names.append("DDPMScheduler")
            swap = (
                "pipeline.scheduler = DDPMScheduler.from_config(\n"
                '    pipeline.scheduler.config, timestep_spacing="linspace"\n)\n'
            )
        elif traits.integer_timesteps:
            names = ["DDIMPipeline"]  # it converts the scheduler to a DDIMScheduler
            options = ", use_clipped_model_output=True"
        labels = f", class_labels=[i % {self.classes} for i in range({IMAGES})]" if self.classes else ""
        if self.network["in_channels"] not in (1, 3):
            options += ', output_type="np"'
        given = f"batch_size={IMAGES}, num_inference_steps={self.steps}, generator=generators{labels}{options}"
        call = f"images = pipeline({given}).images"
        return (
            f"{self._imports(*names)}\n"
            f'pipeline = {names[0]}.from_pretrained("{self.repo_id}")\n{swap}'
            f"generators = {GENERATORS}\n"
            + (call if len(call) <= WIDTH else f"images = pipeline(\n    {given}\n).images")
        )

    def _loop(self) -> tuple[str, str] | None:
        """Return why no pipeline fits and a sampling loop; None if one fits."""
        traits = self._traits
        is_dit = self.network_class[1] == "DiTTransformer2DModel"
        if not self.distilled and isinstance(self.scheduler, CMStochasticIterativeScheduler):
            euler = "EDMEulerScheduler.from_config(pipeline.scheduler.config)"
            # The network takes 250 log(sigma) as time, as consistency models do; the scheduler's is log(sigma) / 4.
            return "its timesteps are 1,000 times those of `EDMEulerScheduler`", self._loop_code(euler, times=1000)
        if traits.has_shift and (self.classes or dynamic_mu(self.scheduler) is not None):
            why = "a flow with class labels" if self.classes else "a flow with a dynamic timestep shift"
            return why, self._loop_code(*self._flow_scheduler())
        if traits.integer_timesteps and self.classes and (is_dit or not (self.distilled or self.learns_variance)):
            return "class labels with DDIM steps", self._loop_code(self._vp_scheduler())
        if is_dit:
            return "a DiT on pixels", self._loop_code("pipeline.scheduler")
        return None

    def _vp_scheduler(self) -> str:
        if self.distilled:
            return "pipeline.scheduler"
        if self.learns_variance:
            return 'DDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")'
        return "DDIMScheduler.from_config(pipeline.scheduler.config)"

    def _flow_scheduler(self) -> tuple[str, str]:
        sigmas = f"sigmas=[1 - i / {self.steps} for i in range({self.steps})]"
        if not isinstance(self.scheduler, EVEN):
            return f"FlowMatchEulerDiscreteScheduler(shift={flow_shift(self.scheduler, self._tokens):g})", sigmas
        mu = dynamic_mu(self.scheduler, self._tokens)
        return "pipeline.scheduler", sigmas if mu is None else f"{sigmas}, mu={mu!r}"

    @property
    def _tokens(self) -> int:
        return int((self.network["sample_size"] // (self.network.get("patch_size") or 2)) ** 2)

    def _loop_code(self, scheduler: str, timesteps: str | None = None, times: int = 1) -> str:
        name = scheduler.partition(".from_config")[0].partition("(")[0]
        names = {"DiffusionPipeline", *([name] if name.endswith("Scheduler") else [])}
        shape = f"{self.network['in_channels']}, {self.network['sample_size']}, {self.network['sample_size']}"
        traits = self._traits
        inputs = "scheduler.scale_model_input(x, t)" if traits.variance_exploding else "x"
        t = f"{times} * t" if times != 1 else "t"
        draws = name in ("DDPMScheduler", "pipeline.scheduler") and (traits.integer_timesteps or self.distilled)
        options = ", generator=generators" if draws else ""
        options += ", use_clipped_model_output=True" if name == "DDIMScheduler" else ""
        labels = f", class_labels=torch.arange({IMAGES}) % {self.classes}" if self.classes else ""
        noise = " * scheduler.init_noise_sigma" if traits.variance_exploding else ""
        return (
            f"{self._imports(*names)}\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{self.repo_id}")  # loads network and scheduler\n'
            f"network, scheduler = pipeline.unet, {scheduler}\n"
            f"scheduler.set_timesteps({timesteps or self.steps})\n"
            f"generators = {GENERATORS}\n"
            f"x = torch.cat([torch.randn(1, {shape}, generator=g) for g in generators]){noise}\n"
            f"with torch.no_grad():\n"
            f"    for t in scheduler.timesteps:\n"
            f"        output = network({inputs}, ({t}).expand({IMAGES}){labels}).sample\n"
            f"        x = scheduler.step(output, t, x{options}).prev_sample\n"
            f"images = ((x + 1) / 2).clamp(0, 1)  # {IMAGES} tensors in [0, 1]"
        )


def _latent_code(folder: Path, config: Mapping[str, Any], index: Mapping[str, Any] | None, repo_id: str) -> str:
    """Return code that calls a latent pipeline, or, for a LoRA (no index), the pipeline it was trained on."""
    of_lora, source, loaded, scheduler = index is None, repo_id, "", _scheduler(folder)
    kind, how = "DiffusionPipeline", "from_pretrained"
    index = _index_of(folder.parent) if index is None else index
    family = FAMILIES[class_name(index)]
    names, swap = _few_steps(scheduler, family)
    if of_lora:
        network, source = UNTOLD, config["training"]["init"]
        if is_single_file(run_config(str(folder.parent))["training"]["init"]):
            kind, how = class_name(index), "from_single_file"
        loaded = f'pipeline.load_lora_weights("{repo_id}")\n'
        if isinstance(scheduler, LCMScheduler):
            names = {"LCMScheduler"}
            swap = f'pipeline.scheduler = LCMScheduler.from_pretrained("{repo_id}", subfolder="scheduler")\n'
    else:
        network = json.loads((folder / family.network / "config.json").read_text())
    absent = "".join(f", {part}=None" for part in absent_parts(index))
    return (
        f"import torch\nfrom diffusers import {', '.join(sorted({kind, *names}))}\n\n"
        f'pipeline = {kind}.{how}("{source}"{absent})\n{loaded}{swap}'
        f"{_text_call(config, family, scheduler, network)}"
    )


def _index_of(run: Path) -> Mapping[str, Any]:
    """Return the ``model_index.json`` of a run's starting pipeline, or a Stable Diffusion one if it cannot be read."""
    settings = run_config(str(run))
    source = settings["training"]["init"]
    if is_single_file(source):
        source = (settings.get("model") or {}).get("config") or single_file_config(source)
    folder = Path(source).expanduser()
    if folder.exists():
        location = str(folder / "pipeline" if (folder / "config.yaml").is_file() else folder)
    else:
        location = hub_location(source, "model")
    try:
        index: dict[str, Any] = diffusers.DiffusionPipeline.load_config(location)
    except Exception:  # whatever the hub's network stack raises; a card is not worth failing a finished run for
        fallback = "StableDiffusionPipeline"
        warnings.warn(
            f"the pipeline class of {source} could not be read: the model card assumes a {fallback}.", stacklevel=2
        )
        return {"_class_name": fallback}
    return index


def _even(steps: int) -> str:
    return f"pipeline.scheduler.sigma_min = 1 / {steps}  # evenly spaced steps down to zero noise\n"


def _flow_euler(scheduler: Any) -> tuple[set[str], str]:  # noqa: ANN401
    """Return the imports and the code that replace another flow solver with Euler's method."""
    if isinstance(scheduler, EVEN):
        return set(), ""
    name = "FlowMatchEulerDiscreteScheduler"
    return {name}, f"pipeline.scheduler = {name}(shift={flow_shift(scheduler):g})\n"


def _few_steps(scheduler: Any, family: Family) -> tuple[set[str], str]:  # noqa: ANN401
    """Return the imports and the code that set up a latent pipeline's scheduler for few steps."""
    if isinstance(scheduler, LCMScheduler):
        return set(), ""
    if NoiseSchedule(scheduler).traits.integer_timesteps:
        options = "" if "clip_sample" in scheduler.config else ", clip_sample=False"  # it defaults to True
        if scheduler.config.get("timestep_spacing") == "linspace":  # DDIMScheduler would space these like "leading"
            options += ', timestep_spacing="trailing"'
        swap = f"pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config{options})\n"
        return {"DDIMScheduler"}, swap
    names, swap = _flow_euler(scheduler)
    return names, swap + ("" if family.makes_even_steps else _even(STEPS))


def _text_call(config: Mapping[str, Any], family: Family, scheduler: Any, network: Mapping[str, Any]) -> str:  # noqa: ANN401
    guidance = family.guidance_of(config, SimpleNamespace(config=FrozenDict(network)), scheduler)
    data = config["data"]
    asked = list(data.get("captions") or [])
    prompts = [asked[i % len(asked)] for i in range(IMAGES)] if asked else ["a photo"] * IMAGES
    what = f"class_labels={list(range(IMAGES))}" if family.labelled else f"prompt={prompts!r}"
    steps = 4 if isinstance(scheduler, LCMScheduler) else STEPS
    side = data.get("image_size") if family.any_size else None
    called = family.call_options(None if side is None else (side, side))
    if family.has_t5 and data.get("caption_tokens") is not None:
        called["max_sequence_length"] = data["caption_tokens"]
    called = {**family.call_guidance(guidance, IMAGES), **called, **family.call_steps(steps)}
    options = "".join(f", {name}={_short(value)}" for name, value in called.items())
    return (
        f"generators = {GENERATORS}\nimages = pipeline(\n    {what},\n"
        f"    num_inference_steps={steps}{options},\n"
        f"    generator=generators,\n).{'frames[:, 0]' if family.makes_videos else 'images'}"
    )


def _short(value: Any) -> str:  # noqa: ANN401
    return f"{value:g}" if isinstance(value, float) else repr(value)
