"""Error messages are immediate, correct, and name things that exist."""

from __future__ import annotations

import json
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler

from atdiff.cli import main
from atdiff.core import choices
from atdiff.core.errors import UserError
from atdiff.data.sources.registry import check_data
from atdiff.metrics.features.clip import URL_CLIP
from atdiff.models.inference import DTYPES
from atdiff.pipelines.model import load_denoiser
from atdiff.sampling import SAMPLERS
from atdiff.study.recipe import load_recipe
from atdiff.system import locate
from atdiff.system.locate import check_run, hub_failure, is_hub_id
from conftest import small_unet

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "datasets",
    "scipy",
    "sklearn",
    "matplotlib",
    "torch_fidelity",
)
LIGHT = f"""
import json, sys
from atdiff.cli import main
for words in json.load(sys.stdin):
    print("CODE", main(words))
    print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules])
"""
# Commands and their exit codes.
COMMANDS: list[tuple[str, int]] = [
    ("--help", 0),
    ("train --help", 0),
    ("recipes", 0),
    ("recipes --schema", 0),
    ("train quickstart --out new --dry-run", 0),
    ("trian quickstart", 2),
    ("sample run --stps 3 --out x.png", 2),
    ("train quickstrat --out x", 2),
    ("train quickstart --arm nothing --out x", 2),
    ("train quickstart --training.lr 1 --out x", 2),
    ("train quickstart --training.passes many --out x", 2),
    ("train quickstart --adversary.norm l3 --out x", 2),
    ("train quickstart --adversary.passes 1 --adversary.step_size 1 --out x", 2),
    ("train quickstart --adversary.method equivariance --adversary.target invariant --out x", 2),
    ("train quickstart --data.name gone/images/here --out x", 2),
    ("train quickstart --data.name gone.npz --out x", 2),
    ("train quickstart --training.init gone --out x", 2),
    ("train quickstart --consistency.teacher ./gone --out x", 2),
    ("train quickstart --out used", 2),
    ("train quickstart --out other", 2),
    ("train quickstart --max-time soon --out x", 2),
    ("study quickstart --out used", 2),
    ("study quickstart --study.samplers [dimm] --out x", 2),
    ("study quickstart --study.metrics [fidd] --out x", 2),
    ("study quickstart --data.name gone.npz --out x", 2),
    ("study quickstart --jobs 0 --out x", 2),
    ("quickstart --out used", 2),
    ("sample gone --out x.png", 2),
    ("sample used --out x.png", 2),
    ("sample other --out x.png", 2),
    ("sample theirs --out used", 2),
    ("sample theirs --out x.jpeg", 2),
    ("sample theirs --sampler dimm --out x.png", 2),
    ("sample theirs --steps 0 --out x.png", 2),
    ("sample theirs --correction dwc:1 --out x.png", 2),
    ("sample theirs --precision half --out x.png", 2),
    ("sample theirs --prompts gone.txt --out x.png", 2),
    ("evaluate gone --out x.json", 2),
    ("evaluate theirs --data gone.npz --out x.json", 2),
    ("evaluate theirs --metrics fidd --out x.json", 2),
    ("evaluate theirs --extractor inception --out x.json", 2),
    ("evaluate theirs --weights gone.pth --out x.json", 2),
    ("evaluate theirs --steps five --out x.json", 2),
    ("evaluate theirs --prompts gone.txt --out x.json", 2),
    ("evaluate theirs --out used/notes.txt", 2),
    ("compare a=gone b=theirs --out x.html", 2),
    ("compare a=theirs --out x.html", 2),
    ("compare a=theirs b=theirs --out x.pdf", 2),
    ("mismatch gone --out x", 2),
    ("mismatch theirs --out used", 2),
    ("mismatch theirs --data gone/images/here --out x", 2),
    ("robustness gone --out x", 2),
    ("robustness theirs --norm l3 --out x", 2),
    ("robustness theirs --radii wide --out x", 2),
    ("import-adm gone.pt --out x", 2),
    ("encode text-digits --out x", 2),
    ("encode digits-unet --out used", 2),
    ("train text-digits --data.latents gone --out x", 2),
]


