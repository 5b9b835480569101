"""The way into the decoder: a model may pass when every rank can run it and it gives the logits that the module itself gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deployments.engine.attention import KvCache
from deployments.engine.batch import Batch
from deployments.engine.native.build import NativeUnavailable, library
from deployments.engine.native.decoder import AllReduce, Decoder
from deployments.engine.native.description import Description, describe, recognise
from deployments.engine.native.meeting import Meeting
from deployments.engine.runner import TOLERANCE, Runner

BLOCKS = 4
"""What the probes write to."""
LANES = 16


class Disproved(NativeUnavailable):
    """The decoder gives other logits. The module's weights are gone by then: it must be loaded again."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The others that must agree. Alone by default."""

    rank: int = 0
    all_agree: Callable[[bool], bool] = bool
    wire: Meeting | AllReduce | None = None


def decoder_of(runner: Runner, *, num_blocks: int, max_positions: int, threads: int, cache: Path, ranks: Ranks) -> Decoder:
    """Take over a runner's model. The runner needs no check of its own: what two implementations agree on is paged right.

    Raises NativeUnavailable, with the model untouched, or Disproved.
    """
    block_size, own_cache = runner.cache.block_size, runner.cache
    refusal = _refusal(runner, num_blocks, cache)
    if not ranks.all_agree(refusal is None) or refusal:
        raise refusal or NativeUnavailable("another rank can't run the decoder")
    runner.cache = KvCache(BLOCKS, block_size)
    try:
        probes = list(_probes(_config(runner).vocab_size, block_size))
        expected = [runner.run(probe).float() for probe in probes]
        described: Description | NativeUnavailable = describe(runner.model, runner.cache.calls, ranks.rank, max_positions)
    except NativeUnavailable as error:
        described = error
    finally:
        runner.cache = own_cache
    if not ranks.all_agree(isinstance(described, Description)) or isinstance(described, NativeUnavailable):
        raise described if isinstance(described, NativeUnavailable) else NativeUnavailable("another rank can't run the decoder")
    tolerance = max(TOLERANCE[described.dtype], runner.slack)
    decoder = Decoder(
        described,
        num_blocks=num_blocks,
        block_size=block_size,
        threads=threads,
        cache=cache,
        rank=ranks.rank,
        wire=ranks.wire,
        handover=runner.handover,
    )
    difference = max(_difference(decoder.run(probe), logits) for probe, logits in zip(probes, expected, strict=True))
    if not ranks.all_agree(difference < tolerance):
        raise Disproved(f"the decoder gives other logits than transformers (relative error {difference:.2g})")
    return decoder


def _refusal(runner: Runner, num_blocks: int, cache: Path) -> NativeUnavailable | None:
    """Why this can't be, as far as it is known before anything runs."""
    block_size = runner.cache.block_size
    try:
        if block_size % LANES or num_blocks < BLOCKS:
            raise NativeUnavailable(f"the decoder needs {BLOCKS} or more blocks of a multiple of {LANES} tokens: engine.block_size")
        recognise(_config(runner))
        library(cache)
    except NativeUnavailable as error:
        return error
    return None


def _config(runner: Runner) -> Any:
    return runner.model.config.get_text_config()  # type: ignore[operator, union-attr]


def _probes(vocabulary: int, block_size: int) -> Iterator[Batch]:
    """Two sequences: both prompts at once, a token of each, then a token of one beside a chunk of the other."""
    tables = np.array([[3, 0, 0], [2, 1, 0]], np.int32)
    short, long = 5, block_size + 5
    yield _batch([0, 0], [short, long], tables, vocabulary)
    yield _batch([short, long], [1, 1], tables, vocabulary)
    yield _batch([short + 1, long + 1], [1, block_size + 3], tables, vocabulary)


def _batch(starts: list[int], counts: list[int], tables: np.ndarray[tuple[int, ...], np.dtype[np.int32]], vocabulary: int) -> Batch:
    tokens = np.concatenate(
        [np.arange(start, start + count) * (7 + row) + 1 for row, (start, count) in enumerate(zip(starts, counts, strict=True))]
    )
    return Batch(
        (tokens % vocabulary).astype(np.int32),
        np.array(starts, np.int32),
        np.array(counts, np.int32),
        np.arange(2, dtype=np.int32),
        tables,
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest, relative to the largest logit; NaN when a logit is."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
