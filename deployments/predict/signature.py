"""From a call's tensors to blocks of rows as the model takes them, or why not; and from what the model gave back to tensors.

Nothing is guessed: names are the model's own, a datatype is the model's or one that it holds without loss, sizes fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import InvalidRequest
from cluster.types import Tensor, TensorSpec
from deployments.predict.tensors import BYTES, DTYPES, Array, array_of, tensor_of

BLOCK_ROWS = 256
"""Rows of one call that go into a step together: between two blocks others may take their turn."""
ROW_BYTES = 256
"""A row of so many bytes costs as much again as its place in a step."""


class Block:
    """Some rows of one call: the whole table or its columns, all of one length; and which outputs are wanted of them."""

    __slots__ = ("columns", "cost", "num_rows", "wanted")

    def __init__(self, columns: Sequence[Array], wanted: frozenset[str], bytes_per_row: float) -> None:
        self.columns = tuple(columns)
        self.wanted = wanted
        self.num_rows = len(self.columns[0])
        self.cost = self.num_rows + int(self.num_rows * bytes_per_row) // ROW_BYTES

    def __len__(self) -> int:
        return self.cost


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives."""

    inputs: tuple[TensorSpec, ...]
    by_column: bool  # an input is a column of a table, not the table itself
    outputs: tuple[TensorSpec, ...]
    takes_nan: bool  # a missing number may be NaN

    def wanted(self, names: Sequence[str]) -> tuple[str, ...]:
        """The outputs that a call asks for, in its order. Raises InvalidRequest for one that there isn't."""
        known = tuple(output.name for output in self.outputs)
        for name in names:
            if name not in known:
                raise InvalidRequest(f"The model has no output {name!r:.100}; it has {', '.join(known)}.", param="outputs")
        return tuple(names) or known

    def blocks(self, tensors: Sequence[Tensor], wanted: Sequence[str]) -> list[Block]:
        """Raises InvalidRequest."""
        given = {tensor.name: tensor for tensor in tensors}
        known = {spec.name for spec in self.inputs}
        if unknown := sorted(given.keys() - known):
            raise InvalidRequest(f"The model has no input {unknown[0]!r:.100}; it has {_names(self.inputs)}.", param="inputs")
        if missing := [spec for spec in self.inputs if spec.name not in given]:
            raise InvalidRequest(
                f"The input {missing[0].name!r:.100} is missing; the model takes {_names(self.inputs)}.", param="inputs"
            )
        columns = [self._column(spec, given[spec.name]) for spec in self.inputs]
        num_rows = len(columns[0])
        for spec, column in zip(self.inputs, columns, strict=True):
            if len(column) != num_rows:
                reason = f"The input {spec.name!r:.100} has {len(column)} rows, {self.inputs[0].name!r:.100} has {num_rows}."
                raise InvalidRequest(reason, param="inputs")
        if not num_rows:
            raise InvalidRequest("The inputs have no row.", param="inputs")
        per_row = sum(len(tensor.data) for tensor in tensors) / num_rows
        some = frozenset(wanted)
        return [
            Block([column[start : start + BLOCK_ROWS] for column in columns], some, per_row)
            for start in range(0, num_rows, BLOCK_ROWS)
        ]

    def _column(self, spec: TensorSpec, tensor: Tensor) -> Array:
        _check_type(spec, tensor)
        self._check_shape(spec, tensor.shape)
        values = array_of(tensor)
        if self.by_column:
            values = values.reshape(-1)
        if spec.datatype == BYTES:
            return _texts(spec.name, values)
        self._check_finite(spec.name, values)
        return values.astype(DTYPES[spec.datatype], copy=False)

    def _check_shape(self, spec: TensorSpec, shape: tuple[int, ...]) -> None:
        fits = len(shape) == len(spec.shape) and all(want in (-1, have) for want, have in zip(spec.shape, shape, strict=True))
        if not fits and not (self.by_column and len(shape) == 2 and shape[1] == 1):
            raise InvalidRequest(
                f"The input {spec.name!r:.100} has the shape {list(shape)}; the model takes {list(spec.shape)}.", param="inputs"
            )

    def _check_finite(self, name: str, values: Array) -> None:
        if values.dtype.kind != "f":
            return
        wrong = np.isinf(values) if self.takes_nan else ~np.isfinite(values)
        if wrong.any():
            row = int(np.argwhere(wrong)[0][0])
            kinds = "infinite" if self.takes_nan else "not finite, which this model doesn't take"
            raise InvalidRequest(f"The input {name!r:.100} has a number in row {row} that is {kinds}.", param="inputs")

    def tensors(self, wanted: Sequence[str], results: Sequence[Mapping[str, Array]]) -> tuple[Tensor, ...]:
        """The outputs of a call, of what each of its blocks gave."""
        datatypes = {output.name: output.datatype for output in self.outputs}
        return tuple(tensor_of(name, datatypes[name], np.concatenate([one[name] for one in results])) for name in wanted)


def _check_type(spec: TensorSpec, tensor: Tensor) -> None:
    """Of another type only what fits without loss: FP32 into FP64, INT8 into INT64."""
    given, wanted = DTYPES.get(tensor.datatype), DTYPES.get(spec.datatype)
    if tensor.datatype == spec.datatype or (given is not None and wanted is not None and np.can_cast(given, wanted, "safe")):
        return
    raise InvalidRequest(f"The input {spec.name!r:.100} is {tensor.datatype}; the model takes {spec.datatype}.", param="inputs")


def _texts(name: str, values: Array) -> Array:
    texts = np.empty(values.shape, object)
    try:
        texts.ravel()[:] = [value.decode() for value in values.ravel().tolist()]
    except UnicodeDecodeError:
        raise InvalidRequest(f"The input {name!r:.100} has a text that is not UTF-8.", param="inputs") from None
    return texts


def _names(specs: Sequence[TensorSpec]) -> str:
    names = ", ".join(spec.name for spec in specs)
    return names if len(names) <= 1000 else f"{names[:1000]}…"
