"""Parsing of captions from files and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from atdiff.core.errors import UserError

__all__ = [
    "TEXT_COLUMNS", "UncaptionedError", "caption_column", "captions_of", "json_object", "missing_captions", "utf8",
]  # fmt: skip

TEXT_COLUMNS = ("text", "caption", "TEXT", "captions")  # in order of preference


class UncaptionedError(UserError):
    """The images have no captions of their own."""


def captions_of(name: object, cells: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the captions in ``(image name, raw value)`` cells; a missing or empty one raises ``UserError``."""
    texts: list[str] = []
    missing: list[str] = []
    for image, cell in cells:
        value = next(iter(cell), None) if isinstance(cell, list) else cell
        if value is None:
            missing.append(image)
        elif not isinstance(value, str):
            raise UserError(f"the caption of {image} is {value!r}: expected text.")
        elif not value.strip():
            raise UserError(f"the caption of {image} is empty: write one.")
        else:
            texts.append(value.strip())
    if missing:
        raise missing_captions(name, missing, len(missing) + len(texts))
    if not texts:
        raise UserError(f"{name} contains no images with captions: expected at least one pair.")
    return texts


def missing_captions(name: object, missing: Sequence[str], count: int) -> UserError:
    """Return the error for the images, of ``count`` in all, that have no caption."""
    return UserError(
        f"{len(missing)} of the {count} images of {name} have no caption (first: {missing[0]}): write one for each, or "
        "remove them."
    )


def caption_column(name: object, columns: Sequence[str], asked: str | None) -> str:
    """Return the requested column, by default the first of :data:`TEXT_COLUMNS`; raise ``UserError`` if missing."""
    if asked is not None and asked not in columns:
        raise UserError(f"{name} has no column {asked!r} with captions: expected one of {list(columns)}.")
    found = [asked] if asked is not None else [c for c in TEXT_COLUMNS if c in columns]
    if not found:
        raise UncaptionedError(
            f"{name} has no caption column among {list(columns)}: expected one of {list(TEXT_COLUMNS)}; name the "
            "column as caption_column (or give captions, one per class, for data that only have labels)."
        )
    return found[0]


def utf8(content: bytes, where: object) -> str:
    """Decode the bytes of a file or archive member as UTF-8, or raise ``UserError``."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error}): save it as UTF-8.") from error


def json_object(text: str, where: object) -> dict[str, Any]:
    """Parse a JSON object, or raise ``UserError``."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} cannot be read as JSON ({error}): correct or remove it.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} contains {fields!r}: expected a JSON object with a field for the caption.")
    return fields
