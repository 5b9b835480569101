"""Which ways of spreading a model over machines fit, what each rank needs, and which one to take. Pure: numbers in, numbers out.

Stages come into it where tensor parts alone don't do: they are as even as the engine cuts them (`stages.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from cluster.errors import ModelNotServable
from cluster.machines import Machine
from deployments.engine.census import Census
from deployments.engine.census import stages as runs
from deployments.engine.checkpoint import DTYPE_BYTES, check_shape, check_stages

HEADROOM = 0.9
"""Of a rank's memory, what may be planned: the rest is for the runtime, fragments and what else the node does."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the model is to do at once."""

    dtype: str
    max_model_len: int
    sequences: int
    batch_tokens: int  # of one step
    quantization: str | None = None  # of weights

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """One way, with bytes of the rank that needs most."""

    tp: int
    pp: int
    nodes: int
    ranks_per_node: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    room_bytes: int  # of a rank, headroom taken off
    replicas: int  # copies of the model that the machines hold

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    @property
    def rank_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def crosses_nodes(self) -> bool:
        """Whether the ranks of one layer, which talk most, are on several nodes."""
        return self.tp > self.ranks_per_node


@dataclass(frozen=True, slots=True)
class Plan:
    """`fits` in order of preference. `refused` says why, by number of tensor ranks; `closest` is the one that lacks least."""

    fits: tuple[Layout, ...]
    refused: Mapping[int, str]
    closest: Layout | None
    reason: str


def plan(
    census: Census,
    config: Mapping[str, object],
    machines: Sequence[Machine],
    load: Load,
    *,
    tp: int | None = None,
    pp: int | None = None,
) -> Plan:
    """Every layout on these machines, or only those with `tp` and `pp`. `config`, the model's config.json, is what refusals quote.

    Stages that shorten no rank's run of layers are left out, and so are those whose shards would be torn over nodes, and, for GPUs,
    nodes beyond those that the ranks fill. Raises ModelNotServable when the model can't be cut into `pp` stages.
    """
    if pp:
        check_stages(config, pp)
    total = sum(machine.ranks for machine in machines)
    refused: dict[int, str] = {}
    layouts: list[Layout] = []
    for size in [tp] if tp else _sizes(census, total):
        try:
            check_shape(config, size)
        except ModelNotServable as error:
            refused[size] = error.message
            continue
        found = _layouts(census, machines, load, size, pp or (None if _has_stages(config) else 1))
        layouts += [layout for layout in found if layout.pp == 1 or not layout.crosses_nodes]
    fits = sorted((layout for layout in layouts if layout.rank_bytes <= layout.room_bytes), key=_preference)
    closest = min(layouts, key=lambda layout: layout.rank_bytes / max(1, layout.room_bytes), default=None)
    return Plan(tuple(fits), refused, closest, _reason(fits[0]) if fits else _lack(closest, total, load))


def weight_bytes(census: Census, load: Load, tp: int, pp: int) -> int:
    """Of the rank that holds most: the first stage has the embeddings, the last the output."""
    return max(rank_sizes(census, tp, pp, load.element_bytes, quantized=load.quantization is not None).values())


