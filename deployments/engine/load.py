"""One rank's model with its own weights and nobody else's: built empty, cut empty, then filled from the wanted parts of the files.

Layers go to stages (`stage.py`); within a stage, DeepSpeed's AutoTP decides the cut (`Group.shard`, on the meta device), and
`cuts.py` reads its decision. Where that can't be read, every rank loads the whole model and cuts it, as DeepSpeed's own users do.
What was cut once is kept (`copies.py`).

Weights are quantised one by one as they are read, so that memory never holds more than a few of them in full.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from cluster.types import Quantization
from deployments.engine import skeleton, stage
from deployments.engine.attention import CPU
from deployments.engine.census import parameters_of
from deployments.engine.copies import Copies, Copy
from deployments.engine.cuts import Cut, CutUnknown, learn
from deployments.engine.group import Group
from deployments.engine.mapped import TYPES, MappedFiles, Part
from deployments.engine.progress import Progress
from deployments.engine.quantization import FORMATS, require
from deployments.engine.quantized_linear import QuantizedLinear, linears, put, quantize_model
from deployments.engine.runner import DTYPES, load_model
from deployments.engine.stages import Place
from deployments.engine.weights import Weights, find_weights, fingerprint

log = logging.getLogger(__name__)

_CUTS = "mmaas_cuts"  # the attribute in which a loaded module keeps its parameters' cuts


def load(
    directory: Path,
    dtype: str,
    group: Group | None,
    settings: EngineSettings,
    progress: Progress,
    quantization: Quantization | None = None,
    device: torch.device = CPU,
) -> nn.Module:
    """This rank's module with real tensors. The directory has passed `checkpoint.inspect`; `group` None: one rank holds all. On a
    GPU a tensor goes there as soon as its part is read: the host holds a few at a time, in pinned memory.

    Raises ModelNotServable when weights are missing or have other shapes, DeepSpeed can't cut the model, or it can't be quantised.
    """
    if quantization:
        require(FORMATS[quantization], device)
    weights = find_weights(directory)
    empty, parts = _planned(directory, DTYPES[dtype], group, weights, progress, pinned=device.type == "cuda")
    if empty is None:
        model = _whole(directory, dtype, group, weights, progress).to(device)
    else:
        copy = _copy(directory, dtype, group, settings, weights, empty, quantization)
        model = _filled(empty, parts, copy, progress, quantization, device)
        setattr(model, _CUTS, empty.cuts)
    if quantization:
        quantize_model(model, quantization)  # what could not be quantised while it was read
    return model


def _filled(
    empty: _Empty,
    parts: dict[str, Part],
    copy: Copy | None,
    progress: Progress,
    quantization: Quantization | None,
    device: torch.device,
) -> nn.Module:
    """From this rank's own copy, if there is a good one, else from the model's files."""
    quantized = empty.quantized(parts, quantization) if quantization else {}
    shapes = empty.shapes() | {f"{linear.name}.scales": tuple(linear.scales.shape) for linear in quantized.values()}
    if copy and (kept := copy.read(shapes, progress)) is not None:
        skeleton.fill(empty.model, kept, empty.dtype, empty.apart, device, renamed=True)
        return empty.model
    for linear in quantized.values():
        linear.scales = None  # they come with the weights, not from the files
    progress.begin("model", sum(part.num_bytes for part in parts.values()))
    chosen = {name: QuantizedPart(part, quantized[name]) if name in quantized else part for name, part in parts.items()}
    skeleton.fill(empty.model, chosen, empty.dtype, empty.apart, device)
    progress.end()
    if copy:
        copy.write({name: tensor for name, tensor in empty.model.state_dict().items() if name in shapes})
    return empty.model


def cuts_of(model: nn.Module) -> Mapping[str, Cut] | None:
    """Which part of each parameter a loaded module has; None where DeepSpeed cut a whole model and doesn't tell."""
    return getattr(model, _CUTS, None)


@dataclass(frozen=True)
class QuantizedPart:
    """A part of a weight that is quantised when it is read."""

    part: Part
    linear: QuantizedLinear

    def __getitem__(self, everything: Any) -> Tensor:
        numbers, scales = self.linear.take(self.part[everything])
        self.linear.scales = nn.Parameter(scales, requires_grad=False)
        return numbers


