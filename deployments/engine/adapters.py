"""The adapters of one rank: files are read, checked and cut in a thread while steps go on, and put into a slot between two steps.

An adapter changes linears of its base: y = W x + scale * B (A x), with B `outputs x rank` and A `rank x inputs` (LoRA, Hu et al.,
ICLR 2022). Where a rank has some of the outputs it takes those rows of B and all of A; where it has some of the inputs, those
columns of A and all of B, and the sum over ranks that the base needs anyway sums this, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.errors import ModelNotServable, PlatformError, Unavailable
from deployments.engine.adapter_files import AdapterFiles, Shape, base_shapes, inspect
from deployments.engine.cuts import Cut
from deployments.engine.mapped import MappedFile

_LAYER = re.compile(r"\.layers\.(\d+)\.")
READERS = 2
"""Threads that read adapters beside the steps."""


@dataclass(frozen=True)
class AdapterPart:
    """This rank's part of one adapter, in the model's type. By the linear's name: `rank x inputs` and `outputs x rank`."""

    rank: int
    scale: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    cuts: Mapping[str, Cut]  # of the linears' weights


class AdapterHost(Protocol):
    """What runs the model, and can run it with adapters: `Runner` and the compiled decoder."""

    def pack_adapter(self, part: AdapterPart) -> Any:
        """In the form that `put_adapter` takes. Called on another thread than steps are. Raises ModelNotServable."""
        ...

    def put_adapter(self, slot: int, packed: Any) -> None:
        """From the next step on `slot` (from 1) is this adapter; None: nothing."""
        ...


class WithoutAdapters:
    """A host that runs none."""

    ticks = 0.0  # it doesn't count within a step

    def pack_adapter(self, part: AdapterPart) -> Any:
        raise ModelNotServable("adapters are computed by CPUs only so far; set engine.device=cpu", param="model")

    def put_adapter(self, slot: int, packed: Any) -> None:
        assert packed is None, "nothing was packed"


class Adapters:
    """Reads adapters for one rank and keeps them in its host's slots. All but the reading happens between steps."""

    def __init__(self, host: AdapterHost, directory: Path, cuts: Mapping[str, Cut] | None, dtype: torch.dtype) -> None:
        """`directory`: of the base; `cuts`: of its parameters by name, None where they aren't known."""
        self._host: AdapterHost | None = host
        self._directory, self._cuts, self._dtype = directory, cuts, dtype
        self._reading: dict[int, tuple[Path, Future[Any]]] = {}
        self._installed: dict[int, Path] = {}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="adapters")

    def read(self, slot: int, directory: Path) -> None:
        """Begin. What a slot was to become before is forgotten."""
        self._reading[slot] = directory, self._readers.submit(self._packed, directory)

    def wait(self, slot: int) -> None:
        """Raises PlatformError while the slot's adapter is being read; whether it could be, `install` says."""
        if (reading := self._reading.get(slot)) and not reading[1].done():
            raise PlatformError("the adapter is still being read")

    def install(self, slot: int) -> None:
        """Raises ModelNotServable for files that aren't an adapter of this base, and for numbers that aren't finite."""
        if slot not in self._reading:
            raise PlatformError(f"no adapter was read for slot {slot}")
        directory, reading = self._reading.pop(slot)
        try:
            packed = reading.result()
        except PlatformError:
            raise
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise ModelNotServable(f"the adapter can't be read: {error!r:.300}") from error
        self._awake.put_adapter(slot, packed)
        self._installed[slot] = directory

    def drop(self, slot: int) -> None:
        """Forget what is in the slot, or what was to come into it."""
        self._reading.pop(slot, None)
        self._installed.pop(slot, None)
        if self._host:
            self._host.put_adapter(slot, None)

    def rest(self) -> None:
        """The host ends; another one comes with `move`."""
        self._host = None

    def move(self, host: AdapterHost, cuts: Mapping[str, Cut] | None) -> None:
        """To a host of the same model, or of one of its shape: every slot's files are read again. Raises what `install` does."""
        self._host, self._cuts = host, cuts
        for slot, directory in self._installed.items():
            host.put_adapter(slot, self._packed(directory))

    @property
    def _awake(self) -> AdapterHost:
        if self._host is None:
            raise Unavailable("the model is asleep", retry_after_s=5)
        return self._host

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return base_shapes(self._directory)

    def _packed(self, directory: Path) -> Any:
        return self._awake.pack_adapter(self._part(inspect(directory, self._shapes)))

    def _part(self, files: AdapterFiles) -> AdapterPart:
        if self._cuts is None:
            raise ModelNotServable("adapters can't be cut for this model, whose own cut isn't known; serve it with --tp 1")
        layers = {layer_of(name) for name in self._cuts}  # where the model has stages, those of this one
        mine = [module for module in files.modules if layer_of(module) in layers]
        lost = sorted(module for module in mine if f"{module}.weight" not in self._cuts)
        if lost:
            raise ModelNotServable(f"transformers has no linear {lost[0]} in this model, so no adapter can change it")
        cuts = {module: self._cuts[f"{module}.weight"] for module in mine}
        mapped = MappedFile(files.path)
        pairs = {module: self._pair(mapped, files, module, cut) for module, cut in cuts.items()}
        return AdapterPart(files.rank, files.scale, pairs, cuts)

    def _pair(self, mapped: MappedFile, files: AdapterFiles, module: str, cut: Cut) -> tuple[Tensor, Tensor]:
        a, b = (self._finite(mapped.tensor(files.tensors[name]), name) for name in files.names(module))
        return cut_pair(a, b, cut)

    def _finite(self, stored: Tensor, name: str) -> Tensor:
        """In the model's type, in memory of its own."""
        tensor = stored.to(self._dtype, copy=True)
        if not bool(torch.isfinite(tensor).all()):
            raise ModelNotServable(f"{name} has numbers that aren't finite in {self._dtype}")
        return tensor


def layer_of(name: str) -> str | None:
    """The layer that a parameter or module belongs to."""
    found = _LAYER.search(name)
    return found and found[1]


def check_numbers(files: AdapterFiles) -> None:
    """Read all of it. Raises ModelNotServable for numbers that aren't finite as they are stored."""
    mapped = MappedFile(files.path)
    for name, entry in files.tensors.items():
        if not bool(torch.isfinite(mapped.tensor(entry)).all()):
            raise ModelNotServable(f"{name} has numbers that aren't finite")


def cut_pair(a: Tensor, b: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """What a rank that has this part of the weight needs: of A the columns of its inputs, of B the rows of its outputs."""
    if cut.part == cut.whole:
        return a, b
    outputs, inputs = cut.part
    own_a, own_b = a.new_zeros(len(a), inputs), b.new_zeros(outputs, b.shape[1])
    for (from_rows, from_columns), (to_rows, to_columns) in cut.blocks:
        own_a[:, to_columns] = a[:, from_columns]
        own_b[to_rows] = b[from_rows]
    return own_a, own_b
