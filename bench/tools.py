"""What finding tool calls costs in the text of an answer: `python -m bench.tools`.

A replica turns tokens into text in one thread for all its streams, so CPU time for a token is what counts there. The same tokens go
through it without tools, and then with a parser of each format, as text without a call and as calls; one token at a time, as in a
stream. Beside it an engine answers with its text read so and so, in turns: tokens a second with tools offered and without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import models
from bench.harness import Row, Table, versions, write
from cluster.settings import EngineSettings
from cluster.types import Sampling, Tool, ToolChoice
from deployments.answer import Answer
from deployments.engine.local import LocalEngine
from deployments.engine.messages import Output, Request
from deployments.engine.tokenizer import Tokenizer
from deployments.tools.formats import ToolFormat
from deployments.tools.hermes import Hermes
from deployments.tools.llama import Llama
from deployments.tools.marks import Mark
from deployments.tools.mistral import Mistral

MODEL = "S"

FORMATS: dict[str, ToolFormat | None] = {
    "none": None,
    "hermes": ToolFormat("hermes", Hermes(Mark("<tool_call>"), Mark("</tool_call>")), {}),
    "llama": ToolFormat("llama", Llama(Mark("<|python_tag|>")), {}),
    "mistral": ToolFormat("mistral", Mistral(Mark("[TOOL_CALLS]"), Mark("[ARGS]"), Mark("[CALL_ID]"), "list"), {}),
}
TOOLS = (Tool("write_file"), Tool("search"))


@dataclass(frozen=True)
class Reading:
    """Medians over the rounds, in microseconds of CPU for a token."""

    format: str
    text: str
    tokens: int
    us: float


@dataclass(frozen=True)
class Serving:
    """An engine's tokens a second, medians over the rounds."""

    concurrency: int
    plain: float
    with_tools: float


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    directory = models.directory(MODEL)
    readings = read_all(Tokenizer.load(directory), options.tokens, options.rounds)
    served = [] if options.no_engine else serve(directory, options.concurrency, options.rounds)
    tables = [reading_table(readings)] + ([serving_table(served)] if served else [])
    for shown in tables:
        shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.tools", *sys.argv[1:]])
        more: dict[str, Any] = {"readings": [asdict(r) for r in readings], "serving": [asdict(s) for s in served]}
        print(write("tools", rows(readings, served), *tables, command=command, found=versions(["tokenizers", "torch"]), **more))


def read_all(tokenizer: Tokenizer, num_tokens: int, rounds: int) -> list[Reading]:
    """Every format on text and on calls, a round of all before the next."""
    cases = [(name, text) for text in ("text", "calls") for name in FORMATS]
    ids = {case: _cycled(tokenizer.encode(written(*case)), num_tokens) for case in cases}
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            times[case].append(cpu_us(tokenizer, ids[case], FORMATS[case[0]]))
    return [Reading(*case, num_tokens, statistics.median(times[case])) for case in cases]


def cpu_us(tokenizer: Tokenizer, ids: Sequence[int], tool_format: ToolFormat | None) -> float:
    """Of one answer of these tokens, for each of them."""
    answer, outputs = _answer(tokenizer, tool_format), [[Output(1, 0, token)] for token in ids]
    began = time.process_time()
    for output in outputs:
        answer.take(output)
    return (time.process_time() - began) * 1e6 / len(ids)


def written(tool_format: str, text: str) -> str:
    """Prose about code, or calls that write it, as models of that format do; without a format the same words."""
    prose = " ".join([models.__doc__ or "", __doc__ or ""]) * 4
    arguments = json.dumps({"path": "notes/today.md", "lines": [1, 2, 3], "text": prose, "append": True})
    if text == "text":
        return prose
    return {
        "hermes": f'<tool_call>\n{{"name": "write_file", "arguments": {arguments}}}\n</tool_call>\n',
        "llama": f'{{"name": "write_file", "parameters": {arguments}}}; ',
        "mistral": f'[TOOL_CALLS] [{{"name": "write_file", "arguments": {arguments}}}]',
        "none": arguments,
    }[tool_format]


