"""What a model weighs, counted from config.json alone: its parameters one by one, how AutoTP would cut each, its keys and values.

The model is built on the meta device, so hundreds of billions of parameters take seconds and no memory. That the cuts are
DeepSpeed's is a test's business (`tests/deployments/engine/test_census.py`); here no DeepSpeed is loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ModelNotServable
from deployments.engine.checkpoint import check_shape, kv_heads
from deployments.engine.model_config import context_length, positive, read_json
from deployments.engine.stages import split

if TYPE_CHECKING:
    from torch import nn

GRAIN = 64
"""DeepSpeed deals out the columns of feed-forward layers and of the output by so many."""
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")
_ROWS = {"o_proj", "out_proj", "down_proj", "dense", "fc2", "dense_4h_to_h", "c_proj", "lm_head", "embed_out"}
_ROUTERS = {"gate", "shared_expert_gate", "router"}
_HEADS = {"lm_head", "embed_out"}
_BY_GRAIN = ("mlp", "gate_proj", "up_proj", "down_proj")
_ENTRANCES = {"project_in"}

Kind = Literal["whole", "column", "row"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter. `layer` None: `before` or behind the layers. `tied`: the same tensor as another one, until AutoTP cuts it or
    they are in different stages."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    kind: Kind
    tied: bool
    before: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        """Whether it takes eight bits where weights do: the matrices of linear modules in layers (`quantized_linear.py`)."""
        return self.layer is not None and self.kind != "whole" and len(self.shape) == 2


@dataclass(frozen=True, slots=True)
class Census:
    """A model that could be served, and what it takes."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    feed_forward: int  # width, times the experts that one token sees
    max_model_len: int
    parameters: tuple[Parameter, ...]

    @property
    def num_parameters(self) -> int:
        """Tied ones once."""
        return sum(parameter.size for parameter in self.parameters if not parameter.tied)

    @property
    def expert_parameters(self) -> int:
        """Of these, in experts."""
        return sum(parameter.size for parameter in self.parameters if ".experts." in parameter.name)

    def size_on(self, parameter: Parameter, rank: int, tp: int) -> int:
        """Elements that a rank holds. A tied output is a tensor of its own where it is cut."""
        if parameter.kind == "whole" or tp == 1:
            return 0 if parameter.tied else parameter.size
        dimension = 0 if parameter.kind == "column" else 1
        length = parameter.shape[dimension]
        fused = 2 if ".gate_up_proj." in parameter.name else 1  # two matrices, each dealt out by itself
        share = fused * _share(length // fused, rank, tp, self.num_kv_heads, by_grain=_by_grain(parameter.name))
        return 0 if parameter.tied and share == length else parameter.size // length * share


def take(path: Path) -> Census:
    """Of a directory with a config.json, or of such a file. Raises ModelNotServable for a model that can't be served at all."""
    config = read_json(path / "config.json" if path.is_dir() else path)
    if not config:
        raise ModelNotServable(f"{path.name} has no config.json; a Hugging Face model's is needed")
    model_type = check_shape(config, tp=1)
    model = _built(path)
    known = model.config.to_dict()  # with what the family's own defaults add
    num_heads = positive(known, "num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden_size = positive(known, "hidden_size", "n_embd", "d_model")
    return Census(
        model_type=model_type,
        num_layers=positive(known, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=kv_heads(known),
        head_dim=_head_dim(model, hidden_size // num_heads),
        vocab_size=positive(known, "vocab_size"),
        feed_forward=_feed_forward(known, hidden_size),
        max_model_len=context_length(known),
        parameters=parameters_of(model),
    )


@cache
def stages(parameters: tuple[Parameter, ...], pp: int) -> tuple[range, ...]:
    """Each stage's run of layers, even by weight."""
    outer = {True: 0, False: 0}
    layers: dict[int, int] = {}
    for parameter in parameters:
        if parameter.layer is None:
            outer[parameter.before] += parameter.size
        else:
            layers[parameter.layer] = layers.get(parameter.layer, 0) + parameter.size
    return split([layers[number] for number in sorted(layers)], pp, before=outer[True], behind=outer[False])


def _built(path: Path) -> Any:
    import torch

    from deployments.engine.skeleton import build

    return build(path, torch.float32)


def parameters_of(model: nn.Module) -> tuple[Parameter, ...]:
    """Of a model that isn't cut yet."""
    from torch.nn import Linear

    found, seen = [], set()
    for owner, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{owner}.{leaf}" if owner else leaf
            number = _LAYER.search(name)
            layer = int(number[1]) if number else None
            kind = _kind(owner, leaf, layer) if isinstance(module, Linear) else "whole"
            before = layer is None and is_before(owner, module)
            found.append(Parameter(name, tuple(parameter.shape), layer, kind, id(parameter) in seen, before))
            seen.add(id(parameter))
    return tuple(found)


def is_before(owner: str, module: nn.Module) -> bool:
    """Whether a module outside the layers works before them: not always the order in which they are written down."""
    from torch.nn import Embedding

    return isinstance(module, Embedding) or owner.rpartition(".")[2] in _ENTRANCES


def _kind(owner: str, leaf: str, layer: int | None) -> Kind:
    """AutoTP cuts every linear layer but routers; those that end a block by their columns, whose bias then stays whole."""
    name = owner.rpartition(".")[2]
    if (layer is None and name not in _HEADS) or name in _ROUTERS:
        return "whole"
    if name in _ROWS:
        return "row" if leaf == "weight" else "whole"
    return "column"


def _by_grain(name: str) -> bool:
    return any(part in name for part in _BY_GRAIN) or name.split(".")[-2] in _HEADS


def _share(length: int, rank: int, tp: int, num_kv_heads: int, *, by_grain: bool) -> int:
    """A rank's part of `length`, as DeepSpeed deals it out (`deepspeed/module_inject/tp_shard.py`, `get_shard_size`)."""
    if length % num_kv_heads == 0 and not by_grain:
        return length * (num_kv_heads // tp + (rank < num_kv_heads % tp)) // num_kv_heads
    if length < GRAIN:
        return length // tp + (rank < length % tp)
    grains, rest = divmod(length, GRAIN)
    return (grains // tp + (rank < grains % tp)) * GRAIN + (rest if rank == tp - 1 else 0)


def _head_dim(model: nn.Module, usual: int) -> int:
    """As the first attention says: families differ in their default."""
    for module in model.modules():
        for name in ("head_dim", "head_size"):
            if hasattr(module, "layer_idx") and isinstance(getattr(module, name, None), int):
                return int(getattr(module, name))
    return usual


def _feed_forward(config: dict[str, Any], hidden_size: int) -> int:
    experts = config.get("num_experts_per_tok") or config.get("moe_k")
    width = config.get("moe_intermediate_size") if experts else None
    dense = positive(config, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden_size)
    return max(dense, int(width or dense) * int(experts or 1))
