"""A model narrowed to one stage: other stages' modules give way to some that hold nothing. Any transformers decoder whose layers
take the stream first and return it can be cut so; `families.py` knows which were tried.

The first module behind a gap takes what comes from the stage before (`Entrance`); the first one after the stage's own layers keeps
what goes to the next (`Exit`). The model's own code runs around them as it is. Knows nothing of ranks and wires.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.census import Parameter, is_before
from deployments.engine.census import stages as runs_of
from deployments.engine.stages import Place

_PLAIN = (bool, int, float, str, type(None))


class Nothing(nn.Module):
    """In the place of an embedding: zeros, for nobody reads them."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(1, dtype=self.dtype).expand(*ids.shape, self.width)


class Passage(nn.Module):
    """In the place of a layer, a norm or the head: the stream goes on as it came. A layer's plain attributes stay."""

    def __init__(self, instead_of: nn.Module) -> None:
        super().__init__()
        for name, value in vars(instead_of).items():
            if isinstance(value, _PLAIN) and not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return _stream(inputs, named)


class Entrance(Passage):
    """Where the stream of the stage before comes in: set `stream` before the model runs."""

    stream: Tensor | None = None  # 1 x T x H

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.stream


class Exit(Passage):
    """Where the stream for the next stage goes out: take `stream` after the model has run."""

    stream: Tensor | None = None  # 1 x T x H

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.stream = _stream(inputs, named)
        return self.stream


def narrow(model: nn.Module, layers: range, place: Place) -> None:
    """Leave the stage at `place`, which has these layers. Modules that aren't its own are dropped, whatever device they are on."""
    if place.pp == 1:
        return
    path, body = _layers_of(model)
    for name, module in list(model.named_modules()):
        outside = not name.startswith(path) and next(module.parameters(recurse=False), None) is not None
        if outside and not (place.is_first if is_before(name, module) else place.is_last):
            _replace(model, name, _stand_in(module))
    for number, layer in enumerate(body):
        if number not in layers:
            kind = Entrance if number == layers.start - 1 else Exit if number == layers.stop else Passage
            body[number] = kind(layer)
    kept = dict(model.state_dict())
    ties: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    for name in [name for name, other in ties.items() if name not in kept or other not in kept]:
        del ties[name]


def layers_of(parameters: tuple[Parameter, ...], place: Place) -> range:
    """The run of layers that belongs to `place`. `parameters` are those of the whole model, before any cut."""
    return runs_of(parameters, place.pp)[place.stage]


def entrance_of(model: nn.Module) -> Entrance | None:
    """None in the first stage."""
    return next((module for module in model.modules() if isinstance(module, Entrance)), None)


def exit_of(model: nn.Module) -> Exit | None:
    """None in the last stage."""
    return next((module for module in model.modules() if isinstance(module, Exit)), None)


def _layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The layers, and what their modules' names begin with."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith((".layers", ".h")):
            return f"{name}.", module
    raise ValueError(f"{type(model).__name__} keeps its layers where nobody looks for them")


def _stand_in(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return Nothing(module.embedding_dim, module.weight.dtype)
    return Passage(module)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def _stream(inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return inputs[0] if inputs else named["hidden_states"]
