"""Each module of these tests has a forkserver of its own."""

from multiprocessing import forkserver

import pytest


@pytest.fixture(autouse=True, scope="module")
def _own_forkserver():
    """What one module has its jobs' server load, or not load, is not what another one finds."""
    yield
    forkserver._forkserver._stop()