def kv_bytes(census: Census, load: Load, tp: int, pp: int) -> int:
    """Keys and values of all tokens at once, in the longest stage."""
    per_token = 2 * _longest_stage(census, pp) * (census.num_kv_heads // tp) * census.head_dim * load.element_bytes
    return per_token * load.max_model_len * load.sequences


def activation_bytes(census: Census, load: Load, tp: int) -> int:
    """An upper bound of what one step holds at its widest point.

    All the time: the stream (its beginning, before and behind a block, normalised), rotary angles, the mask of a prompt's chunk,
    and the logits, also in 32 bits. Beside them the larger of the attention (queries and keys while they are rotated, values,
    answers, one layer's cache read back) and the feed-forward layer.
    """
    tokens, size, heads, kv_heads = load.batch_tokens, load.element_bytes, census.num_heads // tp, census.num_kv_heads // tp
    stream = tokens * (4 * census.hidden_size + 2 * census.head_dim) * size
    mask = tokens * load.max_model_len
    read_back = 2 * load.sequences * load.max_model_len * kv_heads * census.head_dim * size
    attention = tokens * (4 * heads + 4 * kv_heads) * census.head_dim * size + max(mask, read_back)
    feed_forward = 3 * tokens * (census.feed_forward // (1 if census.expert_parameters else tp)) * size
    logits = load.sequences * census.vocab_size * (size + 4)
    return stream + mask * size + max(attention, feed_forward) + logits


def _layouts(census: Census, machines: Sequence[Machine], load: Load, tp: int, pp: int | None) -> Iterator[Layout]:
    total = sum(machine.ranks for machine in machines)
    for stages in [pp] if pp else _stages(census.num_layers, total // tp):
        for nodes in _nodes(machines, tp, tp * stages):
            per_node = tp * stages // nodes
            room = sorted((int(machine.room(per_node) * HEADROOM) for machine in machines), reverse=True)[nodes - 1]
            parts = weight_bytes(census, load, tp, stages), kv_bytes(census, load, tp, stages), activation_bytes(census, load, tp)
            groups = sum(_groups(machine, per_node, sum(parts)) for machine in machines)
            yield Layout(tp, stages, nodes, per_node, *parts, room, groups // nodes)


def _has_stages(config: Mapping[str, object]) -> bool:
    try:
        check_stages(config, 2)
    except ModelNotServable:
        return False
    return True


def _groups(machine: Machine, ranks: int, rank_bytes: int) -> int:
    """How often so many ranks fit on the machine."""
    slots = machine.ranks // ranks
    return min(slots, int(machine.memory_bytes * HEADROOM) // (ranks * rank_bytes)) if machine.shared else slots


def _nodes(machines: Sequence[Machine], tp: int, ranks: int) -> list[int]:
    """Numbers of nodes that take an equal share of the ranks, without a tensor group's being torn unevenly."""
    found = []
    for nodes in range(1, len(machines) + 1):
        share = ranks // nodes
        whole = ranks % nodes == 0 and (share % tp == 0 or tp % share == 0)
        if whole and sum(machine.ranks >= share for machine in machines) >= nodes:
            found.append(nodes)
    return found if machines and machines[0].shared else found[:1]


def _sizes(census: Census, total: int) -> list[int]:
    """Powers of two, and what divides the heads of keys and values."""
    return [size for size in range(1, total + 1) if size & (size - 1) == 0 or census.num_kv_heads % size == 0]


def _stages(num_layers: int, most: int) -> list[int]:
    found: dict[int, int] = {}
    for stages in range(1, min(num_layers, most) + 1):
        found.setdefault(-(-num_layers // stages), stages)
    return list(found.values())


def _longest_stage(census: Census, pp: int) -> int:
    return max(map(len, runs(census.parameters, pp)))


@cache
def rank_sizes(census: Census, tp: int, pp: int, element_bytes: int, *, quantized: bool = False) -> Mapping[tuple[int, int], int]:
    """Bytes of the weights of ranks, by stage and tensor part. Only of a stage's first part, which gets what doesn't go up
    evenly, and of its last, which gets what is left of a grain."""
    stage_of = {layer: stage for stage, run in enumerate(runs(census.parameters, pp)) for layer in run}
    totals: dict[tuple[int, int], int] = {}
    for parameter in census.parameters:
        outer = 0 if parameter.before else pp - 1
        stage = outer if parameter.layer is None else stage_of[parameter.layer]
        if parameter.tied and pp > 1:  # the last stage needs its own
            parameter = replace(parameter, tied=False)
        for part in {0, tp - 1}:
            held = census.size_on(parameter, part, tp)
            taken = held + 4 * parameter.shape[0] if quantized and parameter.is_quantized else held * element_bytes  # and scales
            totals[stage, part] = totals.get((stage, part), 0) + taken
    return totals


def _preference(layout: Layout) -> tuple[bool, int, int, int]:
    return layout.crosses_nodes, layout.pp, layout.ranks, layout.nodes


def _reason(best: Layout) -> str:
    """Why the first is the first."""
    parts = [f"the fewest ranks that fit ({best.ranks})"] if best.ranks > 1 else ["it fits one rank"]
    if best.pp == 1:
        parts.append("no pipeline, so every rank works on every token")
    if best.tp > 1:
        parts.append("a layer's ranks are on several nodes" if best.crosses_nodes else "a layer's ranks share a node")
    if best.replicas > 1:
        parts.append(f"room for {best.replicas} replicas")
    return "; ".join(parts)


def _lack(closest: Layout | None, total: int, load: Load) -> str:
    if closest is None:
        return f"no layout of {total} ranks is possible"
    if closest.room_bytes == 0:
        return f"the machines have {total} ranks, which is too few"
    largest = max(
        (closest.weight_bytes, "weights: more or larger ranks, or 16 bits, would help"),
        (closest.kv_bytes, f"keys and values of {load.sequences} x {load.max_model_len} tokens: ask for fewer or shorter ones"),
        (closest.activation_bytes, "the step itself: shorter texts would help"),
    )
    return f"nothing fits; the closest needs {closest.rank_bytes / closest.room_bytes:.1f}x its room, most of it {largest[1]}"