@dataclass(frozen=True)
class _Empty:
    """A rank's model on the meta device, with the part that it has of each tensor."""

    model: nn.Module
    dtype: torch.dtype
    cuts: Mapping[str, Cut]  # of the parameters in this rank's stage
    apart: Mapping[str, torch.dtype]  # patterns of parameters that are kept in another type
    alike: Mapping[str, str]  # parameters that were another one before the cut, both ways

    @classmethod
    def of(cls, directory: Path, dtype: torch.dtype, group: Group | None) -> _Empty:
        model = skeleton.build(directory, dtype)
        place = group.place if group else Place()
        layers = stage.layers_of(parameters_of(model), place)
        whole = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        apart = skeleton.types_apart(model, dtype)
        cuts = {name: Cut.none(shape) for name, shape in whole.items()}
        if group and place.tp > 1:
            try:
                model = group.shard(model, dtype)
            except ModelNotServable as error:
                raise CutUnknown(error.message) from error
            cuts = learn(model, whole, place.part)
        ties = skeleton.ties(model)
        parted = {one: other for one, other in ties.items() if cuts[one] != cuts[other]}
        skeleton.untie(model, parted)
        stage.narrow(model, layers, place)
        parted = {one: other for one, other in ties.items() if one not in skeleton.ties(model)}
        kept = {name: cuts[name] for name in model.state_dict()}
        return cls(model, dtype, kept, apart, parted | {other: one for one, other in parted.items()})

    def parts(self, weights: Weights, progress: Progress, *, pinned: bool) -> dict[str, Part]:
        """What to read, by the stored tensor's name; by the parameter's own where that was tied to the stored one."""
        files, state = MappedFiles(weights.tensors, weights.files, pinned=pinned), self.model.state_dict()
        goes_to = skeleton.destinations(self.model, weights.tensors)
        plain = {target: name for name, (target, computed) in goes_to.items() if target in state and not computed}
        stored = {target: name for name, (target, computed) in goes_to.items() if not computed}
        tied = {
            target: stored[other]
            for target, other in self.alike.items()
            if target in state and target not in plain and other in stored
        }
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

    def quantized(self, parts: Mapping[str, Part], quantization: Quantization) -> dict[str, QuantizedLinear]:
        """Prepare the linear modules whose weights are taken as they are stored; by the names of `parts`."""
        targets = skeleton.destinations(self.model, parts)
        by_weight = {target: name for name, (target, computed) in targets.items() if not computed}
        return {
            by_weight[f"{name}.weight"]: put(self.model, name, linear, FORMATS[quantization])
            for name, linear in linears(self.model).items()
            if f"{name}.weight" in by_weight
        }

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
    place = group.place if group else Place()
    layers = stage.layers_of(parameters_of(model), place)
    if group and place.tp > 1:
        model = group.shard(model, DTYPES[dtype])
    else:
        setattr(model, _CUTS, {name: Cut.none(tuple(parameter.shape)) for name, parameter in model.named_parameters()})
    stage.narrow(model, layers, place)
    return model


def _copy(
    directory: Path,
    dtype: str,
    group: Group | None,
    settings: EngineSettings,
    weights: Weights,
    empty: _Empty,
    quantization: Quantization | None,
) -> Copy | None:
    """Where this rank keeps what it cut; None where the model's own files serve as well."""
    stored = {TYPES[entry.dtype] for entry in weights.tensors.values()}
    converted = any(kind.is_floating_point and kind != DTYPES[dtype] for kind in stored)
    if not settings.cut_weights_bytes or not (group or converted or quantization):
        return None
    place = group.place if group else Place()
    cuts = sorted((name, cut.whole, repr(cut.blocks)) for name, cut in empty.cuts.items())
    kind = f"{dtype} {quantization}" if quantization else dtype
    copies = Copies(settings.cache / "shards", settings.cut_weights_bytes)
    return copies.of(fingerprint(directory, weights), place=place, dtype=kind, cuts=cuts)
