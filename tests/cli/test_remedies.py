"""Every option, key, command, extra and variable that a message names exists, and the suggested fixes work."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from atdiff.cli import COMMANDS, main
from atdiff.objectives.denoising import DenoisingObjective
from atdiff.study.recipe import StudyConfig, dotted_keys
from atdiff.training.config import TrainConfig
from conftest import small_unet

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "src" / "atdiff").rglob("*.py"))
SECTIONS = "data|model|scheduler|objective|consistency|lora|adversary|optimizer|training|study"
KEYS = {*dotted_keys(TrainConfig()), *dotted_keys({"study": StudyConfig()})}
# Options of other programs that messages name, with words that the message must contain.
FOREIGN = {"--multi_gpu": "launch", "--repo-type": "hf download", "--local-dir": "--local-dir FOLDER`"}


class Message(NamedTuple):
    place: str
    text: str  # with {} for interpolated values


def _text(node: ast.expr) -> str:
    """Return an expression's text: literals as they are, anything else as {}."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "{}"
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.IfExp):
        return f"{_text(node.value.body)} {_text(node.value.orelse)}"
    return "{}"


def _messages() -> Iterator[Message]:
    """Yield every string of several words except docstrings: messages are built in many places."""
    for file in SOURCES:
        tree = ast.parse(file.read_text())
        described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in described | parts:
                text = _text(node)
                if " " in text:
                    yield Message(f"{file.relative_to(ROOT)}:{node.lineno}", text)


MESSAGES = list(_messages())


def _named(pattern: str) -> list[tuple[str, Message]]:
    return [(found, message) for message in MESSAGES for found in re.findall(pattern, message.text)]


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 400
    assert any("--unequal-passes" in message.text for message in MESSAGES)


def test_options_named_in_messages_exist() -> None:
    own = {option for command in COMMANDS.values() for option in command.spellings} | {"--version"}
    found = _named(r"(?<![\w-])--[a-z][\w.-]*\w")
    assert len(found) > 30
    for option, message in found:
        if option in FOREIGN:
            assert FOREIGN[option] in message.text, message
        else:
            inside = option[2:].rpartition(".args.")[0]
            assert option in own or option[2:] in KEYS or f"{inside}.args" in KEYS, message


def test_keys_named_in_messages_exist() -> None:
    found = _named(rf"(?<![\w./-])((?:{SECTIONS})\.[a-z]\w*)(?![\w/(])")
    assert len(found) > 50
    files = {path.name for path in SOURCES} | {"data.json", "study.json"}
    for key, message in found:
        if message.place.startswith(
            "src/atdiff/pipelines/plain.py"
        ):  # the code of a model card, whose scheduler is diffusers'
            continue
        method = key.startswith("objective.") and hasattr(DenoisingObjective, key.partition(".")[2])
        assert key in KEYS or key in files or method, message


def test_commands_named_in_messages_exist() -> None:
    found = _named(r"`atdiff ([\w-]+)")
    assert len(found) > 5
    for command, message in found:
        assert command in COMMANDS, message


def test_extras_named_in_messages_exist() -> None:
    found = _named(r"pip install '(?:atdiff|\.)\[([^\]]+)\]'")
    assert len(found) > 4
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for extra, message in found:
        assert extra == "{}" or re.search(rf"^{extra} = ", extras, re.MULTILINE), message


def test_variables_named_in_messages_are_read() -> None:
    import huggingface_hub

    hub, distributed = Path(huggingface_hub.__file__).parent, Path(torch.distributed.__file__).parent
    files = [*SOURCES, *hub.glob("*.py"), *(hub / "utils").glob("*.py"), distributed / "rendezvous.py"]
    read = "".join(path.read_text() for path in files)
    found = _named(r"\b(?:[A-Z]{2,}_)+[A-Z]+\b")
    assert len(found) > 3
    for variable, message in found:
        assert re.search(rf"""["']{variable}["']""", read), message  # the whole string, as in os.environ.get


# ---- tried: the wrong command, its message, and the command that the message suggests


def _images(folder: Path, *sizes: int) -> None:
    folder.mkdir()
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