def their_pipeline(folder: Path) -> None:
    torch.manual_seed(0)
    DDPMPipeline(small_unet(4, 8), DDPMScheduler()).save_pretrained(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with somebody's pipeline, somebody's notes and a barely started training run."""
    monkeypatch.chdir(tmp_path)
    their_pipeline(tmp_path / "theirs")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("notes")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump({"training": {"passes": 3}}))
    return tmp_path


def test_errors_are_reported_before_torch_is_imported(place: Path) -> None:
    before = sorted(place.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", LIGHT],
        input=json.dumps([command.split() for command, _ in COMMANDS]),
        capture_output=True,
        text=True,
        check=True,
    )
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("CODE")]
    heavy = [line for line in done.stdout.splitlines() if line.startswith("HEAVY")]
    for (command, expected), code, imported in zip(COMMANDS, codes, heavy, strict=True):
        assert code == expected, (command, done.stderr)
        assert imported == "HEAVY []", (command, imported)
    sentences = done.stderr.strip().splitlines()
    assert len(sentences) == sum(code == 2 for _, code in COMMANDS)
    assert all(sentence.startswith("atdiff: ") and sentence.endswith((".", "?")) for sentence in sentences), sentences
    assert sorted(place.rglob("*")) == before


def test_lightweight_choices_match_the_registries() -> None:
    for light, heavy in (
        (choices.SAMPLERS, SAMPLERS),
        (choices.PRECISIONS, [*DTYPES, "auto"]),
    ):
        assert list(light) == list(heavy)
    from atdiff.adversary.scale import SCALES
    from atdiff.data.images import CROPS
    from atdiff.data.mixture import MIXTURES

    assert set(choices.MIXTURES) == set(MIXTURES)
    assert set(choices.Scale.__args__) == set(SCALES)  # type: ignore[attr-defined]
    assert set(choices.Crop.__args__) == set(CROPS)  # type: ignore[attr-defined]


# ---- unknown keys and options


@pytest.mark.parametrize(
    ("command", "phrase"),
    [
        ("train quickstart --training.lr=3", "did you mean '--optimizer.lr'?"),
        ("train quickstart --lr 3", "did you mean '--optimizer.lr'?"),
        ("train quickstart --learning_rate 3", "did you mean '--optimizer.lr'?"),
        ("train quickstart --learning-rate 3", "did you mean '--optimizer.lr'?"),
        ("train quickstart --batch_size 3", "did you mean '--training.batch_size'?"),
        ("train quickstart --batch-size=3", "did you mean '--training.batch_size'?"),
        ("train quickstart --optimizer.batch_size 3", "did you mean '--training.batch_size'?"),
        ("train quickstart --epochs 3", "did you mean '--training.passes', which counts forward-backward passes"),
        ("train quickstart --ema 0.9", "did you mean '--training.ema_decay'?"),
        ("train quickstart --guidance 3", "did you mean '--consistency.guidance' or '--consistency.sample_guidance'?"),
        ("train quickstart --seeds 3", "did you mean '--training.seed'?"),
        ("train quickstart --passes 3", "did you mean '--adversary.passes' or '--training.passes'?"),
        ("train quickstart --wieght_decay 3", "did you mean '--optimizer.weight_decay'?"),
        ("train quickstart --dryrun", "did you mean '--dry-run'?"),
        ("train quickstart --study.num 3", "is for `atdiff study`"),
        ("train quickstart --finetune.training.passes 3", "is for `atdiff study`"),
        ("study quickstart --seed 3", "'--study.seeds'"),
        ("study quickstart --sampler ddim", "did you mean '--study.samplers'?"),
        ("study quickstart --jbos 3", "did you mean '--jobs'?"),
        ("sample run --stps 3", "did you mean '--steps'?"),
        ("sample run --class_label 3", "did you mean '--class-label'?"),
        ("sample run --metrics fid", "it is an option of `atdiff evaluate` and `atdiff compare`"),
        ("evaluate run --corection none", "did you mean '--corrections'?"),
    ],
)
def test_unknown_options_suggest_the_nearest_at_any_depth(
    command: str, phrase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = command.split()
    if words[1:2] == ["quickstart"]:
        words += ["--dry-run"] if words[0] == "train" and "--dryrun" not in words else []
    assert main([*words, "--out", "x.png"]) == 2
    error = capsys.readouterr().err
    assert phrase in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ({"lr": 1}, "key 'lr' is unknown; did you mean 'optimizer.lr'?"),
        ({"epochs": 1}, "did you mean 'training.passes', which counts forward-backward passes"),
        ({"num": 1}, "did you mean 'study.num'?"),
        ({"training": {"lr": 1}}, "key 'training.lr' is unknown; did you mean 'optimizer.lr'?"),
        ({"training": {"ema": 1}}, "did you mean 'training.ema_decay'?"),
        ({"arms": {"at": {"lr": 1}}}, "key 'arms.at.lr' is unknown; did you mean 'arms.at.optimizer.lr'?"),
        ({"arms": {"at": {"adversary": {"epsilon": 1}}}}, "did you mean 'arms.at.adversary.step_size' or "),
        ({"finetune": {"training": {"learning_rate": 1}}}, "did you mean 'finetune.optimizer.lr'?"),
        ({"study": {"sampler": ["ddim"]}}, "did you mean 'study.samplers'?"),
        ({"study": {"width": 1}}, "expected one of arms, seeds"),
    ],
)
def test_unknown_recipe_keys_suggest_the_nearest_at_any_depth(
    content: dict[str, Any], phrase: str, tmp_path: Path
) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "wrong.yaml"))
    assert phrase in str(caught.value)


def test_suggested_keys_exist(tmp_path: Path) -> None:
    from atdiff.study.recipe import StudyConfig, dotted_keys
    from atdiff.system.suggest import SYNONYMS
    from atdiff.training.config import TrainConfig

    keys = {*dotted_keys(TrainConfig()), *dotted_keys({"study": StudyConfig()})}
    for found in SYNONYMS.values():
        assert all(key in keys or key.rpartition(".")[0] in keys for key in found), found


def test_singular_and_plural_options_are_equivalent(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["theirs", "--num", "2", "--steps", "2"]
    named = ["--samplers", "ddim", "--seeds", "3", "--corrections", "none"]
    assert main(["sample", *shared, *named, "--out", "one.npz"]) == 0
    assert main(["sample", *shared, "--sampler", "ddim", "--seed", "3", "--out", "two.npz"]) == 0
    assert Path("one.npz").read_bytes() == Path("two.npz").read_bytes()
    assert main(["mismatch", *shared, "--samplers", "ddim,heun", "--out", "x"]) == 2
    assert "`atdiff mismatch` takes one: use --sampler ddim" in capsys.readouterr().err


def test_weights_of_an_unknown_network_are_rejected(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("weights.pt").write_bytes(b"")
    words = ["mismatch", "theirs", "--data", "digits", "--weights", "digits-clasifier=weights.pt", "--out", "x"]
    assert main(words) == 2
    assert "'digits-clasifier', which is not an extractor: did you mean 'digits-classifier'?" in capsys.readouterr().err


# ---- local files first, and an unreachable hub


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", True),
        ("stabilityai/stable-diffusion-xl-base-1.0", True),
        ("black-forest-labs/FLUX.1-dev", True),
        ("name", False),
        ("./owner/name", False),
        ("../name", False),
        ("/owner/name", False),
        ("~/name", False),
        ("a/b/c", False),
        ("owner/name.npz", False),
        ("owner/images.PNG", False),
        ("owner/name.safetensors", False),
        ("here/name", False),
        ("owner\\name", False),
        ("", False),
    ],
)
def test_paths_are_not_taken_for_hub_ids(
    name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    asked: list[str] = []
    monkeypatch.setattr(locate, "is_reachable", lambda url: asked.append(url) or False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(locate, "_work_offline", lambda: None)
    monkeypatch.delenv("ATDIFF_HUB_UNREACHABLE", raising=False)
    assert is_hub_id(name) == expected
    for check in (check_run, check_data):
        asked.clear()
        with pytest.raises(UserError):
            check(name or "nothing")
        assert bool(asked) == expected


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make the hub unreachable with an empty cache; return the cache folder."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(locate, "is_reachable", lambda url: False)
    monkeypatch.setattr(locate, "_work_offline", lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True))
    for name in ("ATDIFF_HUB_UNREACHABLE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # so that they are restored
        monkeypatch.delenv(name)
    return cache


def cached(cache: Path, kind: str, name: str) -> Path:
    """Create a repository in the hub's cache and return its snapshot folder."""
    repository = cache / f"{kind}s--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def test_unreachable_hub_is_reported_in_one_sentence(no_hub: Path) -> None:
    with pytest.raises(
        UserError, match=r"https://\S+ cannot be reached; .* `hf download owner/name --local-dir"
    ) as caught:
        check_run("owner/name")
    assert "in the hub's cache" in str(caught.value)
    with pytest.raises(UserError, match=r"cannot be reached; .* `hf download owner/name --repo-type dataset --local"):
        check_data("owner/name")
    assert hub_failure("Offline mode is enabled.").endswith("cannot be reached")
    assert hub_failure("no such repository") == "no such repository"


def test_offline_mode_is_reported(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, so nothing is downloaded"):
        check_run("owner/name")


def test_cached_models_are_used_without_the_hub(no_hub: Path) -> None:
    their_pipeline(cached(no_hub, "model", "owner/name"))
    check_run("owner/name")
    assert load_denoiser("owner/name").image_shape == (1, 8, 8)


def test_cached_data_are_used_without_the_hub(no_hub: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import datasets
    from PIL import Image

    from atdiff.data import load_data

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = {"image": [Image.new("L", (8, 8), shade) for shade in (3, 5)], "label": [0, 1]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    folder = cached(no_hub, "dataset", "owner/faces")
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    check_data("owner/faces")
    assert load_data("owner/faces").images.flatten(1)[:, 0].tolist() == [3, 5]


def test_unavailable_weights_are_reported_up_front(
    no_hub: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    words = ["evaluate", "theirs", "--data", "digits", "--num", "2", "--steps", "2", "--out", "cells.json"]
    for metric, network in (("fd_dinov2", "dinov2-vit-l-14"), ("clip_fid", "clip-vit-b-32")):
        assert main([*words, "--metrics", metric]) == 2
        error = capsys.readouterr().err
        assert f"the weights of {network} are not on this machine" in error
        assert f"--weights {network}=FILE" in error
        file = locate.weights_file(network)
        assert str(file) in error
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        locate.check_weights(network)


def test_weights_are_looked_up_where_libraries_keep_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert locate.URLS["inception-v3-compat"] == locate.URLS["inception-v3-spatial"] == URL_INCEPTION_V3
    assert locate.URLS["clip-vit-b-32"] == URL_CLIP
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    assert locate.weights_file("inception-v3-compat") == folder / URL_INCEPTION_V3.rpartition("/")[2]
    assert (
        locate.weights_file("clip-vit-b-32") == folder / f"clip-vit-b-32-{MODEL_METADATA['clip-vit-b-32']['hash']}.pt"
    )


def test_silent_server_does_not_block_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not locate.is_reachable.__wrapped__(f"http://127.0.0.1:{silent.getsockname()[1]}")


# ---- interrupted commands

FEW = ["theirs", "mine", "--data", "digits", "--num", "4", "--steps", "2"]
MISMATCH = ["mismatch", *FEW, "--out", "out"]
ROBUSTNESS = ["robustness", "theirs", "mine", "--data", "digits", "--num", "4", "--levels", "0.5", "--radii", "1",
              "--pgd-steps", "1", "--restarts", "1", "--out", "out"]  # fmt: skip
EVALUATE = ["evaluate", "theirs", "--data", "digits", "--num", "4", "--steps", "2,3", "--metrics", "energy", "--out",
            "cells.json"]  # fmt: skip
TRAIN = ["train", "small.yaml", "--training.passes", "6", "--training.checkpoint_every", "2", "--out", "run"]
STUDY = ["study", "small.yaml", "--out", "out"]


@pytest.fixture
def interruptible(place: Path) -> Iterator[Path]:
    """Two pipelines and a small recipe; Ctrl-C interrupts even if the tests run in the background."""
    their_pipeline(place / "mine")
    study = {"seeds": [0], "num": 4, "steps": [2], "metrics": ["energy"], "mismatch": False}
    small = {"model": {"name": "mlp", "args": {"width": 8, "num_blocks": 1}}, "arms": {"a": {}, "b": {}},
             "finetune": {"training": {"passes": 2}}, "training": {"passes": 2, "batch_size": 8, "log_every": 1},
             "study": study}  # fmt: skip
    (place / "small.yaml").write_text(yaml.safe_dump(small))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield place
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("function", "calls", "words", "said"),
    [
        ("atdiff.measure.mismatch:measure_mismatch", 0, MISMATCH, "no measurements are saved yet"),
        ("atdiff.measure.mismatch:measure_mismatch", 1, MISMATCH, "(1 in out/mismatch.json)"),
        ("atdiff.measure.robustness:measure_robustness", 0, ROBUSTNESS, "no measurements are saved yet"),
        ("atdiff.measure.robustness:measure_robustness", 1, ROBUSTNESS, "(1 in out/robustness.json)"),
        ("atdiff.measure.cells:_Judge.judged", 0, EVALUATE, "no cells are saved yet"),
        ("atdiff.measure.cells:_Judge.judged", 1, EVALUATE, "(1 in cells.json)"),
        ("atdiff.pipelines.trained:iter_generate", 0, ["sample", "theirs", "--out", "x.npz"], "nothing is saved"),
        ("atdiff.training.tasks.pixels:load_data", 0, TRAIN, "nothing is saved"),
        ("atdiff.training.loop:write_card", 0, TRAIN, "run has a checkpoint at pass 6, and"),
        ("atdiff.study.study:Trainer", 0, STUDY, "no run has saved anything yet"),
        ("atdiff.study.study:publish", 0, STUDY, "out has 3 trained runs"),
    ],
)
def test_interrupted_commands_report_what_is_saved(
    function: str,
    calls: int,
    words: list[str],
    said: str,
    interruptible: Path,
    study_in_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, made = pkgutil.resolve_name(function), []

    def interrupted(*args: Any, **options: Any) -> Any:
        made.append(None)
        if len(made) > calls:
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the signal did not interrupt the command")
        return original(*args, **options)

    monkeypatch.setattr(function.replace(":", "."), interrupted)
    assert main(words) in (75, 130)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("atdiff: interrupted; ")
    assert said in last
