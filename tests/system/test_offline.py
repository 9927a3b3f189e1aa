"""Nothing is asked of the network, at import or in the quickstart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Python runs a module of this name at its start, in the processes of a study too.
SPY = """
import os, socket
connect, find = socket.socket.connect, socket.getaddrinfo
def told(what):
    with open(os.environ["SPY_LOG"], "a") as file:
        file.write(f"{what}\\n")
    raise OSError("no network")
def connected(self, address):
    return connect(self, address) if self.family == socket.AF_UNIX else told(address)
socket.socket.connect = connected
socket.getaddrinfo = lambda host, *rest, **more: told(host)
"""
ALL = """
import importlib, pkgutil, atdiff
for module in pkgutil.walk_packages(atdiff.__path__, "atdiff."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_nothing_is_asked_of_the_network(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SPY)
    log = tmp_path / "log"
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SPY_LOG": str(log), "HF_HUB_OFFLINE": ""}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)

    spied = run("-c", "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert spied.returncode == 1
    assert log.read_text() == "127.0.0.1\n"  # the spy works
    log.unlink()
    imported = run("-c", ALL)
    assert imported.returncode == 0, imported.stderr
    smaller = ["--training.passes=10", "--study.seeds=[0]", "--study.num=40", "--study.steps=[5,10]", "--jobs=2"]
    done = run("-m", "atdiff", "study", "quickstart", "--out", str(tmp_path / "out"), *smaller)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").is_file()
    assert not log.exists(), log.read_text()