SMALL = {
    "model": {"name": "mlp", "args": {"width": 8, "num_blocks": 1}},
    "objective": {"prediction_type": "v_prediction"},
    "training": {"passes": 2, "batch_size": 8, "log_every": 1, "checkpoint_every": 1},
    "arms": {"plain": {}, "at": {"adversary": {"passes": 2, "step_size": 1.0}}},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    _images(tmp_path / "pictures", 8, 9, 12, 8)
    torch.manual_seed(0)
    DDPMPipeline(small_unet(4, 8), DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    return tmp_path


DRAWN = "--steps 2 --num 4"
TRIED = [
    (
        "train small.yaml --data.name pictures --out out",
        "make them equal with image_size",
        "train small.yaml --data.name pictures --data.image_size 8 --out out",
    ),
    (
        "train small.yaml --objective.label_dropout 0.1 --out out",
        "set data.class_conditional, or leave it out",
        "train small.yaml --objective.label_dropout 0.1 --data.class_conditional true --out out",
    ),
    (
        "train small.yaml --training.accumulate 16 --out out",
        "cannot be split into training.accumulate=16 parts",
        "train small.yaml --training.accumulate 16 --training.batch_size 16 --out out",
    ),
    (
        "train small.yaml --adversary.step_size 1 --out out",
        "use adversary.passes=2 or more",
        "train small.yaml --adversary.step_size 1 --adversary.passes 2 --out out",
    ),
    (
        "train small.yaml --consistency.mode distillation --out out",
        "--training.init (or --consistency.teacher)",
        "train small.yaml --consistency.mode distillation --consistency.teacher base --out out",
    ),
    (
        "train small.yaml --training.lr 0.1 --out out",
        "did you mean '--optimizer.lr'",
        "train small.yaml --optimizer.lr 0.1 --out out",
    ),
    (
        f"evaluate theirs {DRAWN} --metrics energy --out cells.json",
        "name them with --data",
        f"evaluate theirs {DRAWN} --metrics energy --data digits --out cells.json",
    ),
    (
        f"compare a=base b=longer {DRAWN} --metrics energy --no-mismatch --out page.html",
        "or add --unequal-passes",
        f"compare a=base b=longer {DRAWN} --metrics energy --no-mismatch --unequal-passes --out page.html",
    ),
    (
        f"evaluate base {DRAWN} --corrections epsilon-scaling:search --metrics prc --out cells.json",
        "add one of fid, sliced_wasserstein, energy",
        f"evaluate base {DRAWN} --corrections epsilon-scaling:search --search-num 4 --metrics energy --out cells.json",
    ),
    (
        f"sample theirs {DRAWN} --class-label 3 --out x.png",
        "leave out the class label",
        f"sample theirs {DRAWN} --out x.png",
    ),
]


@pytest.mark.parametrize(("wrong", "said", "right"), TRIED, ids=[said for _, said, _ in TRIED])
def test_suggested_fixes_work(
    wrong: str, said: str, right: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, passes in (("base", 2), ("longer", 3)):
        if run in wrong + right:
            assert main(["train", "small.yaml", "--training.passes", str(passes), "--out", run]) == 0
    assert main(wrong.split()) == 2
    assert said in capsys.readouterr().err
    assert main(right.split()) == 0, capsys.readouterr().err


def test_existing_page_is_replaced_with_overwrite(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.yaml", "--out", "base"]) == 0
    words = f"compare a=base b=base-again {DRAWN} --metrics energy --no-mismatch --out page.html".split()
    assert main(["train", "small.yaml", "--training.seed", "1", "--out", "base-again"]) == 0
    assert main(words) == 0
    assert main(words) == 2
    assert "or add --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_unfinished_run_resumes_as_its_message_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "small.yaml", "--out", "run"]
    assert main([*train, "--max-time", "0.0001"]) == 75
    assert "the same command" in capsys.readouterr().err
    sample = ["sample", "run", "--steps", "2", "--num", "4", "--out", "x.npz"]
    assert main(sample) == 2
    assert "run its `atdiff train` command again" in capsys.readouterr().err
    assert main(train) == 0
    assert main(sample) == 0
