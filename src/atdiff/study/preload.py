"""Imports shared by the workers of a study, loaded once in the fork server."""

import gc
import sys

# The server runs as `python -c`, so a file in the working directory, such as `random.py`, would shadow modules.
sys.path[:] = [folder for folder in sys.path if folder]

import atdiff.study.study  # noqa: E402, F401

gc.freeze()  # A collection writes to every object it visits, which would copy shared pages into each worker.
