"""Golden cases on the CPU or, as L2D_GOLDEN_DEVICE says, on another device."""

from collections.abc import Iterator

import pytest
from golden_device import DEVICE


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with DEVICE:
        yield
