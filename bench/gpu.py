"""One GPU: tokens a second and how near the chip's own limits that is, `python -m bench.gpu`. No model is fetched.

Random weights in the geometry of real models are made on the device. What is measured is the engine's own loop around them:
schedule, run, sample greedily, deliver. A model that doesn't fit is measured with fewer layers, twice, and the time of the missing
ones added: what a GPU with more memory of the same speed would do. Results are written after each case, so a run that is cut
leaves what it had. The limits are measured in the same run: a large copy and a large matrix product.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness import HERE, Row, Table, compare, versions, write
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.engine import Engine
from deployments.engine.messages import Request

if TYPE_CHECKING:
    import torch

LLAMA = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {
    "0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
    "8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": LLAMA | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Geometries of Qwen2.5-0.5B, Llama-3-8B and Llama-3-70B, outputs not tied."""
PROMPT, NEW = 512, 40
LONG = 4096
SECONDS = 440.0
"""After so long no case is begun."""
SHARE_FOR_WEIGHTS = 0.7
"""Of the free memory: the rest is for the cache and the largest step."""


@dataclass(frozen=True)
class Limits:
    """Of the chip, as measured: bytes and floating-point operations a second."""

    bandwidth: float
    matrix: float


@dataclass(frozen=True)
class Weights:
    """What one decode step reads, and computes for a token: the embeddings are looked up, not multiplied."""

    step_bytes: int
    token_flops: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Case:
    """What the engine did. `bound` is the time that the chip's limit allows, over the time taken."""

    model: str
    layers: int
    of_layers: int
    sequences: int
    graphs: bool
    tokens_per_s: float
    step_ms: float
    bound: float
    peers: dict[str, float]


@dataclass(frozen=True)
class Prompts:
    """Reading prompts, one at a time."""

    model: str
    layers: int
    tokens_per_s: float
    first_token_ms: float  # of a prompt of PROMPT tokens
    bound: float


def engine(run: Any, blocks: int, settings: EngineSettings) -> Engine:
    return Engine.of(run, blocks, settings.model_copy(update={"speculation": 0, "prefix_cache": False, "step_target_ms": 0.0}))


def decode(made: Engine, sequences: int, vocabulary: int, prompt: int, new: int) -> float:
    """Median seconds of a step in which every sequence decodes."""
    _add(made, sequences, prompt, new, vocabulary)
    times = []
    while made.has_work:
        began = time.perf_counter()
        outputs = made.step()
        if len(outputs) == sequences and made.scheduler.num_decoders == sequences:
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def first_token(made: Engine, prompt: int, vocabulary: int, times: int = 5) -> float:
    """Median seconds from a lone prompt to its first token."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        _add(made, 1, prompt, 1, vocabulary)
        while made.has_work:
            made.step()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def _add(made: Engine, count: int, prompt: int, new: int, vocabulary: int) -> None:
    for number in range(count):
        tokens = [(7 * place + 13 * number + 1) % vocabulary for place in range(prompt)]
        made.add(Request(number, tokens, Sampling(temperature=0.0), new, [], seed=0))


def weights_of(spec: dict[str, Any], itemsize: int = 2) -> Weights:
    """From the geometry alone: attention, gated feed-forward, output."""
    hidden, heads, kv = spec["hidden_size"], spec["num_attention_heads"], spec["num_key_value_heads"]
    head = hidden // heads
    layer = hidden * head * (2 * heads + 2 * kv) + 3 * hidden * spec["intermediate_size"]
    total = spec["num_hidden_layers"] * layer + hidden * spec["vocab_size"]
    return Weights(total * itemsize, 2 * total, 2 * spec["num_hidden_layers"] * kv * head * itemsize)


def decode_bound_s(weights: Weights, sequences: int, context: int, limits: Limits) -> float:
    """The later of reading weights and cache, and of multiplying."""
    read = weights.step_bytes + sequences * context * weights.kv_bytes_per_token
    return max(read / limits.bandwidth, sequences * weights.token_flops / limits.matrix)


def layers_that_fit(spec: dict[str, Any], free: int, itemsize: int = 2) -> int:
    """All, or as many as leave room for the cache."""
    none, one = (weights_of(spec | {"num_hidden_layers": layers}, itemsize).step_bytes for layers in (0, 1))
    ends = 2 * spec["hidden_size"] * spec["vocab_size"] * itemsize
    return max(2, min(spec["num_hidden_layers"], int((free * SHARE_FOR_WEIGHTS - ends) // (one - none))))


def extrapolated(few: float, many: float, layers: tuple[int, int], wanted: int) -> float:
    """Seconds with `wanted` layers, from those with two smaller numbers of them: a straight line."""
    return many + (wanted - layers[1]) * (many - few) / (layers[1] - layers[0])


def measured_limits(device: torch.device, size: int = 8192, copied: int = 1 << 30) -> Limits:
    """Random numbers: zeros are faster."""
    import torch

    source = torch.randint(0, 127, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / _seconds(lambda: target.copy_(source), device)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Limits(bandwidth, 2 * size**3 / _seconds(lambda: left @ right, device))


def _seconds(work: Callable[[], Any], device: torch.device, times: int = 10) -> float:
    from deployments.engine.gpu.runner import synchronise

    found = []
    for _ in range(times + 2):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])


def build(spec: dict[str, Any], device: torch.device) -> Any:
    """The module on the device, its weights drawn there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from deployments.engine import attention

    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**spec, tie_word_embeddings=False)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    return model.eval()


