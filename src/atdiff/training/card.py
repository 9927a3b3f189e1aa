"""Model cards, and uploading a finished run to the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

from atdiff.core.charge import charge_of, passes_of_forwards
from atdiff.core.errors import RunError, UserError
from atdiff.metrics.registry import FIGURES
from atdiff.models.ema import last_decay
from atdiff.pipelines.model import run_config
from atdiff.pipelines.plain import model_kind, usage
from atdiff.system.files import write_text
from atdiff.training.config import SELF
from atdiff.training.words import other_settings, perturbation

__all__ = ["check_push", "has_card", "model_card", "push_to_hub", "write_card"]

CARD = "README.md"
WANG = ("Wang et al., ICLR 2025", "https://arxiv.org/abs/2502.17099")
ADVERSARIAL = ("free", "pgd", "equivariance")  # methods that perturb the input; the others are rivals
# By adversary method or ``objective`` key.
PAPERS = {
    "free": WANG,
    "pgd": WANG,
    "equivariance": ("Why Adversarially Train Diffusion Models?", "https://arxiv.org/abs/2505.21742"),
    "soar": ("SOAR", "https://arxiv.org/abs/2604.12617"),
    "adr": ("DEFAR", "https://arxiv.org/abs/2606.28226"),
    "contrastive": ("contrastive flow matching", "https://arxiv.org/abs/2506.05350"),
    "mac": ("model-aligned coupling", "https://arxiv.org/abs/2505.23346"),
    "ot": ("minibatch optimal transport", "https://arxiv.org/abs/2302.00482"),
    "nearest": ("immiscible diffusion", "https://arxiv.org/abs/2505.18521"),
    "explorative": ("explorative modelling", "https://arxiv.org/abs/2607.27372"),
    "reflow": ("rectified flow", "https://arxiv.org/abs/2209.03003"),
    "input_perturbation": ("DDPM-IP", "https://arxiv.org/abs/2301.11706"),
    "slowed_interpolation": ("MixFlow", "https://arxiv.org/abs/2512.19311"),
}
# Keys of what all cells of a card share, and their labels.
SHARED = {
    "num": "images per row",
    "sample_seed": "sampling seed",
    "extractor": "feature extractor",
    "reference": "reference images",
    "weights": "weights",
    "dtype": "precision",
}


def write_card(run: Path) -> None:
    """Write the card of a finished run next to its published weights."""
    write_text(_published(run) / CARD, model_card(run))


def has_card(run: Path) -> bool:
    """Whether a finished run has a card."""
    return (_published(run) / CARD).is_file()


def model_card(run: Path, repo_id: str = "THIS_REPOSITORY") -> str:
    """Return the model card of a finished run: how it was trained, how to use it, its results and its settings.

    The results are those in the run's ``cells.json``, which studies write. Local paths are shortened to their last
    component.
    """
    config = _without_paths(run_config(str(run)))
    init, folder = config["training"]["init"], _published(run)
    perturbed = bool(perturbation(config)) and config["adversary"]["method"] in ADVERSARIAL
    tags = [*(["adversarial-training"] if perturbed else []), "few-step", *(["lora"] if config["lora"]["rank"] else [])]
    data = ModelCardData(
        library_name="diffusers",
        tags=["atdiff", *tags],
        base_model=init if _is_repo_id(init) else None,
        datasets=config["data"]["name"] if _is_repo_id(config["data"]["name"]) else None,
    )
    parts = (
        f"---\n{data.to_yaml()}\n---",
        f"# {run.name}",
        _about(folder, config),
        f"## Usage\n{usage(folder, config, repo_id)}",
        _results(run),
        f"## Recipe\n```yaml\n{yaml.safe_dump(config, sort_keys=False)}```",
    )
    return "\n\n".join(parts) + "\n"


def check_push(repo_id: str) -> None:
    """Check before training that the result can be pushed, as far as possible without network access.

    Raises:
        UserError: this is not a repository name, or there is no login.
    """
    if not _is_repo_id(repo_id):
        raise UserError(f"--push-to-hub {repo_id} is not a repository name; expected OWNER/NAME.")
    if get_token() is None:
        raise UserError("--push-to-hub needs a login: run `hf auth login`, or set HF_TOKEN.")


def push_to_hub(run: Path, repo_id: str) -> str:
    """Upload the published weights of a finished run with their card, and return the address.

    Raises:
        RunError: the upload failed; the same command tries again.
    """
    folder, api = _published(run), HfApi()
    write_text(folder / CARD, model_card(run, repo_id))
    try:
        address = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload with atdiff")
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"{folder} could not be pushed to {repo_id} ({reason}); the folder is complete, so run the same "
            "command to try again."
        ) from error
    return str(address)


def _published(run: Path) -> Path:
    found = [run / name for name in ("lora", "pipeline") if (run / name).is_dir()]
    assert found, run
    return found[0]


def _is_repo_id(name: str | None) -> bool:
    if name is None or name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Shorten every setting that may be a local path to its last component."""
    places = {"data": ("name", "latents"), "model": ("config",), "training": ("init",), "consistency": ("teacher",)}
    cut = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in config.items()}
    for section, keys in places.items():
        for key in keys:
            value = cut.get(section, {}).get(key)
            if value and not _is_repo_id(value):
                cut[section][key] = Path(value).name
    return cut


