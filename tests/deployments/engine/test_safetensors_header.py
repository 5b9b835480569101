"""Headers of safetensors files: what is accepted is what the format's own library accepts, everything else is refused unread."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from cluster.errors import ModelNotServable
from deployments.engine.safetensors_header import read_header
from tests.deployments.engine.tiny import build

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)
    return path


def tensor(start: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_good_header_is_read(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": tensor(8, 12, [2], "BF16"),
        "a": tensor(0, 8, [1, 2]),
        "e": tensor(12, 12, [0]),
    }
    assert {name: entry.shape for name, entry in read_header(write(tmp_path / "x", header, bytes(12))).items()} == {
        "b": (2,),
        "a": (1, 2),
        "e": (0,),
    }


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": tensor(0, 8, [2])}, 7),
        ({"a": tensor(0, 8, [2])}, 9),
        ({"a": tensor(4, 12, [2])}, 12),
        ({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, 12),
        ({"a": tensor(0, 8, [2]), "b": tensor(12, 20, [2])}, 20),
        ({"a": tensor(8, 0, [2])}, 8),
        ({"a": tensor(-8, 0, [2])}, 8),
        ({"a": tensor(0, 8, [3])}, 8),
        ({"a": tensor(0, 8, [-2])}, 8),
        ({"a": tensor(0, 8, [2.0])}, 8),
        ({"a": tensor(0, 8, [True, 2])}, 8),
        ({"a": tensor(0, 8, [1 << 62, 1 << 62])}, 8),
        ({"a": tensor(0, 8, [2], "Q4")}, 8),
        ({"a": tensor(0, 8, [2], 7)}, 8),
        ({"a": {**tensor(0, 8, [2]), "more": 1}}, 8),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),
        ({"a": 1}, 8),
        ({"__metadata__": {"a": 1}}, 0),
        ([], 0),
        (b'{"a": 1, "a": 1}', 0),
        (b" {}", 0),
        (b"\xff\xfe", 0),
        (b"[" * 5000, 0),
        (b'{"a":' * 5000, 0),
    ],
)
def test_inconsistent_headers_are_refused(tmp_path, header, size):
    with pytest.raises(ModelNotServable, match="truncated or damaged"):
        read_header(write(tmp_path / "x", header, bytes(size)))


@pytest.mark.parametrize("length", [0, 1, 3, 1000, 1 << 31, 1 << 40, (1 << 64) - 1])
def test_a_header_of_impossible_length_is_refused_unread(tmp_path, length):
    with pytest.raises(ModelNotServable):
        read_header(write(tmp_path / "x", {}, b"", length))


@pytest.mark.parametrize("size", range(8))
def test_a_file_without_a_length_is_refused(tmp_path, size):
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(ModelNotServable):
        read_header(tmp_path / "x")


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    """A header that is accepted after a bit has flipped is one that the format's own library accepts too, with the same tensors."""
    build("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    end = struct.unpack("<Q", content[:8])[0] + 8
    numbers = random.Random(0)
    accepted = 0
    for _ in range(2000):
        changed = bytearray(content)
        for _ in range(numbers.choice([1, 1, 1, 2, 8])):
            changed[numbers.randrange(end)] ^= 1 << numbers.randrange(8)
        path.write_bytes(changed)
        try:
            header = read_header(path)
        except ModelNotServable:
            continue
        accepted += 1
        with safe_open(path, framework="numpy") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118 - not a dict
                name: entry.shape for name, entry in header.items()
            }
    assert 0 < accepted < 2000  # flips within a tensor's name do no harm


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.text(max_size=6), st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON}) | JSON)
)
@example({"a": tensor(0, 8, [2])})
def test_any_header_is_read_or_refused(tmp_path, header):
    path = write(tmp_path / "x", header, bytes(8))
    try:
        read_header(path)
    except ModelNotServable:
        return
    try:
        safe_open(path, framework="numpy")
    except SafetensorError as error:
        pytest.fail(f"accepted what the library refuses: {error}")
