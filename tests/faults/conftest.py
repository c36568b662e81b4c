"""The helpers of tests/ are importable here as well; each module has a forkserver of its own."""

import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True, scope="module")
def _own_forkserver():
    """What one module has its jobs' server load, or not load, is not what another one finds."""
    yield
    forkserver._forkserver._stop()
