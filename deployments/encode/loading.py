"""From a directory to a model that turns rows into vectors or logits: transformers' own module, or the compiled encoder after a
proof that it gives what the module gives.

Only safetensors and transformers' own code. Weights that are missing are an error, never random numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster.errors import ModelNotServable
from deployments.encode.inspection import Dense, EncoderInfo, Pooling
from deployments.encode.native.encoder import CompiledEncoder
from deployments.encode.row import Floats, Row, starts_of
from deployments.encode.tasks import unit
from deployments.engine.native.build import NativeUnavailable

log = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}
"""Largest difference of a proof, relative to the largest number."""
PADDED_TOKENS = 4096
"""What the module gets at once, padding included."""

OPTIONAL = ("pooler.", "position_ids", "cls.", "lm_head.", "vocab_", "head.", "decoder.")
"""Parts of a checkpoint that embeddings don't need."""


class Model(Protocol):
    """Rows in, one vector of float32 each out: an embedding or the logits of the labels."""

    width: int

    def run(self, rows: Sequence[Row]) -> Floats: ...


def load(directory: Path, info: EncoderInfo, *, threads: int, native: bool | None, cache: Path) -> Model:
    """`native` as in `engine.native`. Raises ModelNotServable."""
    torch.set_num_threads(threads)
    module = _module(directory, info)
    finish = Finish(info, [_dense(directory, dense) for dense in info.dense]) if info.task == "embed" else None
    plain = ModuleModel(module, info, finish)
    if native is False:
        return plain
    try:
        return _proven(plain, module, info, finish, threads, cache)
    except NativeUnavailable as error:
        if native:
            raise ModelNotServable(f"engine.native is true, and the compiled encoder can't run this model: {error}") from error
        log.info("served through torch", extra={"reason": str(error)})
        return plain


