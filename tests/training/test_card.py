"""Model cards, and their way to a hub that is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from atdiff.cli import main
from atdiff.training.card import has_card, model_card

WORDS = ["train", "digits-epsilon", "--arm", "at-residual", "--training.passes", "4"]


class Hub:
    """Takes what HfApi would send."""

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


def test_a_finished_run_is_pushed_with_its_card(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "with residual perturbations" in card.text
    # The recipe of the card is the run's.
    recipe = yaml.safe_load(card.text.partition("## Recipe\n```yaml\n")[2].partition("```")[0])
    assert recipe == yaml.safe_load((out / "config.yaml").read_text())
    # The same command on the finished run only uploads.
    checkpoints = sorted(path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*"))
    assert main([*WORDS, "--out", str(out), "--push-to-hub", "someone/digits"]) == 0
    assert len(hub.calls) == 4
    assert sorted(path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")) == checkpoints


def test_a_hub_that_does_not_answer_loses_nothing(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.down = True
    out = tmp_path / "run"
    assert main([*WORDS, "--out", str(out), "--push-to-hub", "someone/digits"]) == 1
    assert "could not be pushed to someone/digits (the hub does not answer)" in capsys.readouterr().err
    assert (out / "pipeline" / "model_index.json").is_file()
    hub.down = False
    assert main([*WORDS, "--out", str(out), "--push-to-hub", "someone/digits"]) == 0
    assert hub.files


def test_an_http_error_of_the_hub_is_a_sentence(
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
def test_what_cannot_be_pushed_is_found_before_training(
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


def test_the_card_of_a_study_has_its_results_and_no_paths(finished: tuple[Path, Path]) -> None:
    run = finished[1] / "seed-0" / "plain"
    text = (run / "pipeline" / "README.md").read_text()
    cells = json.loads((run / "cells.json").read_text())
    assert f"| ddim | none | 3 | 3 | {cells[0]['metrics']['fd']:.4g} |" in text
    assert "num 40, sample_seed" in text
    assert "Not evaluated" not in text
    assert str(finished[1]) not in text  # the base that it went on from
    assert "from `base`" in text


def test_a_card_that_a_kill_left_out_is_written_by_the_next_start(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*WORDS, "--out", str(out)]) == 0
    text = model_card(out)
    (out / "pipeline" / "README.md").unlink()
    assert not has_card(out)
    assert main([*WORDS, "--out", str(out)]) == 0
    assert (out / "pipeline" / "README.md").read_text() == text
