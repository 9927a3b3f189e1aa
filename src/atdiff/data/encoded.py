"""The record of a folder of latents and embeddings; does not import torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atdiff.core.errors import UserError
from atdiff.system.files import write_json

__all__ = ["AGAIN", "RECORD", "EncodedRecord", "read_record"]

RECORD = "encoded.json"
FORMAT = 1  # version of the record
AGAIN = "copy the folder again, or encode the images again with `atdiff encode`"


@dataclass(frozen=True)
class EncodedRecord:
    """The images, the settings they were read with, and the encoders.

    Attributes:
        name: of the images, for reports.
        data: the settings they were read with, named as under ``data`` in a recipe.
        flip: whether the mirrored images were encoded too.
        classes: class names in label order, if each caption is that of a class.
        encoders: what identifies the encoders, keyed by a description for messages.
        files: size in bytes and SHA-256 of each file.
        format: version of the record.
    """

    name: str
    data: dict[str, Any]
    flip: bool
    classes: list[str] | None
    encoders: dict[str, Any]
    files: dict[str, list[Any]]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write the record into the folder."""
        write_json(folder / RECORD, asdict(self))


def read_record(folder: Path) -> EncodedRecord:
    """Read the record of a folder of latents.

    Raises:
        UserError: the folder has no record, the record is damaged, or a newer version wrote it.
    """
    file = folder / RECORD
    if not file.is_file():
        what = f"holds no {RECORD}" if folder.is_dir() else "does not exist"
        raise UserError(f"data.latents={folder} {what}: expected a folder made by `atdiff encode RECIPE --out FOLDER`.")
    try:
        content = json.loads(file.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise UserError(
                f"data.latents={folder} has format {content['format']}, but this version reads format {FORMAT}: encode "
                "the images with this version, or update atdiff."
            )
        return EncodedRecord(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): {AGAIN}.") from error
