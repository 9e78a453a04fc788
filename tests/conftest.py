"""Shared fixtures: where the real data lies, and the rule that a test uses few threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two cores are shared by the test process and its workers.
os.environ.setdefault("OMP_NUM_THREADS", "2")

_DATA = Path(
    os.environ.get("TILEPIPE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real slides; tests that need it are skipped where it is absent."""
    if not _DATA.is_dir():
        pytest.skip(f"no real data at {_DATA}; set TILEPIPE_DATA")
    return _DATA
