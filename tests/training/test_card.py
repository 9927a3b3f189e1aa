"""Model cards, and pushing them to a fake hub."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from atdiff.cli import main
from atdiff.cli.quickstart import PAIR
from atdiff.training.card import has_card, model_card
from atdiff.training.config import TrainConfig

WORDS = ["train", "digits-epsilon", "--arm", "at-residual", "--training.passes", "4"]


class Hub:
    """A fake hub that records the calls of HfApi."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, str] = {}
        self.down = False

    def create_repo(self, api: HfApi, repo_id: str, **options: Any) -> str:
        if self.down:
            raise OSError("the hub does not answer")
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return f"https://hub.test/{repo_id}"

    def upload_folder(self, api: HfApi, **options: Any) -> None:
        self.calls.append(("upload_folder", options))
        folder = Path(options["folder_path"])
        self.files = {str(file.relative_to(folder)): file.name for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **kwargs: hub.create_repo(api, *args, **kwargs))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **kwargs: hub.upload_folder(api, **kwargs))
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    return hub


def test_finished_run_is_pushed_with_its_card(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*WORDS, "--out", str(out), "--push-to-hub", "someone/digits"]) == 0
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "someone/digits", "exist_ok": True}
    assert hub.calls[1][1]["repo_id"] == "someone/digits"
    assert {"model_index.json", "README.md", "unet/config.json", "scheduler/scheduler_config.json"} <= set(hub.files)
    assert "https://hub.test/someone/digits" in capsys.readouterr().out
    card = ModelCard.load(out / "pipeline" / "README.md")
    assert card.data.library_name == "diffusers"
    assert "atdiff" in card.data.tags
    assert 'from_pretrained("someone/digits")' in card.text
    assert "using residual perturbations of the input (" in card.text
    assert "adversarial-training" in card.data.tags
    # The card contains the recipe of the run.
    recipe = yaml.safe_load(card.text.partition("## Recipe\n```yaml\n")[2].partition("```")[0])
    assert recipe == yaml.safe_load((out / "config.yaml").read_text())
    # Rerunning the command on the finished run only uploads.
    checkpoints = sorted(path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*"))
    assert main([*WORDS, "--out", str(out), "--push-to-hub", "someone/digits"]) == 0
    assert len(hub.calls) == 4
    assert sorted(path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")) == checkpoints


def test_failed_push_loses_nothing(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.down = True
    out = tmp_path / "run"
    assert main([*WORDS, "--out", str(out), "--push-to-hub", "someone/digits"]) == 1
    assert "could not be pushed to someone/digits (the hub does not answer)" in capsys.readouterr().err
    assert (out / "pipeline" / "model_index.json").is_file()
    hub.down = False
    assert main([*WORDS, "--out", str(out), "--push-to-hub", "someone/digits"]) == 0
    assert hub.files


def test_hub_http_error_is_reported(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refused(HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "403 Forbidden")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Refused

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert main([*WORDS, "--out", str(tmp_path / "run"), "--push-to-hub", "someone/digits"]) == 1
    assert "403 Forbidden" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("no-owner", True, "expected OWNER/NAME"),
        ("a/b/c", True, "expected OWNER/NAME"),
        ("a/b", False, "needs a login"),
    ],
)
def test_push_problems_are_found_before_training(
    repo: str,
    token: bool,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("atdiff.training.card.get_token", lambda: "hf_stand_in" if token else None)
    assert main([*WORDS, "--out", str(tmp_path / "run"), "--push-to-hub", repo]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_study_card_has_results_but_no_paths(finished: tuple[Path, Path]) -> None:
    run = finished[1] / "seed-0" / "plain"
    text = (run / "pipeline" / "README.md").read_text()
    cells = json.loads((run / "cells.json").read_text())
    assert f"| ddim | none | 3 | 3 | {cells[0]['metrics']['fd']:.4g} |" in text
    assert f"(images per row: 40, sampling seed: {cells[0]['sample_seed']}, " in text
    assert "| steps | NFE | FD ↓ |" in text
    assert "Not evaluated" not in text
    assert str(finished[1]) not in text  # the base it was fine-tuned from
    assert "fine-tuned from `base` on" in text


def test_missing_card_is_written_on_the_next_start(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*WORDS, "--out", str(out)]) == 0
    text = model_card(out)
    (out / "pipeline" / "README.md").unlink()
    assert not has_card(out)
    assert main([*WORDS, "--out", str(out)]) == 0
    assert (out / "pipeline" / "README.md").read_text() == text


def _card(tmp_path: Path, sections: dict[str, dict[str, Any]]) -> ModelCard:
    """Return the card of a run with these settings and a bundled network."""
    config = asdict(TrainConfig())
    for section, values in sections.items():
        config[section].update(values)
    shutil.copytree(PAIR / "cifar10-base", tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    return ModelCard(model_card(tmp_path / "run"))


TUNED = {"init": "base", "ema_decay": 0.99, "ema_warmup": False}
RESIDUAL = {"method": "pgd", "passes": 2, "direction": "residual", "dose": "auto", "steps": 8}
DESCRIPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "on `digits` for 1,000 forward-backward passes at batch size 128 per process with atdiff, using no "
              "perturbation (plain fine-tuning). The published weights are an exponential moving average (EMA) with "
              "decay 0.99."),
    "automatic dose": (
        {"adversary": RESIDUAL},
        "An unconditional flow-matching model, fine-tuned from `base` on `digits` for 1,000 forward-backward passes "
        "(500 weight updates) at batch size 128 per process with atdiff, using residual perturbations of the input "
        "(dose chosen automatically for 8 sampling steps, with a look-ahead, on fresh samples).",
    ),
    "the authors'": (
        {"adversary": {"passes": 3, "step_size": 0.1, "scale": "constant"}},
        "with atdiff, using gradient perturbations of the input (steps of 0.1 in the l2 norm, every batch 3 times in a "
        "row).",
    ),
    "staggered": (
        {"adversary": {"passes": 2, "step_size": 0.5, "scale": "high", "order": "staggered", "direction": "random"}},
        "using random perturbations of the input (steps of 0.5 × σ(1 − α) in the l2 norm, every sample 2 times, "
        "staggered).",
    ),
    "soar": ({"adversary": {"method": "soar", "passes": 2}},
             "using SOAR (also trained on the states that its own sampling steps reach; weight 1)."),
    "mac": ({"adversary": {"method": "mac", "passes": 2, "weight": 2.0}}, "using model-aligned coupling (pairs with a "
            "smaller network error get more weight; weight 2)."),
    "ot": ({"objective": {"ot": True}}, "using no perturbation. The published weights are an exponential moving "
           "average (EMA) with decay 0.99.\n\nFurther settings:\n\n- Noise and images paired by optimal transport\n\n"),
    "explorative": (
        {"adversary": RESIDUAL, "objective": {"explorative": 6}},
        "\n\nFurther settings:\n\n- Each image gets the one of 6 noises with the smallest network error\n\nChoosing "
        "the noise counts as 2 passes per batch.\n\n",
    ),
    "parts of the data": ({"data": {"labels": [0, 3], "limit": 5000}},
                          "on `digits` (classes 0, 3; the first 5,000 images) for"),
    "not averaged": ({"training": {"ema_decay": 0.0}}, "The published weights are those of the last update."),
    "distilled": (
        {"consistency": {"mode": "distillation", "teacher": "teacher"}, "adversary": {**RESIDUAL, "dose": 0.15}},
        "An unconditional consistency model, distilled from `teacher` (starting from `base`) on `digits` for 1,000 "
        "forward-backward passes (500 weight updates) at batch size 128 per process with atdiff, using residual "
        "perturbations of the student's input (dose 0.15, with a look-ahead, on fresh samples).",
    ),
    "distilled from itself": (
        {"consistency": {"mode": "distillation", "teacher": "self"}},
        "consistency model, fine-tuned from `base` (with its original weights as the consistency teacher) on `digits` "
        "for 1,000 forward-backward passes at batch size 128 per process with atdiff, using no perturbation (plain "
        "consistency distillation).",
    ),
    "consistency training": (
        {"consistency": {"mode": "training"}, "training": {"init": None}},
        "consistency model, trained from scratch by consistency training (without a teacher) on `digits` for 1,000 "
        "forward-backward passes at batch size 128 per process with atdiff, using no perturbation (plain consistency "
        "training).",
    ),
    "classes": ({"data": {"class_conditional": True}}, "A class-conditional flow-matching model, fine-tuned from"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_card_describes_how_the_model_was_trained(kind: str, tmp_path: Path) -> None:
    settings, description = DESCRIPTIONS[kind]
    card = _card(tmp_path, {**settings, "training": {**TUNED, **settings.get("training", {})}})
    assert description in card.text.partition("\n\n## Usage")[0]


@pytest.mark.parametrize(
    ("settings", "papers", "adversarial"),
    [
        ({}, [], False),
        ({"adversary": RESIDUAL, "objective": {"explorative": 6}}, ["2502.17099", "2607.27372"], True),
        ({"adversary": {"passes": 2, "step_size": 0.0}}, [], False),
        ({"adversary": {"method": "contrastive"}}, ["2506.05350"], False),
        ({"objective": {"nearest": 4}}, ["2505.18521"], False),
    ],
)
def test_card_cites_the_methods_used(
    settings: dict[str, dict[str, Any]], papers: list[str], adversarial: bool, tmp_path: Path
) -> None:
    card = _card(tmp_path, settings)
    assert re.findall(r"arxiv\.org/abs/([\d.]+)", card.text) == papers
    assert ("adversarial-training" in card.data.to_dict()["tags"]) == adversarial


@pytest.mark.parametrize("name", ["cifar10-base", "cifar10-plain", "cifar10-atdiff"])
def test_bundled_cards_are_up_to_date(name: str, tmp_path: Path) -> None:
    card = ModelCard.load(PAIR / name / "README.md")
    run = tmp_path / card.text.strip().partition("\n")[0].removeprefix("# ")
    shutil.copytree(PAIR / name, run / "pipeline")
    (run / "config.yaml").write_text(card.text.partition("## Recipe\n```yaml\n")[2].partition("```")[0])
    results = card.content.partition("## Results\n")[2].partition("\n\n## Recipe")[0]
    assert card.content == model_card(run).replace("Not evaluated yet.", results)  # the cells are not bundled
    assert (
        "| sampler | correction | steps | NFE | FD ↓ | precision ↑ | recall ↑ | density ↑ | coverage ↑ |" in card.text
    )
