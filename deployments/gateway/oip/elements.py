"""Elements of a tensor as JSON has them, and back: flat or nested row by row, each of its tensor's own type, none coerced.

A number that is none (NaN, an infinity) is null in JSON, in both directions; null is NaN when it comes in.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cluster.errors import InvalidRequest
from cluster.types import Tensor
from deployments.predict.tensors import BYTES, DTYPES, array_of, packed

_TYPES: dict[str, frozenset[type]] = {"b": frozenset({bool}), "i": frozenset({int}), "u": frozenset({int})}
_NUMBERS = frozenset({int, float, type(None)})


def read(name: str, datatype: str, shape: tuple[int, ...], data: list[Any]) -> bytes:
    """The elements as `Tensor.data` has them. Raises InvalidRequest."""
    elements = _flat(name, data, shape)
    if len(elements) != math.prod(shape):
        raise InvalidRequest(
            f"The input {name!r} has {len(elements)} elements; its shape {list(shape)} has others.", param="inputs"
        )
    kinds = frozenset(map(type, elements))
    if datatype == BYTES:
        if not kinds <= {str}:
            raise _wrong(name, datatype, "texts")
        return packed(element.encode() for element in elements)
    dtype = DTYPES[datatype]
    if not kinds <= _TYPES.get(dtype.kind, _NUMBERS):
        raise _wrong(name, datatype, {"b": "true and false", "f": "numbers and null"}.get(dtype.kind, "integers"))
    try:
        with np.errstate(over="ignore"):
            values = np.array(elements, dtype)
    except OverflowError:
        raise _wrong(name, datatype, "integers in its range") from None
    if dtype.kind == "f" and np.isinf(values).any():
        raise _wrong(name, datatype, "numbers in its range")
    return values.tobytes()


def _flat(name: str, data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """The innermost elements of what is flat, or nested exactly as its shape says."""
    if not data or type(data[0]) is not list:
        return data
    for size in shape[:-1]:
        if len(data) != size or any(type(part) is not list for part in data):
            raise InvalidRequest(f"The input {name!r} is nested in another way than its shape {list(shape)} says.", param="inputs")
        data = [element for part in data for element in part]
    return data


def _wrong(name: str, datatype: str, wanted: str) -> InvalidRequest:
    return InvalidRequest(f"The input {name!r} is {datatype}, whose elements are {wanted}.", param="inputs")


def written(tensor: Tensor) -> list[Any]:
    """The elements, flat. Raises InvalidRequest for bytes that are no text, which only a binary answer can hold."""
    values = array_of(tensor).ravel()
    if tensor.datatype == BYTES:
        try:
            return [element.decode() for element in values.tolist()]
        except UnicodeDecodeError:
            reason = f"The output {tensor.name!r} is not UTF-8, so JSON can't hold it: ask for it with binary_data true."
            raise InvalidRequest(reason, param="outputs") from None
    elements: list[Any] = values.tolist()
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return [element if math.isfinite(element) else None for element in elements]
    return elements