class ModuleModel:
    """Through transformers' module: rows of like lengths padded to the longest."""

    def __init__(self, module: Any, info: EncoderInfo, finish: Finish | None) -> None:
        self._module, self._info, self._finish = module, info, finish
        self.width = finish.width if finish else len(info.labels)

    def run(self, rows: Sequence[Row]) -> Floats:
        out = np.empty((len(rows), self.width), np.float32)
        with torch.inference_mode():
            for places in padded_groups([len(row) for row in rows], PADDED_TOKENS):
                out[places] = self._run([rows[place] for place in places])
        return out

    def _run(self, rows: list[Row]) -> Floats:
        longest = max(len(row) for row in rows)
        shape = len(rows), longest
        padding = self._module.config.pad_token_id or 0
        ids, mask, types = torch.full(shape, padding), torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.from_numpy(row.ids)
            mask[place, : len(row)] = 1
            if row.types is not None:
                types[place, : len(row)] = torch.from_numpy(row.types)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if getattr(self._module.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = types
        answer = self._module(**inputs)
        if self._finish is None:
            logits: Floats = answer.logits.float().numpy()
            return logits
        states = answer.last_hidden_state.float()[mask.bool()].numpy()
        return self._finish(states, starts_of(rows))


class CompiledModel:
    """Through the compiled encoder, whatever lengths. `head` makes logits of the first token's states."""

    def __init__(self, encoder: CompiledEncoder, width: int, finish: Finish | None, head: Head | None) -> None:
        self._encoder, self._finish, self._head = encoder, finish, head
        self.width = width

    def run(self, rows: Sequence[Row]) -> Floats:
        states, starts = self._encoder.states(rows), starts_of(rows)
        if self._finish is not None:
            return self._finish(states, starts)
        assert self._head is not None
        with torch.inference_mode():
            return self._head(torch.from_numpy(states[starts[:-1]]))


class Finish:
    """From hidden states to embeddings: pooling, linear layers, length one."""

    def __init__(self, info: EncoderInfo, dense: Sequence[nn.Module]) -> None:
        self._info, self._dense = info, dense
        self.width = len(info.poolings) * info.hidden_size
        for layer in dense:
            self.width = layer[0].out_features  # type: ignore[index]

    def __call__(self, states: Floats, starts: Any) -> Floats:
        vectors = np.concatenate([pool(mode, states, starts) for mode in self._info.poolings], axis=1)
        if self._dense:
            with torch.inference_mode():
                tensor = torch.from_numpy(vectors)
                for layer in self._dense:
                    tensor = layer(tensor)
                vectors = tensor.numpy()
        return unit(vectors) if self._info.normalised else vectors


def pool(mode: Pooling, states: Floats, starts: Any) -> Floats:
    """One vector for each row of `T x H` states; sentence-transformers' modes."""
    vectors: Floats
    if mode == "cls":
        vectors = states[starts[:-1]]
    elif mode == "lasttoken":
        vectors = states[starts[1:] - 1]
    elif mode == "max":
        vectors = np.maximum.reduceat(states, starts[:-1], axis=0)
    else:
        lengths: Floats = np.diff(starts).astype(np.float32)[:, None]
        sums: Any = np.add.reduceat(states, starts[:-1], axis=0)
        vectors = sums / (np.sqrt(lengths) if mode == "mean_sqrt_len_tokens" else lengths)
    return vectors


def padded_groups(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of rows that are run together: like lengths side by side, at most `budget` tokens with their padding (or one row)."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


class Head:
    """A classification head over the first token's hidden states, as the family has it."""

    def __init__(self, module: Any) -> None:
        self._module, self._family = module, module.config.model_type

    def __call__(self, first: Tensor) -> Floats:
        module = self._module
        first = first.to(module.classifier.weight.dtype if self._family in ("bert", "distilbert") else module.dtype)
        if self._family == "bert":
            logits = module.classifier(module.bert.pooler(first.unsqueeze(1)))
        elif self._family == "distilbert":
            logits = module.classifier(torch.relu(module.pre_classifier(first)))
        else:
            logits = module.classifier(first.unsqueeze(1))
        numbers: Floats = logits.float().numpy()
        return numbers


def _module(directory: Path, info: EncoderInfo) -> Any:
    import transformers

    kind = transformers.AutoModelForSequenceClassification if info.task == "classify" else transformers.AutoModel
    module, loaded = kind.from_pretrained(
        directory,
        dtype=getattr(torch, info.dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        attn_implementation="eager" if info.model_type == "mpnet" else "sdpa",
    )
    missing = sorted(name for name in loaded["missing_keys"] if info.task == "classify" or not _is_optional(name))
    if missing or loaded["mismatched_keys"]:
        raise ModelNotServable(f"the weights lack {(missing or sorted(map(str, loaded['mismatched_keys'])))[0]!r:.120}")
    return module.eval()


def _is_optional(name: str) -> bool:
    return any(part in name for part in OPTIONAL)


def _dense(directory: Path, dense: Dense) -> nn.Module:
    tensors = load_file(directory / dense.folder / "model.safetensors")
    weight, bias = tensors["linear.weight"].float(), tensors.get("linear.bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict({"weight": weight} | ({"bias": bias.float()} if bias is not None else {}))
    activation: nn.Module = getattr(nn, dense.activation)()
    return nn.Sequential(linear, activation).eval()


def _proven(plain: ModuleModel, module: Any, info: EncoderInfo, finish: Finish | None, threads: int, cache: Path) -> CompiledModel:
    """Raises NativeUnavailable, also when the compiled encoder gives other numbers than the module."""
    base = module.base_model
    encoder = CompiledEncoder(base, dtype=getattr(torch, info.dtype), threads=threads, cache=cache)
    compiled = CompiledModel(encoder, plain.width, finish, None if finish else Head(module))
    probes = _probes(info)
    expected = plain.run(probes)
    difference = float(np.abs(compiled.run(probes) - expected).max() / max(np.abs(expected).max(), 1e-6))
    if not difference < TOLERANCE[info.dtype]:
        encoder.close()
        raise NativeUnavailable(f"it gives other numbers than transformers (relative error {difference:.2g})")
    if finish is not None:
        base.to("meta")  # its weights are packed; the module is not used any more
    else:
        base.encoder.to("meta") if hasattr(base, "encoder") else base.transformer.to("meta")
    return compiled


def _probes(info: EncoderInfo) -> list[Row]:
    """Rows of several lengths, the longest that fits among them up to some hundred tokens, pairs too."""
    lengths = [min(length, info.max_tokens) for length in (1, 5, 16, 33, 64, 131, 7, 7, 7, 40, 90, 12)]
    rows = []
    for number, length in enumerate(lengths):
        ids = (np.arange(length) * (7 + number) + 3 * number + 1) % info.vocab_size
        rows.append(Row(ids.tolist(), [int(2 * place > length) for place in range(length)]))
    return rows
