"""An extension of Griffe: links and names in docstrings, which are reStructuredText, as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

LINK = re.compile(r"`([^`<]*?)\s*<(https?://[^>]+)>`_", re.DOTALL)
ROLE = re.compile(r":\w+:`~?(?:[^`]*\.)?([^`.]+)`")


class Markdown(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ANN401
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = LINK.sub(lambda found: f"[{found[1] or found[2]}]({found[2]})", obj.docstring.value)
            obj.docstring.value = ROLE.sub(r"`\1`", text)
