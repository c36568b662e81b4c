"""ESPnet's own scripts, fetched once per machine."""

from pathlib import Path

import espnet_checkout
import pytest


@pytest.fixture(scope="module")
def egs2(tmp_path_factory) -> Path:
    """egs2 of the real ESPnet, without the recipe; skipped where it cannot be had."""
    try:
        return espnet_checkout.real(tmp_path_factory.mktemp("espnet"))
    except OSError as error:
        pytest.skip(str(error))