def _about(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the paragraphs on what the weights are and how they were trained."""
    training = config["training"]
    updates = charge_of(config).updates_of(training["passes"])
    counted = f" ({updates:,} weight updates)" if updates != training["passes"] else ""
    further = other_settings(config)
    how = perturbation(config) or "no perturbation"
    if not (perturbation(config) or further):
        how += f" (plain {_plain(config)})"
    parts = [
        f"{_model(folder, config)}, {_start(config)}{_data(config)} for {training['passes']:,} forward-backward "
        f"passes{counted} at batch size {training['batch_size']} per process with atdiff, using {how}. "
        f"{_average(config)}"
    ]
    if further:
        parts.append("Further settings:\n\n" + "\n".join(f"- {one[0].upper()}{one[1:]}" for one in further))
    return "\n\n".join([*parts, *_extra_cost(config), *_references(config)])


def _plain(config: Mapping[str, Any]) -> str:
    mode = config["consistency"]["mode"]
    if mode != "none":
        return f"consistency {mode}"
    return "fine-tuning" if config["training"]["init"] else "training"


def _model(folder: Path, config: Mapping[str, Any]) -> str:
    rank = config["lora"]["rank"]
    if rank:
        consistency = "consistency " if config["consistency"]["mode"] != "none" else ""
        return f"A {consistency}LoRA of rank {rank} for `{config['training']['init']}`"
    kind = model_kind(folder, config)
    return f"{'An' if kind.startswith('u') else 'A'} {kind}"


def _start(config: Mapping[str, Any]) -> str:
    init, consistency = config["training"]["init"], config["consistency"]
    if consistency["mode"] == "distillation":
        teacher = consistency["teacher"] or init
        if teacher == SELF:
            return f"fine-tuned from `{init}` (with its original weights as the consistency teacher)"
        return f"distilled from `{teacher}`" + (f" (starting from `{init}`)" if init not in (None, teacher) else "")
    how = f"fine-tuned from `{init}`" if init else "trained from scratch"
    if config["lora"]["rank"]:
        how = "trained"
    return f"{how} by consistency training (without a teacher)" if consistency["mode"] == "training" else how


def _data(config: Mapping[str, Any]) -> str:
    """Return a phrase on the training images; empty for reflow, which trains on pairs described with the method."""
    data = config["data"]
    if config["objective"].get("reflow"):
        return ""
    only = [f"classes {', '.join(map(str, data['labels']))}"] if data.get("labels") is not None else []
    only += [f"the first {data['limit']:,} images"] if data.get("limit") is not None else []
    return f" on `{data['name']}`" + (f" ({'; '.join(only)})" if only else "")


def _average(config: Mapping[str, Any]) -> str:
    decay = config["training"]["ema_decay"]
    if not decay:
        return "The published weights are those of the last update."
    said = f"The published weights are an exponential moving average (EMA) with decay {decay:g}"
    if not config["training"].get("ema_warmup", False):
        return f"{said}."
    return (
        f"{said}, warmed up as `(1 + n) / (10 + n)` after `n` updates; the last update used {last_decay(config):.4g}."
    )


def _extra_cost(config: Mapping[str, Any]) -> list[str]:
    """Return sentences on the passes that are charged without training on a batch."""
    objective = config["objective"]
    said = []
    if objective.get("reflow"):
        said.append(
            f"The pairs were generated in {objective['reflow_steps']} steps of a second-order sampler, which counts as "
            f"{objective['reflow_passes']:,} of the passes."
        )
    if objective.get("explorative"):
        chosen = passes_of_forwards(objective["explorative"])
        said.append(f"Choosing the noise counts as {chosen} pass{'' if chosen == 1 else 'es'} per batch.")
    return said


def _references(config: Mapping[str, Any]) -> list[str]:
    used = [config["adversary"]["method"]] if perturbation(config) else []
    used += [name for name in PAPERS if config["objective"].get(name)]
    links = [f"[{title}]({address})" for title, address in (PAPERS[name] for name in used)]
    return [f"References: {', '.join(links)}."] if links else []


def _results(run: Path) -> str:
    """Return a table of the cells in ``cells.json``, and the settings they share."""
    file = run / "cells.json"
    cells = []
    if file.exists():
        # Imported here because they import feature networks, which training does not need.
        from atdiff.measure.cells import cells_of_weights
        from atdiff.measure.entries import read_cells

        # After a run is extended, cells.json may still hold cells of its earlier weights.
        cells = cells_of_weights(str(run), read_cells(file))
    if not cells:
        return "## Results\nNot evaluated yet."
    metrics = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    values = {name: [Path(str(cell[name])).name for cell in cells] for name in SHARED}
    varied = [name for name in SHARED if len(set(values[name])) > 1]
    head = ["sampler", "correction", "steps", "NFE", *(SHARED[name] for name in varied), *map(_heading, metrics)]
    rows = [
        [
            *(cell[name] for name in ("sampler", "correction", "steps", "nfe")),
            *(values[name][i] for name in varied),
            *(_figure(cell, name) for name in metrics),
        ]
        for i, cell in enumerate(cells)
    ]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    shared = ", ".join(f"{label}: {values[name][0]}" for name, label in SHARED.items() if name not in varied)
    return f"## Results\n{table}\n\nAll figures are from one training run ({shared})."


def _heading(metric: str) -> str:
    figure = FIGURES.get(metric)
    return metric if figure is None else f"{figure.label} {'↑' if figure.higher else '↓'}"


def _figure(cell: dict[str, Any], name: str) -> str:
    value = cell["metrics"].get(name)
    return "" if value is None else f"{value:.4g}"
