"""One rank's model with its own weights and nobody else's: built empty, cut empty, then filled from the wanted parts of the files.

DeepSpeed's AutoTP decides the cut (`Group.shard`, on the meta device); `cuts.py` reads its decision. Where that can't be read,
every rank loads the whole model and cuts it, as DeepSpeed's own users do. What was cut once is kept (`copies.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from deployments.engine import skeleton
from deployments.engine.attention import CPU
from deployments.engine.copies import Copies, Copy
from deployments.engine.cuts import Cut, CutUnknown, learn
from deployments.engine.group import Group
from deployments.engine.mapped import TYPES, MappedFiles, Part
from deployments.engine.progress import Progress
from deployments.engine.runner import DTYPES, load_model
from deployments.engine.weights import Weights, find_weights, fingerprint

log = logging.getLogger(__name__)


def load(
    directory: Path, dtype: str, group: Group | None, settings: EngineSettings, progress: Progress, device: torch.device = CPU
) -> nn.Module:
    """This rank's module with real tensors. The directory has passed `checkpoint.inspect`; `group` None: one rank holds all. On a
    GPU a tensor goes there as soon as its part is read: the host holds a few at a time, in pinned memory.

    Raises ModelNotServable when weights are missing or have other shapes, or DeepSpeed can't cut the model.
    """
    weights = find_weights(directory)
    empty, parts = _planned(directory, DTYPES[dtype], group, weights, progress, pinned=device.type == "cuda")
    if empty is None:
        return _whole(directory, dtype, group, weights, progress).to(device)
    copy = _copy(directory, dtype, group, settings, weights, empty)
    if copy and (kept := copy.read(empty.shapes(), progress)) is not None:
        skeleton.fill(empty.model, kept, empty.dtype, empty.apart, device, renamed=True)
        return empty.model
    progress.begin("model", sum(part.num_bytes for part in parts.values()))
    skeleton.fill(empty.model, parts, empty.dtype, empty.apart, device)
    progress.end()
    if copy:
        copy.write({name: tensor for name, tensor in empty.model.state_dict().items() if name in empty.shapes()})
    return empty.model


@dataclass(frozen=True)
class _Empty:
    """A rank's model on the meta device, with the part that it has of each tensor."""

    model: nn.Module
    dtype: torch.dtype
    cuts: Mapping[str, Cut]
    apart: Mapping[str, torch.dtype]  # patterns of parameters that are kept in another type
    alike: Mapping[str, str]  # parameters that were another one before the cut, both ways

    @classmethod
    def of(cls, directory: Path, dtype: torch.dtype, group: Group | None) -> _Empty:
        model = skeleton.build(directory, dtype)
        whole = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        apart = skeleton.types_apart(model, dtype)
        if group is None:
            return cls(model, dtype, {name: Cut.none(shape) for name, shape in whole.items()}, apart, {})
        try:
            model = group.shard(model, dtype)
        except ModelNotServable as error:
            raise CutUnknown(error.message) from error
        cuts = learn(model, whole, group.rank)
        parted = {one: other for one, other in skeleton.ties(model).items() if cuts[one] != cuts[other]}
        skeleton.untie(model, parted)
        return cls(model, dtype, cuts, apart, parted | {other: one for one, other in parted.items()})

    def parts(self, weights: Weights, progress: Progress, *, pinned: bool) -> dict[str, Part]:
        """What to read, by the stored tensor's name; by the parameter's own where that was tied to the stored one."""
        files, state = MappedFiles(weights.tensors, weights.files, pinned=pinned), self.model.state_dict()
        goes_to = skeleton.destinations(self.model, weights.tensors)
        plain = {target: name for name, (target, computed) in goes_to.items() if target in state and not computed}
        tied = {target: plain[other] for target, other in self.alike.items() if target not in plain and other in plain}
        sources = {name: target for name, (target, computed) in goes_to.items() if target in state and computed}
        cut = {name for name, cut in self.cuts.items() if cut.part != cut.whole}
        if sources and (without := sorted(cut - plain.keys() - tied.keys())):
            raise CutUnknown(f"{without[0]} is cut, and computed from stored tensors")

        def part(name: str, target: str, cut: Cut | None) -> Part:
            if cut and cut.whole != weights.tensors[name].shape:
                raise ModelNotServable(f"{name} has the shape {weights.tensors[name].shape} in the weights, not {cut.whole}")
            return files.part(name, cut, None if self.apart else state[target].dtype, progress)

        parts = {name: part(name, target, self.cuts[target]) for target, name in plain.items()}
        parts |= {target: part(name, target, self.cuts[target]) for target, name in tied.items()}
        return parts | {name: part(name, target, None) for name, target in sources.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that this rank stores; of tied ones, once."""
        return {name: cut.part for name, cut in self.cuts.items() if name not in skeleton.ties(self.model)}


def _planned(
    directory: Path, dtype: torch.dtype, group: Group | None, weights: Weights, progress: Progress, *, pinned: bool
) -> tuple[_Empty | None, dict[str, Part]]:
    """The empty model and what to read; None where any rank can't know: all must go the same way."""
    try:
        empty: _Empty | None = _Empty.of(directory, dtype, group)
        parts = empty.parts(weights, progress, pinned=pinned) if empty else {}
    except CutUnknown as error:
        log.warning("every rank reads the whole model: its cut can't be known before", extra={"reason": str(error)})
        empty, parts = None, {}
    return (empty, parts) if group is None or group.all_agree(empty is not None) else (None, {})


def _whole(directory: Path, dtype: str, group: Group | None, weights: Weights, progress: Progress) -> nn.Module:
    progress.begin("whole", total := sum(entry.end - entry.start for entry in weights.tensors.values()))
    model = load_model(directory, dtype)
    progress.add(total)
    progress.end()
    return group.shard(model, DTYPES[dtype]) if group else model


def _copy(
    directory: Path, dtype: str, group: Group | None, settings: EngineSettings, weights: Weights, empty: _Empty
) -> Copy | None:
    """Where this rank keeps what it cut; None where the model's own files serve as well."""
    stored = {TYPES[entry.dtype] for entry in weights.tensors.values()}
    converted = any(kind.is_floating_point and kind != DTYPES[dtype] for kind in stored)
    if not settings.cut_weights_bytes or not (group or converted):
        return None
    rank, size = (group.rank, group.size) if group else (0, 1)
    cuts = sorted((name, cut.whole, repr(cut.blocks)) for name, cut in empty.cuts.items())
    copies = Copies(settings.cache / "shards", settings.cut_weights_bytes)
    return copies.of(fingerprint(directory, weights), rank=rank, size=size, dtype=dtype, cuts=cuts)
