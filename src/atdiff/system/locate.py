"""Locates runs, pipelines, data sets and weights: first on this machine, then on the network.

Nothing here imports torch, so that missing files are reported at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from atdiff.core.choices import order_of
from atdiff.core.errors import UserError
from atdiff.system.pipeline_files import check_class, is_single_file, no_pipeline

__all__ = [
    "SIZES",
    "URLS",
    "bounded_network",
    "check_hub",
    "check_local",
    "check_run",
    "check_weights",
    "hub_failure",
    "hub_location",
    "is_hub_id",
    "is_reachable",
    "offline_reason",
    "published_passes",
    "run_config",
    "weights_file",
    "without_download",
]

FILE_SUFFIXES = frozenset({
    ".bin", ".bmp", ".ckpt", ".csv", ".gif", ".gz", ".html", ".jpeg", ".jpg", ".json", ".jsonl", ".npy", ".npz",
    ".parquet", ".pgm", ".pkl", ".png", ".pt", ".pth", ".safetensors", ".tar", ".tgz", ".tif", ".tiff", ".txt", ".webp",
    ".yaml", ".yml", ".zip",
})  # fmt: skip
SECONDS = 2.0  # timeout for a server to answer, unless HF_HUB_ETAG_TIMEOUT is set

SILENCE = 10.0  # seconds without data after which a download fails

_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_CLIP_HASH = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
URLS = {
    **dict.fromkeys(
        ("inception-v3-compat", "inception-v3-spatial"),
        f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION}",
    ),
    "dinov2-vit-l-14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "clip-vit-b-32": f"https://openaipublic.azureedge.net/clip/models/{_CLIP_HASH}/ViT-B-32.pt",
}
"""Download addresses of the extractors' weights."""
SIZES = {
    "inception-v3-compat": "96 MB",
    "inception-v3-spatial": "96 MB",
    "dinov2-vit-l-14": "1.2 GB",
    "clip-vit-b-32": "354 MB",
}
"""Their download sizes."""

Kind = Literal["model", "dataset"]


def is_hub_id(name: str) -> bool:
    """Whether ``name`` looks like a hub id, OWNER/NAME: without a file suffix, and OWNER is not a local folder."""
    path = Path(name)
    has_form = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    return has_form and path.suffix.lower() not in FILE_SUFFIXES and not path.parent.exists()


def _parsed(text: str) -> Any:  # noqa: ANN401  (whatever the file holds)
    """Parse like ``yaml.safe_load``: with the much faster libyaml, except on errors, where its messages show less."""
    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return yaml.safe_load(text)


def run_config(run: str) -> dict[str, Any]:
    """Return the settings of a training folder; empty for a pipeline folder or a hub id.

    Raises:
        UserError: the settings file is damaged.
    """
    file = Path(run).expanduser() / "config.yaml"
    if not file.is_file():
        return {}
    try:
        config = _parsed(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}); restore it.") from None
    if not isinstance(config, dict):
        raise UserError(
            f"{file} contains no settings of a training run, so {run} is not a training folder; give the folder of a "
            "run, or a pipeline."
        )
    adversary = config.get("adversary")
    if isinstance(adversary, dict) and "order" in adversary:
        adversary["order"] = order_of(adversary["order"])
    return config


def published_passes(run: str | Path) -> int | None:
    """Return after how many passes a training folder published its weights; None if that is not recorded."""
    try:
        passes = json.loads((Path(run).expanduser() / "data.json").read_text())["published"]
    except (OSError, ValueError, KeyError, TypeError):  # earlier versions did not record it
        return None
    return int(passes)


def check_run(run: str) -> None:
    """Check that a run can be loaded, without loading it.

    Args:
        run: a training folder, a folder of a diffusers pipeline, or a hub id.

    Raises:
        UserError: as for :func:`check_local`, also for the pipeline that a LoRA was trained on; or it is a hub id that
            is not in the hub's cache, and the hub is unreachable.
    """
    check_local(run)
    if not Path(run).expanduser().exists():
        check_hub(run, "model")
    config = run_config(run)
    if (config.get("lora") or {}).get("rank"):
        check_run(config["training"]["init"])


def check_local(run: str) -> None:
    """Check that a run is a folder or a checkpoint that can be loaded, or has the form of a hub id.

    Raises:
        UserError: it is neither a folder nor a hub id, is unfinished, contains something else, or is a pipeline of an
            unsupported class.
    """
    folder = Path(run).expanduser()
    if not folder.exists():
        if not is_hub_id(run):
            raise UserError(
                f"{run!r} could not be loaded as a folder or downloaded as a hub id (there is no such folder, and hub "
                "ids are OWNER/NAME); give the path of a training folder or of a saved diffusers pipeline."
            )
    elif (folder / "config.yaml").is_file():
        config = run_config(run)
        of_lora = (config.get("lora") or {}).get("rank")
        file = "lora/pytorch_lora_weights.safetensors" if of_lora else "pipeline/model_index.json"
        if not (folder / file).is_file():
            raise UserError(f"{run} has no finished pipeline yet; run its `atdiff train` command again to resume it.")
        published, passes = published_passes(run), (config.get("training") or {}).get("passes")
        if published not in (None, passes):
            raise UserError(
                f"{run} has not finished its {passes} passes, and its pipeline is still from pass {published}: run its "
                "`atdiff train` command again to resume it."
            )
    elif is_single_file(run):
        return
    elif not (folder / "model_index.json").is_file():
        raise no_pipeline(run)
    else:
        check_class(run, folder)