@contextmanager
def runner(model: Any, spec: dict[str, Any], device: torch.device, settings: EngineSettings) -> Iterator[tuple[Any, int]]:
    """As a shard has it, and its number of blocks; afterwards the cache's memory is free again."""
    import torch

    from deployments.engine.checkpoint import ModelInfo
    from deployments.engine.gpu.build import gpu_runner
    from deployments.engine.rendezvous import Rendezvous
    from deployments.engine.shard_spec import ShardSpec

    hidden, heads, parameters = spec["hidden_size"], spec["num_attention_heads"], sum(p.numel() for p in model.parameters())
    sizes = (spec["num_hidden_layers"], hidden, heads, spec["num_key_value_heads"], hidden // heads, spec["vocab_size"])
    length = spec["max_position_embeddings"]
    info = ModelInfo(spec["model_type"], type(model).__name__, *sizes, length, parameters, 2 * parameters, "bfloat16")
    made, blocks = gpu_runner(model, ShardSpec(Path("random"), info, 1, 1, settings, Rendezvous("", 0, 1, 60)), device, None)
    try:
        yield made, blocks
    finally:
        made.close()
        getattr(made, "runner", made).resize(1)
        gc.collect()
        torch.cuda.empty_cache()


def peers(model: Any, sequences: int, vocabulary: int, *, compiled: bool) -> dict[str, float]:
    """Tokens a second of `transformers.generate` with a static cache over the same weights, prompts left out."""
    import torch

    from deployments.engine import attention

    model.set_attn_implementation("sdpa")
    tokens = torch.randint(1, vocabulary, (sequences, PROMPT), device=model.device)

    def seconds(new: int, eager: bool) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        options = {"do_sample": False, "cache_implementation": "static", "disable_compile": eager, "pad_token_id": 0}
        model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    found = {}
    try:
        for name, eager in [("transformers", True)] + [("transformers, compiled", False)] * compiled:
            for new in (2, NEW + 2):  # kernels are loaded, or compiled, before the clock counts
                seconds(new, eager)
            found[name] = sequences * NEW / (seconds(NEW + 2, eager) - seconds(2, eager))
    except (RuntimeError, ValueError, TypeError) as error:
        print(f"transformers.generate left out: {error!r:.200}", flush=True)
    finally:
        model.set_attn_implementation(attention.NAME)
    return found


@dataclass
class Run:
    """What is there so far."""

    limits: Limits
    gpu: dict[str, Any]
    command: str
    here: Path
    cases: list[Case]
    prompts: list[Prompts]

    def write(self) -> None:
        rows = [_row(case) for case in self.cases]
        more = {
            "gpu": self.gpu | asdict(self.limits),
            "cases": list(map(asdict, self.cases)),
            "prompts": list(map(asdict, self.prompts)),
        }
        found = versions(["torch", "triton", "transformers", "deepspeed"])
        write("gpu", rows, *tables(self), command=self.command, found=found, here=self.here, **more)


def _row(case: Case) -> Row:
    named = f"{case.model}{'' if case.graphs else ' without graphs'}"
    row = compare(case.tokens_per_s, case.peers, model=named, concurrency=case.sequences, tp=1)
    return row or Row(named, case.sequences, 1, round(case.tokens_per_s, 3), None, None, None)


def tables(run: Run) -> list[Table]:
    where = f"{run.gpu['name']}: {run.limits.bandwidth / 1e12:.2f} TB/s copied, {run.limits.matrix / 1e12:.0f} TFLOP/s multiplied"
    lines = [
        (
            *(_layers(case.model, case.layers, case.of_layers), str(case.sequences), "yes" if case.graphs else "no"),
            *(f"{case.tokens_per_s:,.0f}", f"{case.step_ms:.2f}", f"{100 * case.bound:.0f}%"),
            ", ".join(f"{name} {speed:,.0f}" for name, speed in case.peers.items()),
        )
        for case in run.cases
    ]
    columns = ["model", "sequences", "graphs", "tokens/s", "ms a step", "of the limit", "others, tokens/s"]
    read = [
        (found.model, f"{found.tokens_per_s:,.0f}", f"{found.first_token_ms:.1f}", f"{100 * found.bound:.0f}%")
        for found in run.prompts
    ]
    names = ["model", f"prompt tokens/s at {LONG}", f"ms to the first token of {PROMPT}", "of the limit"]
    return [Table(f"Decoding, contexts of {PROMPT} tokens. {where}", columns, lines), Table("Prompts, one at a time", names, read)]


def _layers(model: str, layers: int, of: int) -> str:
    return model if layers == of else f"{model} ({layers} of {of} layers measured)"


def measure(run: Run, name: str, counts: Sequence[int], device: torch.device, left: Callable[[], float]) -> None:
    """All cases of a model. Where not all of its layers fit: also with half of those that do, and without peers."""
    import torch

    whole = MODELS[name]
    free = torch.cuda.mem_get_info(device)[0]
    fit = layers_that_fit(whole, free)
    partial = fit < whole["num_hidden_layers"]
    steps: dict[int, dict[int, float]] = {}
    for layers in (fit // 2, fit) if partial else (fit,):
        spec = whole | {"num_hidden_layers": layers}
        model = build(spec, device)
        for graphs in (True,) if partial else (True, False):
            if left() > 0:
                steps[layers] = _decode_all(
                    run, name, model, spec, counts if graphs else [counts[0], counts[-1]], graphs, steps, left
                )
                run.write()
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _decode_all(
    run: Run,
    name: str,
    model: Any,
    spec: dict[str, Any],
    counts: Sequence[int],
    graphs: bool,
    earlier: dict[int, dict[int, float]],
    left: Callable[[], float],
) -> dict[int, float]:
    """Seconds of a step by number of sequences; cases go into the run, extrapolated if fewer layers were measured before."""
    device, vocabulary, whole = next(model.parameters()).device, spec["vocab_size"], MODELS[name]
    settings = EngineSettings(max_sequences=max(counts), max_batch_tokens=LONG, cuda_graphs=graphs)
    found: dict[int, float] = {}
    layers, all_layers = spec["num_hidden_layers"], whole["num_hidden_layers"]
    is_first_part = layers < all_layers and not earlier
    with runner(model, spec, device, settings) as (made, blocks):
        loop = engine(made.run, blocks, settings)
        for count in counts:
            if left() <= 0 or blocks * settings.block_size < count * (PROMPT + NEW + settings.block_size):
                break
            found[count] = decode(loop, count, vocabulary, PROMPT, NEW)
            if is_first_part:
                continue
            seconds = found[count]
            if layers < all_layers:
                ((few, times),) = earlier.items()
                seconds = extrapolated(times[count], seconds, (few, layers), all_layers)
            bound = decode_bound_s(weights_of(whole), count, PROMPT + NEW // 2, run.limits) / seconds
            run.cases.append(Case(name, layers, all_layers, count, graphs, count / seconds, 1e3 * seconds, bound, {}))
            run.write()
        if graphs and layers == all_layers:
            run.prompts.append(_prompts(run, name, loop, spec))
    if graphs and layers == all_layers:
        _beside(run, model, vocabulary, left)
    return found


def _prompts(run: Run, name: str, loop: Engine, spec: dict[str, Any]) -> Prompts:
    long, short = (first_token(loop, length, spec["vocab_size"]) for length in (LONG, PROMPT))
    bound = LONG * weights_of(spec).token_flops / run.limits.matrix / long
    return Prompts(name, spec["num_hidden_layers"], LONG / long, 1e3 * short, bound)


def _beside(run: Run, model: Any, vocabulary: int, left: Callable[[], float]) -> None:
    """Adds the peers to this model's last cases, fewest sequences first, as time allows."""
    name = run.cases[-1].model
    for place, case in enumerate(run.cases):
        if case.model == name and case.graphs and left() > 60:
            run.cases[place] = replace(
                case, peers=peers(model, case.sequences, vocabulary, compiled=left() > 240 and case.sequences == 1)
            )
            run.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no case is begun")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of README.md and results/")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA device, and torch sees none")
    device, began = torch.device("cuda:0"), time.monotonic()
    properties = torch.cuda.get_device_properties(device)
    gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "processors": properties.multi_processor_count}
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "README.md").exists():
        (options.out / "README.md").write_text("<!-- gpu: start -->\n<!-- gpu: end -->\n")
    command = shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]])
    run = Run(measured_limits(device), gpu, command, options.out, [], [])
    run.write()
    for name in options.models:
        measure(run, name, sorted(options.sequences), device, lambda: options.seconds - (time.monotonic() - began))
        print(f"{name} after {time.monotonic() - began:.0f} s", flush=True)
    for table in tables(run):
        table.show()


if __name__ == "__main__":
    main()
