"""The device of the tests in tests/gpu."""

import os

import pytest
import torch

VARIABLE = "ESPNET_KV_TEST_DEVICE"


def device_or_skip() -> torch.device:
    """The device of `make test-gpu`: cuda, or cpu to check that the tests run.

    Other runs skip the module and do not initialise CUDA, because their tests fork.
    """
    if VARIABLE not in os.environ:
        pytest.skip("for a GPU: make test-gpu", allow_module_level=True)
    return torch.device(os.environ[VARIABLE])
