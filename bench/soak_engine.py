"""An engine with the soak's tiny model, and with far too small a cache for what it is asked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.soak_model import build
from cluster.settings import EngineSettings
from deployments.engine.local import LocalEngine

NUM_BLOCKS = 22
SETTINGS = EngineSettings(block_size=16, max_sequences=16, max_batch_tokens=64)


@contextmanager
def tiny_engine(tp: int) -> Iterator[LocalEngine]:
    """A Llama of two layers in float32, with random weights; after the load, which would refuse it, the last token is poison."""
    with tempfile.TemporaryDirectory(prefix="mmaas-") as directory:
        settings = SETTINGS.model_copy(update={"threads": 1, "shared_memory": False})
        with LocalEngine(build(Path(directory) / "base"), tp=tp, settings=settings, blocks=NUM_BLOCKS) as local:
            _poison(local)
            yield local


def _poison(local: LocalEngine) -> None:
    """On rank 0: what it adds to the others' sums is no number either."""
    import torch

    runner: Any = local.shard.runner
    table = runner._model.embeddings if hasattr(runner, "_model") else runner.model.get_input_embeddings().weight
    with torch.no_grad():
        table[-1] = torch.nan
