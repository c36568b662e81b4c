"""Shared by all tests: seeds, threads, and poisoned memory that shows missing writes."""

import logging
import os
import random

# tensors here are tiny: on a busy machine a second thread makes them some 40 times slower; before
# torch is imported, for this process and for those that tests start
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no process is left with the longest of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeds():
    """Make module weights and dropout reproducible in any order of tests."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_level():
    """Commands set the level of the root logger; the next test finds it as it was."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture
def rng() -> torch.Generator:
    """A random generator for one test."""
    return torch.Generator().manual_seed(1)


@pytest.fixture
def poisoned_memory():
    """Uninitialised tensors (torch.empty etc.) hold NaN, integers their maximum."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """The report of `reports.make_report`."""
    from reports import make_report

    return make_report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """`exports.exported` in a folder of its own; each model is exported once."""
    from exports import exported

    made = {}

    def export(encoder="kv_conformer", attention="mla", **options):
        key = (encoder, attention, *options.items())
        if key not in made:
            torch.manual_seed(0)
            made[key] = exported(tmp_path_factory.mktemp(attention), encoder, attention, **options)
        return made[key]

    return export
