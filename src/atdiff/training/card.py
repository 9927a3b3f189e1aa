"""The model card of a run, and its way to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

from atdiff.core.errors import RunError, UserError
from atdiff.models.ema import last_decay
from atdiff.pipelines.model import run_config
from atdiff.pipelines.plain import usage
from atdiff.system.files import write_text

__all__ = ["check_push", "has_card", "model_card", "push_to_hub", "write_card"]

CARD = "README.md"


def write_card(run: Path) -> None:
    """Write the card of a finished run into the folder that it leaves, beside the weights."""
    write_text(_published(run) / CARD, model_card(run))


def has_card(run: Path) -> bool:
    """Whether the card of a finished run is there."""
    return (_published(run) / CARD).is_file()


def model_card(run: Path, repo_id: str = "THIS_REPOSITORY") -> str:
    """Return the card of a training folder: how it was trained, how to use it, and what was measured so far.

    Measured is what ``cells.json`` of the folder holds, which a study leaves there. Paths of this machine are cut to
    their last name.
    """
    config = _without_paths(run_config(str(run)))
    lora = bool(config["lora"]["rank"])
    init = config["training"]["init"]
    data = ModelCardData(
        library_name="diffusers",
        tags=["atdiff", "adversarial-training", "few-step", *(["lora"] if lora else [])],
        base_model=init if _is_repo_id(init) else None,
        datasets=config["data"]["name"] if _is_repo_id(config["data"]["name"]) else None,
    )
    parts = (
        f"---\n{data.to_yaml()}\n---",
        f"# {run.name}",
        _about(config),
        f"## Use\n{usage(_published(run), config, repo_id)}",
        _results(run),
        f"## Recipe\n```yaml\n{yaml.safe_dump(config, sort_keys=False)}```",
    )
    return "\n\n".join(parts) + "\n"


def check_push(repo_id: str) -> None:
    """Find out before training whether its result can be pushed, as far as that is known without a network.

    Raises:
        UserError: no name of a repository, or nobody is logged in.
    """
    if not _is_repo_id(repo_id):
        raise UserError(f"--push-to-hub {repo_id} is not a repository name; expected OWNER/NAME.")
    if get_token() is None:
        raise UserError("--push-to-hub needs a login: run `hf auth login`, or set HF_TOKEN.")


def push_to_hub(run: Path, repo_id: str) -> str:
    """Upload what a finished run leaves, with its card, and return the address.

    Raises:
        RunError: the hub did not take it; the same command tries again.
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
    """Cut what may be a path of this machine to its last name."""
    places = {"data": ("name", "latents"), "model": ("config",), "training": ("init",), "consistency": ("teacher",)}
    cut = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in config.items()}
    for section, keys in places.items():
        for key in keys:
            value = cut.get(section, {}).get(key)
            if value and not _is_repo_id(value):
                cut[section][key] = Path(value).name
    return cut


def _about(config: dict[str, Any]) -> str:
    adversary, training = config["adversary"], config["training"]
    what = "A consistency model" if config["consistency"]["mode"] != "none" else "A denoiser"
    start = f", from `{training['init']}`" if training["init"] else ""
    how = "without a perturbation (plain training)"
    if adversary["passes"] > 1:
        size = f"{adversary['norm']} steps of {adversary['step_size']:g}, scale `{adversary['scale']}`"
        if adversary.get("dose") is not None:
            size = f"dose {adversary['dose']}" + (f" for {adversary['steps']} steps" if adversary["steps"] else "")
        how = (
            f"with {adversary['direction']} perturbations of its inputs ({size}, method `{adversary['method']}`, order "
            f"`{adversary['order']}`)"
        )
    return (
        f"{what} of `{config['data']['name']}`, trained for {training['passes']:,} forward-backward passes of "
        f"{training['batch_size']}{start}, {_pairs(config)}{how}, by atdiff. The weights are averages of decay "
        f"{training['ema_decay']:g}{_warmup(config)}. The method: [Wang et al., ICLR 2025](https://arxiv.org/abs/2502.17099)."
    )


def _pairs(config: dict[str, Any]) -> str:
    objective = config["objective"]
    if not objective.get("reflow"):
        return ""
    return (
        f"on {objective['reflow']:,} pairs of noise and sample that were drawn from there in "
        f"{objective['reflow_steps']} steps ([reflow](https://arxiv.org/abs/2209.03003)) and cost "
        f"{objective['reflow_passes']:,} of these passes, "
    )


def _warmup(config: dict[str, Any]) -> str:
    if not config["training"].get("ema_warmup", False):
        return ""
    return f", warmed up as `(1 + n) / (10 + n)` of `n` updates, to {last_decay(config):.4g} at the last"


def _results(run: Path) -> str:
    """Return a table of the cells of ``cells.json``, and the recipe that they share."""
    file = run / "cells.json"
    cells = []
    if file.exists():
        # These bring feature networks, which training has no use for.
        from atdiff.measure.cells import cells_of_weights
        from atdiff.measure.entries import read_cells

        # A run that is trained on keeps the cells of what it was.
        cells = cells_of_weights(str(run), read_cells(file))
    if not cells:
        return "## Results\nNot evaluated yet."
    metrics = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    head = ["sampler", "correction", "steps", "NFE", *metrics]
    rows = [
        [cell["sampler"], cell["correction"], cell["steps"], cell["nfe"], *(_figure(cell, name) for name in metrics)]
        for cell in cells
    ]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    shared = ("num", "sample_seed", "extractor", "reference", "weights", "dtype")
    recipe = ", ".join(f"{name} {'; '.join(sorted({Path(str(cell[name])).name for cell in cells}))}" for name in shared)
    return f"## Results\n{table}\n\nOne training run: {recipe}."


def _figure(cell: dict[str, Any], name: str) -> str:
    value = cell["metrics"].get(name)
    return "" if value is None else f"{value:.4g}"
