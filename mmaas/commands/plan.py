"""`mmaas plan`: what a model needs on which machines, before anything is downloaded or started."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.machines import Machine
    from cluster.settings import Settings
    from deployments.engine.census import Census
    from deployments.engine.layouts import Load, Plan

SHOWN = 12
USUAL_LENGTH = 8192


def add_to(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    model: Annotated[str, typer.Argument(help="Directory or config.json of a model (no weights needed), or models:/NAME@ALIAS.")],
    tp: Annotated[int | None, typer.Option(min=1, help="Only layouts with so many tensor ranks.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Only layouts with so many pipeline stages.")] = None,
    nodes: Annotated[int, typer.Option(min=1, max=10_000, help="Nodes with GPUs to plan for; needs --memory.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, max=64, help="GPUs of each.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option("--memory", "--memory-per-gpu", help="Memory of one GPU, like 80GiB. Without: the cluster or machine."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    quantization: Annotated[str | None, typer.Option(help="Weights in eight bits: int8, or fp8 on GPUs.")] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", min=1, help=f"Tokens of a sequence; else the model's own, {USUAL_LENGTH} at most."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of full length at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON for programs.")] = False,
) -> None:
    """Weights, KV cache and activations of each rank for every (tensor x pipeline x nodes) layout that fits; the best one first.

    Exit status 1 when none fits."""
    from cluster import settings
    from cluster.desired import checked_quantization
    from cluster.errors import ModelNotServable
    from deployments.engine import census, layouts
    from deployments.engine.checkpoint import DTYPE_BYTES
    from deployments.engine.device import multiplies
    from deployments.engine.model_config import read_json
    from mmaas.output import write_json

    if dtype not in DTYPE_BYTES:
        raise ModelNotServable(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype!r:.40}", param="dtype")
    loaded, kind = settings.load(), checked_quantization(quantization)
    multiplies(kind, "cuda" if memory else loaded.engine.device)
    path = _path(model, loaded)
    found = census.take(path)
    if kind and found.expert_parameters:
        raise ModelNotServable(f"{found.model_type} can't be quantised: its experts are no linear modules", param="quantization")
    length = max_model_len or min(found.max_model_len, USUAL_LENGTH)
    load = layouts.Load(dtype, length, sequences, loaded.engine.max_batch_tokens, kind)
    where, machines = _machines(loaded, nodes, gpus_per_node, memory)
    config = read_json(path / "config.json" if path.is_dir() else path)
    made = layouts.plan(found, config, machines, load, tp=tp, pp=pp)
    if as_json:
        write_json(_as_json(found, load, machines, made))
    else:
        _print(model, found, load, where, made)
    if not made.fits:
        raise typer.Exit(1)


def _path(model: str, settings: Settings) -> Path:
    from cluster.errors import InvalidRequest

    if model.startswith("models:"):
        from cluster.library.registry import Registry
        from cluster.storage import Storage
        from cluster.types import ModelRef

        try:
            reference = ModelRef.parse(model)
        except ValueError as error:
            raise InvalidRequest(str(error), param="model") from None
        return Path(Registry(settings.mlflow_uri, Storage(settings.home / "library")).resolve(reference).path)
    path = Path(model).expanduser().absolute()
    if not path.exists():
        raise InvalidRequest(f"{model} is not here; give a directory, a config.json or models:/NAME@ALIAS", param="model")
    return path


def _machines(settings: Settings, nodes: int, gpus: int, memory: str | None) -> tuple[str, list[Machine]]:
    """What to plan for, and how to name it: what was described, else the running cluster, else this machine."""
    from cluster import machines
    from cluster.dashboard import Dashboard
    from cluster.errors import InvalidRequest, Unavailable

    if memory:
        named = f"{nodes} node{'s' * (nodes > 1)} with {gpus} GPU{'s' * (gpus > 1)} of {memory}"
        return named, machines.described(nodes, gpus, machines.parse_bytes(memory))
    if nodes > 1 or gpus > 1:
        raise InvalidRequest("--nodes and --gpus-per-node need --memory, one GPU's", param="memory")
    try:
        found = machines.of_cluster(Dashboard(settings))
        if found:
            return f"the running cluster ({len(found)} node{'s' * (len(found) > 1)}, CPUs)", found
    except (Unavailable, OSError):
        pass  # none runs; looking needs none
    here = machines.this_machine()
    return f"this machine ({here.ranks} cores, {_gib(here.memory_bytes)})", [here]


def _as_json(census: Census, load: Load, machines: list[Machine], plan: Plan) -> dict[str, Any]:
    layouts = [asdict(layout) | {"rank_bytes": layout.rank_bytes} for layout in plan.fits]
    return {
        "model": {"type": census.model_type, "parameters": census.num_parameters, "layers": census.num_layers},
        "load": asdict(load),
        "machines": [asdict(machine) for machine in machines],
        "layouts": layouts,
        "reason": plan.reason,
        "refused": {str(tp): why for tp, why in plan.refused.items()},
    }


def _print(model: str, census: Census, load: Load, where: str, plan: Plan) -> None:
    from rich.text import Text

    from mmaas.output import console

    out = console()
    experts = f", {census.expert_parameters / 1e9:.1f} of them in experts" if census.expert_parameters else ""
    out.print(Text(f"{model}: {census.model_type}, {census.num_parameters / 1e9:.2f} billion parameters{experts}"), soft_wrap=True)
    kind = f"{load.dtype} with {load.quantization} weights" if load.quantization else load.dtype
    out.print(Text(f"{kind}, {load.sequences} sequences of {load.max_model_len} tokens, on {where}"), soft_wrap=True)
    if plan.fits:
        out.print(_table(plan))
    out.print(Text(f"{'best' if plan.fits else 'none'}: {plan.reason}", "green" if plan.fits else "red"), soft_wrap=True)
    for remark in _remarks(census, plan):
        out.print(Text(remark), soft_wrap=True)


def _table(plan: Plan) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "tensor", "stages", "nodes", "weights", "KV", "step", "a rank", "of", "copies"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, layout in enumerate(plan.fits[:SHOWN]):
        sizes = (layout.weight_bytes, layout.kv_bytes, layout.activation_bytes, layout.rank_bytes, layout.room_bytes)
        counts = map(str, (layout.tp, layout.pp, layout.nodes))
        style = "green" if number == 0 else None
        table.add_row("best" if number == 0 else "", *counts, *map(_gib, sizes), str(layout.replicas), style=style)
    return table


def _remarks(census: Census, plan: Plan) -> list[str]:
    remarks = []
    if plan.fits:
        remarks.append("sizes are of the rank that needs most; step: the activations of one step")
    if (more := len(plan.fits) - SHOWN) > 0:
        remarks.append(f"{more} more layouts fit; --json has all")
    for why in dict.fromkeys(plan.refused.values()):
        remarks.append(f"not tensor {', '.join(str(tp) for tp, text in plan.refused.items() if text == why)}: {why}")
    if census.expert_parameters and any(layout.tp > 1 for layout in plan.fits):
        remarks.append("AutoTP leaves experts whole on every rank: more tensor ranks save little, pipeline stages do")
    return remarks


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f}GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f}MiB"