def serve(directory: Path, concurrencies: Sequence[int], rounds: int) -> list[Serving]:
    """One engine whose text is read with Hermes' parser and without, in turns. Random weights call nothing."""
    tokenizer, measured = Tokenizer.load(directory), []
    with LocalEngine(directory, dtype="bfloat16", settings=EngineSettings(speculation=0)) as engine:
        answer_all(engine, tokenizer, 1, None)  # warm
        for concurrency in concurrencies:
            found: dict[str, list[float]] = {"none": [], "hermes": []}
            for name in ["none", "hermes"] * rounds:
                found[name].append(answer_all(engine, tokenizer, concurrency, FORMATS[name]))
            measured.append(Serving(concurrency, *(statistics.median(found[name]) for name in ("none", "hermes"))))
    return measured


def answer_all(engine: LocalEngine, tokenizer: Tokenizer, concurrency: int, tool_format: ToolFormat | None) -> float:
    """Tokens a second of `concurrency` answers of 128 tokens each."""
    answers = {number: _answer(tokenizer, tool_format) for number in range(concurrency)}
    for number in answers:
        sampling = Sampling(max_tokens=128, temperature=1.0, ignore_eos=True)
        engine.engine.add(Request(number, [number + 3] * 16, sampling, 128, [], seed=number))
    began, tokens = time.perf_counter(), 0
    while engine.engine.has_work:
        for output in engine.engine.step():
            answers[output.request_id].take([output])
            tokens += 1
    return tokens / (time.perf_counter() - began)


def _answer(tokenizer: Tokenizer, tool_format: ToolFormat | None) -> Answer:
    request = Request(1, [1], Sampling(), 1 << 20, [], 0)
    calls = [tool_format.stream(TOOLS, ToolChoice())] if tool_format else []
    return Answer(tokenizer, request, is_chat=True, stop_choice=lambda _: None, calls=calls)


def _cycled(ids: Sequence[int], count: int) -> list[int]:
    return list(itertools.islice(itertools.cycle(ids), count))


def rows(readings: Sequence[Reading], served: Sequence[Serving]) -> list[Row]:
    """Ours is with tools; the peer is ourselves without them, as other servers don't say what their parsers cost."""
    plain = {reading.text: reading.us for reading in readings if reading.format == "none"}
    less = [
        Row(
            f"{r.format}, {r.text}: us a token",
            1,
            1,
            round(r.us, 2),
            round(plain[r.text], 2),
            "no tools",
            round(plain[r.text] / r.us, 3),
        )
        for r in readings
        if r.format != "none"
    ]
    return less + [_served(s) for s in served]


def _served(served: Serving) -> Row:
    ratio = round(served.with_tools / served.plain, 3)
    return Row(f"{MODEL}: tokens/s", served.concurrency, 1, round(served.with_tools), round(served.plain), "no tools", ratio)


def reading_table(readings: Sequence[Reading]) -> Table:
    plain = {reading.text: reading.us for reading in readings if reading.format == "none"}
    lines = [[r.format, r.text, f"{r.us:.1f}", f"{r.us - plain[r.text]:.1f}"] for r in readings]
    return Table("CPU time of a token in the replica, in microseconds", ["format", "answer", "all", "of it for calls"], lines)


def serving_table(served: Sequence[Serving]) -> Table:
    lines = [[str(s.concurrency), f"{s.plain:.0f}", f"{s.with_tools:.0f}", f"{s.with_tools / s.plain:.2f}"] for s in served]
    return Table(f"Tokens a second, model {MODEL}, tp=1", ["concurrency", "no tools", "tools offered", "ratio"], lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.tools", description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000, help="of every reading")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--no-engine", action="store_true", help="read only")
    parser.add_argument("--dry-run", action="store_true", help="show the tables and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
