"""The process keeps freed memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import sys
from atdiff.system.allocator import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
held = bytearray(b"x") * (64 << 20)
del held
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_kept() -> None:
    kept, given_back = (
        float(subprocess.run([sys.executable, "-c", CODE, word], check=True, capture_output=True, text=True).stdout)
        for word in ("keep", "leave")
    )
    assert kept > 60
    assert given_back < 4


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    from atdiff.system.allocator import keep_freed_memory

    def missing(name: None) -> None:
        raise TypeError("no library of the process")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    keep_freed_memory()
