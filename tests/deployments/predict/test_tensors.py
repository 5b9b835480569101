"""Bytes of tensors: sizes are compared before anything is made of them."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cluster.errors import InvalidRequest
from cluster.types import Tensor
from deployments.predict.tensors import DTYPES, array_of, tensor_of


@given(st.data(), st.sampled_from(sorted(DTYPES)))
def test_numbers_come_back_as_they_were(data: st.DataObject, datatype: str) -> None:
    values = data.draw(arrays.arrays(DTYPES[datatype], arrays.array_shapes(min_side=0)))
    found = array_of(tensor_of("x", datatype, values))
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_bytes_come_back_as_they_were(elements: list[bytes]) -> None:
    values = np.empty(len(elements), object)
    values[:] = elements
    assert array_of(tensor_of("x", "BYTES", values)).tolist() == elements


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("FP64", (2,), b"\0" * 15),
        ("FP64", (2,), b"\0" * 17),
        ("FP64", (1 << 62, 1 << 62), b"\0" * 16),
        ("UINT8", (1 << 40,), b"\0"),
        ("BYTES", (1 << 62,), b"\0" * 8),
        ("BYTES", (1,), b"\2\0\0\0a"),
        ("BYTES", (1,), b"\1\0\0\0ab"),
        ("BYTES", (2,), b"\1\0\0\0a\0\0\0"),
        ("BYTES", (1,), b"\xff\xff\xff\xffa"),
        ("BYTES", (0,), b"\0"),
        ("BOOL", (2,), b"\1\2"),
    ],
)
def test_bytes_that_are_not_what_the_shape_says_are_refused(datatype: str, shape: tuple[int, ...], data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="'x'"):
        array_of(Tensor("x", datatype, shape, data))


@given(st.binary(max_size=60), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.sampled_from(["BYTES", *sorted(DTYPES)]))
def test_no_bytes_are_a_fault_of_ours(data: bytes, shape: list[int], datatype: str) -> None:
    with contextlib.suppress(InvalidRequest):
        assert array_of(Tensor("x", datatype, tuple(shape), data)).shape == tuple(shape)
