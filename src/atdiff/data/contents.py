"""Hashes of file contents; files are read again only if they may have changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from atdiff.core.errors import UserError
from atdiff.system.files import cache_folder, write_text

__all__ = ["content_hash", "content_hashes"]

# A file that changes within the clock's resolution after it was hashed looks unchanged. (`Racy git
# <https://git-scm.com/docs/racy-git>`_)
SETTLED_AFTER = 2.0  # seconds
BLOCK = 1 << 22  # bytes


def content_hashes(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file.

    The cache stores each hash with the file's size, mtime, ctime and inode number, as git's index does. A ctime cannot
    be set back, so replacing a file with another of equal size and date is detected.
    """
    names = [str(file.absolute()) for file in files]
    place = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    memory = cache_folder() / "contents" / f"{place}.json"
    known: dict[str, list[object]] = {}
    with contextlib.suppress(OSError, ValueError):
        loaded = json.loads(memory.read_text("utf-8"))
        if isinstance(loaded, dict) and all(isinstance(one, list) for one in loaded.values()):
            known = loaded
    found: dict[str, list[object]] = {}
    for name in dict.fromkeys(names):
        if not Path(name).exists():  # a broken link, which its reader reports
            found[name] = [0, 0, 0, 0, "absent"]
            continue
        status = Path(name).stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        before = known.get(name)
        found[name] = before if before is not None and before[:-1] == stamp else [*stamp, content_hash(Path(name))]
    if found != known:
        newest = time.time_ns() - int(SETTLED_AFTER * 1e9)
        settled = {name: one for name, one in found.items() if int(str(one[2])) < newest}
        with contextlib.suppress(OSError, UserError):  # then they are hashed again next time
            write_text(memory, json.dumps(settled))
    return [str(found[name][-1]) for name in names]


def content_hash(file: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
