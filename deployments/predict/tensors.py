"""Tensors of the Open Inference Protocol as NumPy arrays and back. Sizes are compared before anything is allocated."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cluster.errors import InvalidRequest
from cluster.types import Tensor

Array: TypeAlias = npt.NDArray[Any]

BYTES = "BYTES"
"""The datatype of texts, and of bytes of any length."""

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""Datatypes whose elements have one size. BF16, which NumPy lacks, isn't among them."""

_LENGTH = struct.Struct("<I")


def check_size(tensor: Tensor) -> None:
    """Raises InvalidRequest where the bytes aren't as many as shape and datatype say; of BYTES, where they can't be."""
    count = math.prod(tensor.shape)
    if tensor.datatype == BYTES:
        fits, size = len(tensor.data) >= count * _LENGTH.size, f"at least {count * _LENGTH.size}"
    else:
        expected = count * DTYPES[tensor.datatype].itemsize
        fits, size = len(tensor.data) == expected, str(expected)
    if not fits:
        shape = list(tensor.shape)
        raise InvalidRequest(
            f"The tensor {tensor.name!r} has {len(tensor.data)} bytes; {tensor.datatype} of shape {shape} has {size}.",
            param="inputs",
        )


def array_of(tensor: Tensor) -> Array:
    """Its values, read-only; of BYTES an array of objects, which are bytes. Raises InvalidRequest."""
    check_size(tensor)
    if tensor.datatype == BYTES:
        elements = np.empty(math.prod(tensor.shape), object)
        elements[:] = unpacked(tensor.data, len(elements), tensor.name)
        return elements.reshape(tensor.shape)
    if tensor.datatype == "BOOL" and tensor.data.translate(None, b"\0\1"):
        raise InvalidRequest(f"The tensor {tensor.name!r} is BOOL and has a byte that is neither 0 nor 1.", param="inputs")
    return np.frombuffer(tensor.data, DTYPES[tensor.datatype]).reshape(tensor.shape)


def tensor_of(name: str, datatype: str, values: Array) -> Tensor:
    """The tensor of an array whose elements `datatype` can hold; of BYTES those are texts or bytes."""
    if datatype == BYTES:
        data = packed(value if isinstance(value, bytes) else str(value).encode() for value in values.ravel().tolist())
    else:
        data = np.ascontiguousarray(values, DTYPES[datatype]).tobytes()
    return Tensor(name, datatype, values.shape, data)


def packed(elements: Iterable[bytes]) -> bytes:
    """Each element behind its length."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


def unpacked(data: bytes, count: int, name: str) -> Sequence[bytes]:
    """Exactly `count` elements. Raises InvalidRequest."""
    elements, place = [], 0
    for _ in range(count):
        start = place + _LENGTH.size
        if start > len(data):
            break
        place = start + _LENGTH.unpack_from(data, place)[0]
        elements.append(data[start:place])
    if len(elements) != count or place != len(data):
        raise InvalidRequest(f"The tensor {name!r} doesn't hold {count} elements, each behind its length.", param="inputs")
    return elements
