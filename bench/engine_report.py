"""What the engine benchmark makes of its measurements: claims, tables and plots. It measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench import bandwidth
from bench.harness import Plot, Row, Spread, Table, compare
from bench.measurement import Measurement, Run
from bench.models import MODELS

BOUND = "bandwidth bound"
HIGHER_IS_BETTER: dict[str, Callable[[Measurement], float]] = {
    "tokens_per_s": lambda m: m.tokens_per_s,
    "first_token": lambda m: 1 / m.first_token_s.p50,
    "gap_p99": lambda m: 1 / m.gap_s.p99,
    "memory": lambda m: 1 / m.peak_rss_bytes,
}


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Each of ours against the best peer at the same model and concurrency."""
    compared = []
    for own, peers in beside(measured):
        speeds = {m.engine: m.tokens_per_s for m in peers}
        compared.append(compare(own.tokens_per_s, speeds, model=own.model, concurrency=own.concurrency, tp=own.tp))
    return [row for row in compared if row is not None]


def ratios(measured: Sequence[Measurement]) -> list[dict[str, float | int | str]]:
    """Each of ours against every peer at the same work; more than 1: ours is better."""
    return [
        {"model": own.model, "concurrency": own.concurrency, "engine": own.engine, "peer": peer.engine}
        | {name: round(quality(own) / quality(peer), 3) for name, quality in HIGHER_IS_BETTER.items()}
        for own, peers in beside(measured)
        for peer in peers
    ]


def beside(measured: Sequence[Measurement]) -> Iterator[tuple[Measurement, list[Measurement]]]:
    """Each of ours with the others at the same work."""
    for own in (m for m in measured if m.ours):
        yield own, [m for m in measured if not m.ours and (m.model, m.concurrency) == (own.model, own.concurrency)]


def tables(run: Run) -> list[Table]:
    shown = [speed(run), latency(run.measurements), against(run.measurements)]
    return [table for table in [*shown, bounds(run)] if table.lines]


def speed(run: Run) -> Table:
    """Every measurement, with its share of the fastest at the same work and of the bound."""
    lines = []
    for m in _ordered(run.measurements):
        best = max(o.tokens_per_s for o in run.measurements if (o.model, o.concurrency) == (m.model, m.concurrency))
        most = bound(run, m.model, m.concurrency)
        shares = [f"{m.tokens_per_s / best:.2f}", f"{m.tokens_per_s / most:.0%}" if most else "-"]
        memory, load = f"{m.peak_rss_bytes / 2**30:.1f}", f"{m.load_s:.1f}"
        lines.append([m.model, str(m.concurrency), m.engine, f"{m.tokens_per_s:.0f}", *shares, memory, load])
    columns = ["model", "concurrency", "engine", "tokens/s", "of the best", "of the bound", "memory, GiB", "load, s"]
    return Table("Output tokens per second, bfloat16", columns, lines)


def latency(measured: Sequence[Measurement]) -> Table:
    """The same measurements as a caller feels them."""
    lines = []
    for m in _ordered(measured):
        first, between, gap = (
            " / ".join(_ms(value) for value in (s.p50, s.p95, s.p99)) for s in (m.first_token_s, m.per_token_s, m.gap_s)
        )
        lines.append([m.model, str(m.concurrency), m.engine, first, between, gap, _ms(m.gap_s.most)])
    columns = ["model", "concurrency", "engine", "first token, ms", "per token, ms", "gaps, ms", "longest gap, ms"]
    return Table("Latency: p50 / p95 / p99 over requests, and of the gaps between one's tokens", columns, lines)


def against(measured: Sequence[Measurement]) -> Table:
    """Ours over each of the others."""
    peers = list(dict.fromkeys(m.engine for m in measured if not m.ours))
    lines = []
    for own, others in beside(_ordered(measured)):
        cells = {
            m.engine: " / ".join(f"{HIGHER_IS_BETTER[name](own) / HIGHER_IS_BETTER[name](m):.2f}" for name in RATIOS)
            for m in others
        }
        lines.append([own.model, str(own.concurrency), own.engine, *(cells.get(peer, "-") for peer in peers)])
    title = "Ours over each of the others: tokens/s / first token, p50 / gaps, p99; more than 1 is better for us"
    return Table(title, ["model", "concurrency", "ours", *peers], lines if peers else [])


RATIOS = ("tokens_per_s", "first_token", "gap_p99")


def bounds(run: Run) -> Table:
    """What was read each second, and what that allows."""
    lines = []
    for model in (name for name in run.options["models"] if name in run.bandwidth):
        spec = MODELS[model]
        sizes = [f"{bandwidth.weight_bytes(spec) / 1e6:.0f}", f"{bandwidth.kv_bytes(spec) / 1e3:.1f}"]
        most = " / ".join(f"{bound(run, model, concurrency):.0f}" for concurrency in run.options["concurrency"])
        lines.append([model, *sizes, f"{run.bandwidth[model] / 1e9:.1f}", most])
    at = " / ".join(map(str, run.options["concurrency"]))
    columns = ["model", "weights read, MB", "KV of a token, kB", "bandwidth, GB/s", f"bound at {at}, tokens/s"]
    beyond = run.bandwidth.get(BEYOND, 0.0) / 1e9
    return Table(f"Bound by read bandwidth: {run.options['threads']} threads, {beyond:.1f} GB/s beyond the caches", columns, lines)


BEYOND = "beyond the caches"


def bound(run: Run, model: str, concurrency: int) -> float | None:
    """Tokens per second that the bandwidth allows; None where it wasn't measured."""
    if model not in run.bandwidth:
        return None
    mean_tokens = run.options["tokens"] * 1.5  # as many in as out
    return bandwidth.bound(MODELS[model], concurrency, mean_tokens, run.bandwidth[model])


def plots(run: Run) -> list[Plot]:
    """Of every model: throughput over concurrency, and the two latencies' percentiles at the highest concurrency."""
    return [plot for model in dict.fromkeys(m.model for m in run.measurements) for plot in _plots(run, model)]


def _plots(run: Run, model: str) -> Iterator[Plot]:
    measured = sorted((m for m in run.measurements if m.model == model), key=lambda m: m.concurrency)
    engines, highest = dict.fromkeys(m.engine for m in measured), max(m.concurrency for m in measured)
    speeds = {name: [(float(m.concurrency), m.tokens_per_s) for m in measured if m.engine == name] for name in engines}
    if model in run.bandwidth:
        speeds[BOUND] = [(float(c), bound(run, model, c) or 0.0) for c in sorted(run.options["concurrency"])]
    title = f"Model {model}: output tokens per second"
    yield Plot(f"{model}-tokens", title, "requests at once", "tokens/s", speeds, log_x=True, log_y=True, dashed=[BOUND])
    for name, what, spread in (
        ("first-token", "time to the first token", lambda m: m.first_token_s),
        ("per-token", "time per output token", lambda m: m.per_token_s),
    ):
        title = f"Model {model}, {highest} requests at once: {what}"
        series = {m.engine: percentiles(spread(m)) for m in measured if m.concurrency == highest}
        yield Plot(f"{model}-{name}", title, "percentile of requests", "ms", series)


def percentiles(spread: Spread) -> list[tuple[float, float]]:
    return [(50.0, spread.p50 * 1e3), (95.0, spread.p95 * 1e3), (99.0, spread.p99 * 1e3)]


def _ordered(measured: Sequence[Measurement]) -> list[Measurement]:
    """Model S first, then by concurrency, the fastest first."""
    return sorted(measured, key=lambda m: (m.model != "S", m.concurrency, -m.tokens_per_s))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"