def hub_location(name: str, kind: Kind) -> str:
    """Return what to load for a hub id: the id itself, or its folder in the cache if the hub is unreachable.

    In that case Hugging Face's libraries are switched to offline mode, since they would retry for a minute.
    """
    if offline_reason() is None:
        return name
    return _cached(name, kind) or name


def check_hub(name: str, kind: Kind, *, where: str = "here") -> None:
    """Check that a hub id is in the hub's cache or can be downloaded.

    Args:
        name: the hub id.
        kind: of repository.
        where: where the user can give the path of a folder instead, for the message.

    Raises:
        UserError: neither.
    """
    reason = offline_reason()
    if reason is not None and _cached(name, kind) is None:
        command = f"hf download {name}" if kind == "model" else f"hf download {name} --repo-type dataset"
        raise UserError(
            f"{name} is neither a local folder nor in the hub's cache, and {reason}; on a machine with network "
            f"access, run `{command} --local-dir FOLDER` and give the path of that folder {where}."
        )


def _cached(name: str, kind: Kind) -> str | None:
    """Return a repository's folder in the hub's cache, or the id of a data set that ``datasets`` has prepared."""
    from huggingface_hub import constants, snapshot_download

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    if kind == "dataset" and (prepared / name.replace("/", "___")).is_dir():
        return name
    try:
        folder = snapshot_download(name, repo_type=kind, local_files_only=True)
    except (OSError, ValueError):  # LocalEntryNotFoundError derives from either or both, depending on the version
        return None
    whole = kind == "dataset" or any((Path(folder) / name).is_file() for name in ("model_index.json", "config.json"))
    return str(folder) if whole else None


def hub_failure(reason: str) -> str:
    """Return why the hub failed: in offline mode, libraries do not say why they are offline."""
    return offline_reason() or reason if re.search(r"offline ?mode", reason, re.IGNORECASE) else reason


def offline_reason() -> str | None:
    """Return why the hub is not used, and switch Hugging Face's libraries to offline mode; None if it is reachable."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        if is_reachable(constants.ENDPOINT):
            return None
        _work_offline()
        os.environ["ATDIFF_HUB_UNREACHABLE"] = constants.ENDPOINT  # so that child processes need not try again
    unreachable = os.environ.get("ATDIFF_HUB_UNREACHABLE")
    return f"{unreachable} cannot be reached" if unreachable else "HF_HUB_OFFLINE is set, so nothing is downloaded"


def _work_offline() -> None:
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        import datasets

        datasets.config.HF_HUB_OFFLINE = True


@cache
def is_reachable(url: str) -> bool:
    """Whether a server answers with any status within two seconds or HF_HUB_ETAG_TIMEOUT; cached per process."""
    answers: list[bool] = []
    seconds = _patience()
    # In a thread, since a DNS lookup has no timeout.
    thread = threading.Thread(target=lambda: answers.append(_answers(url, seconds)), daemon=True)
    thread.start()
    thread.join(seconds + 0.5)
    return any(answers)


def _patience() -> float:
    try:
        return float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or SECONDS)
    except ValueError:
        return SECONDS


def _answers(url: str, seconds: float) -> bool:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(url, method="HEAD"), timeout=seconds).close()
    except (HTTPError, HTTPException):
        return True
    except OSError as error:  # an unknown certificate, such as a corporate proxy's, is an answer too
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


@contextlib.contextmanager
def bounded_network() -> Iterator[None]:
    """Make a download fail when the server stops answering, since downloads have no timeout of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def weights_file(extractor: str) -> Path:
    """Return the path where torch caches the weights of an extractor, whether they exist or not."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    name = URLS[extractor].rpartition("/")[2]
    if extractor == "clip-vit-b-32":  # torch-fidelity's name
        name = f"{extractor}-{_CLIP_HASH}.pt"
    return Path(home).expanduser() / "hub" / "checkpoints" / name


def check_weights(extractor: str) -> None:
    """Check that the weights of an extractor are on this machine or can be downloaded.

    Raises:
        UserError: neither.
    """
    url = URLS.get(extractor)
    if url is None or weights_file(extractor).is_file() or is_reachable("/".join(url.split("/")[:3])):
        return
    raise UserError(
        f"the weights of {extractor} are not on this machine, and {url} cannot be reached: download that file on "
        f"a machine with network access, and save it as {weights_file(extractor)} or give --weights "
        f"{extractor}=FILE{without_download(extractor)}."
    )


def without_download(extractor: str) -> str:
    """Return the end of a sentence that suggests an extractor without a download, or nothing."""
    if extractor != "inception-v3-compat":
        return ""
    return ", or where the images have labels, choose --extractor label-classifier, which needs no download"
