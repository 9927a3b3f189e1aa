"""What the workers of a study share: imported once, by the server that they are forked from."""

import gc
import sys

# The server is a `python -c`, which prefers what lies in the working directory, such as a `random.py`.
sys.path[:] = [folder for folder in sys.path if folder]

import atdiff.study.study  # noqa: E402, F401

gc.freeze()  # A collection writes to all that it looks at, and a worker would so have a copy of its own.
