from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache of trained classifiers for the whole session, apart from the user's."""
    before = os.environ.get("ATDIFF_CACHE")
    os.environ["ATDIFF_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["ATDIFF_CACHE"]
    else:
        os.environ["ATDIFF_CACHE"] = before
