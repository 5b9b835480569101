"""Everything here needs a CUDA device, and says so where there is none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True)
def _returns_its_memory() -> Iterator[None]:
    """What a test leaves on the GPU is none of the next one's."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
