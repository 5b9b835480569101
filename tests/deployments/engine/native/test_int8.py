"""The decoder's products in eight bits: the integers of `quantization.py`, and the same answers as torch with the same weights."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.attention import KvCache
from deployments.engine.batch import Batch
from deployments.engine.local import LocalEngine
from deployments.engine.native import build as native_build
from deployments.engine.native.decoder import Decoder
from deployments.engine.native.description import Description, describe
from deployments.engine.native.packing import Arena, CMatrix, declare, pack, packed_bytes, padded, unsigned
from deployments.engine.native.proof import Disproved, Ranks, decoder_of
from deployments.engine.quantization import INT8, product, quantize
from deployments.engine.quantized_linear import quantize_model
from deployments.engine.runner import Runner, load_model
from tests.deployments.engine.families import VOCABULARY, build

BLOCK, BLOCKS = 16, 48
CACHE = EngineSettings().cache
Multiply = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def compiled(directory: Path, flags: list[str]) -> Multiply:
    """A product alone, outside the decoder."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    native = Path(native_build.__file__).parent
    sources = [str(Path(__file__).with_name("product.cpp")), str(native / "packing.cpp")]
    subprocess.run([compiler, *flags, f"-I{native}", *sources, "-o", str(directory / "product.so")], check=True)
    library = ctypes.CDLL(str(directory / "product.so"))
    declare(library)
    call = library.product
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 3]

    def multiply(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        outputs, inputs = weight.shape
        panels = pack(unsigned(weight), Arena(packed_bytes(outputs, inputs, 1)), library, threads=2)
        filled = [padded(numbers, outputs) for numbers in (bias, scales)]
        addresses = [numbers.data_ptr() if numbers is not None else None for numbers in filled]
        matrix = CMatrix(panels.data_ptr(), *addresses, len(panels), inputs, outputs)
        found = torch.empty(len(x), outputs), torch.empty(len(x), inputs, dtype=torch.int8), torch.empty(len(x))
        call(ctypes.byref(matrix), x.contiguous().data_ptr(), len(x), *[tensor.data_ptr() for tensor in found])
        return found

    return multiply


@pytest.fixture(scope="module")
def multiply(tmp_path_factory: pytest.TempPathFactory) -> Multiply:
    return compiled(tmp_path_factory.mktemp("product"), native_build.FLAGS)


def numbers(rows: int, inputs: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, 1, generator=random).mul(5).exp()
    return torch.randn(rows, inputs, generator=random).pow(3) * sizes


def assert_same(multiply: Multiply, rows: int, inputs: int, outputs: int, seed: int) -> None:
    x, (weight, scales) = numbers(rows, inputs, seed), quantize(numbers(outputs, inputs, seed + 1), INT8)
    found, rounded, row_scales = multiply(x, weight, scales, None)
    expected, expected_scales = quantize(x, INT8)
    assert torch.equal(rounded, expected)
    assert torch.equal(row_scales, expected_scales)
    assert torch.equal(found, product(x, weight, scales, INT8))


@settings(deadline=None)
@given(rows=st.integers(1, 40), vectors=st.integers(1, 12), outputs=st.integers(1, 100), seed=st.integers(0, 1 << 30))
def test_a_product_is_that_of_torch_to_the_last_bit(multiply: Multiply, rows: int, vectors: int, outputs: int, seed: int) -> None:
    assert_same(multiply, rows, 16 * vectors, outputs, seed)


def test_a_product_of_every_number_of_rows_and_of_the_widest_layer(multiply: Multiply) -> None:
    for rows in range(1, 41):
        assert_same(multiply, rows, 64, 48, rows)
    extreme = torch.full((2, 65536), 127, dtype=torch.int8)  # sums as far out as they go
    scales = torch.ones(2)
    for sign in (1.0, -1.0):
        found, _, _ = multiply(torch.full((1, 65536), sign), extreme, scales, None)
        assert torch.equal(found, product(torch.full((1, 65536), sign), extreme, scales, INT8))


def test_a_bias_is_added_to_what_was_scaled(multiply: Multiply) -> None:
    x, (weight, scales) = numbers(5, 64, 1), quantize(numbers(40, 64, 2), INT8)
    bias = torch.randn(40)
    torch.testing.assert_close(multiply(x, weight, scales, bias)[0], product(x, weight, scales, INT8) + bias)


def test_zeros_and_what_is_not_finite_stay_so(multiply: Multiply) -> None:
    weight, scales = quantize(numbers(40, 32, 2), INT8)
    x = torch.ones(6, 32)
    x[0] = 0
    x[1] = 1e-42
    x[2, 3], x[3, 7], x[4] = float("nan"), float("inf"), -float("inf")
    found = multiply(x, weight, scales, None)[0]
    assert found[:2].eq(0).all()
    assert not found[2:5].isfinite().any()
    assert found[5].isfinite().all()


@pytest.mark.slow
def test_a_cpu_without_vector_instructions_by_name_gives_the_same_integers(tmp_path: Path) -> None:
    plain = [flag for flag in native_build.FLAGS if not flag.startswith("-march")]
    multiply = compiled(tmp_path, [*plain, "-Wno-psabi"])
    for rows, inputs, outputs in ((1, 16, 1), (7, 48, 33), (13, 128, 64), (40, 96, 70)):
        assert_same(multiply, rows, inputs, outputs, rows)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain, with norms and scales of its own, with biases, with fused matrices."""
    root = tmp_path_factory.mktemp("models")
    return {family: build(family, root / family) for family in ("llama", "gemma2", "qwen2", "phi3")}


def quantized(directory: Path, dtype: str = "float32") -> Runner:
    model = load_model(directory, dtype)
    quantize_model(model, "int8")
    runner = Runner(model, KvCache(BLOCKS, BLOCK))
    runner.check()
    return runner


def decoder(runner: Runner, *, threads: int = 2) -> Decoder:
    described = describe(runner.model, runner.cache.calls, 0, 256)
    return Decoder(described, num_blocks=BLOCKS, block_size=BLOCK, threads=threads, cache=CACHE)


def batch(starts: list[int], counts: list[int], which: list[int]) -> Batch:
    """Tokens of some of three sequences, each with blocks of its own."""
    texts = np.random.default_rng(0).integers(0, VOCABULARY, (3, 256)).astype(np.int32)
    tables = np.arange(3 * 16, dtype=np.int32).reshape(3, 16)[which]
    tokens = [texts[one, start : start + count] for one, start, count in zip(which, starts, counts, strict=True)]
    return Batch(
        np.concatenate(tokens),
        np.array(starts, np.int32),
        np.array(counts, np.int32),
        np.arange(len(which), dtype=np.int32),
        tables,
    )


STEPS = [
    batch([0, 0, 0], [3, 29, 70], [0, 1, 2]),
    batch([3, 29, 70], [1, 1, 1], [0, 1, 2]),
    batch([4, 30, 71], [1, 1, 40], [0, 1, 2]),
]


FAMILIES = pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "phi3"])


def run(runner: Runner | Decoder) -> Tensor:
    return torch.cat([runner.run(step).float() for step in STEPS])


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@FAMILIES
def test_logits_are_those_of_torch_with_the_same_integers(directories: dict[str, Path], family: str) -> None:
    """But for the few rows in which a number falls on the other side of a rounding."""
    runner = quantized(directories[family])
    expected = run(runner)
    found = run(decoder(runner))
    differences = (found - expected).abs().amax(1) / expected.abs().amax()
    assert (differences < 1e-5).float().mean() > 0.6
    assert differences.max() < 0.05


@FAMILIES
def test_the_error_stays_within_a_few_times_that_of_bfloat16(directories: dict[str, Path], family: str) -> None:
    exact, narrow = (
        run(Runner(load_model(directories[family], dtype), KvCache(BLOCKS, BLOCK))) for dtype in ("float32", "bfloat16")
    )
    runner = quantized(directories[family], "bfloat16")
    torch_error, ours = error(run(runner), exact), error(run(decoder(runner)), exact)
    assert ours < 4 * error(narrow, exact)
    assert ours < 1.5 * torch_error


def test_one_thread_or_five_give_the_same_bits(directories: dict[str, Path]) -> None:
    one, five = (run(decoder(quantized(directories["llama"], "bfloat16"), threads=threads)) for threads in (1, 5))
    assert torch.equal(one, five)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_batch_mates_nor_chunks_change_a_bit_of_an_answer(directories: dict[str, Path], dtype: str) -> None:
    subject = decoder(quantized(directories["llama"], dtype))
    together = [subject.run(step) for step in STEPS]
    for which, (prompt, last) in enumerate(((3, 1), (29, 1), (70, 40))):
        alone = [subject.run(batch([0], [prompt], [which])), subject.run(batch([prompt], [1], [which]))]
        chunks = [(prompt + 1, last // 3), (prompt + 1 + last // 3, last - last // 3)] if last > 1 else [(prompt + 1, 1)]
        alone.append([subject.run(batch([start], [count], [which])) for start, count in chunks][-1])
        for step, logits in zip(together, alone, strict=True):
            assert torch.equal(step[which], logits[0])


def test_packed_weights_take_a_quarter_of_float32_and_the_module_keeps_none(directories: dict[str, Path]) -> None:
    def weights(runner: Runner) -> int:
        return decoder(runner).weight_bytes - 2 * 4 * VOCABULARY * 32  # embeddings and output stay as they are

    plain = Runner(load_model(directories["llama"], "float32"), KvCache(BLOCKS, BLOCK))
    plain.check()
    runner = quantized(directories["llama"])
    assert weights(runner) < 0.26 * weights(plain)
    assert runner.weight_bytes < 2 * 4 * VOCABULARY * 33


def test_wrong_logits_are_found_out_at_load(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = quantized(directories["llama"])
    for layer in runner.model.model.layers:
        layer.self_attn.v_proj.scales.data *= 2
    expected = run(runner)
    options = {"num_blocks": BLOCKS, "max_positions": 256, "threads": 1, "cache": CACHE, "ranks": Ranks()}
    assert error(run(decoder_of(runner, **options)), expected) < 0.05  # the module's scales are what counts
    runner = quantized(directories["llama"])

    def mistaken(*arguments: Any) -> Description:
        found = describe(*arguments)
        found.layers[0].call = replace(found.layers[0].call, scale=found.layers[0].call.scale * 2)
        return found

    monkeypatch.setattr("deployments.engine.native.proof.describe", mistaken)
    with pytest.raises(Disproved, match="other logits"):
        decoder_of(runner, **options)


def test_chunks_and_preemption_change_no_token(directories: dict[str, Path]) -> None:
    prompts = [
        [(7 * number + place) % VOCABULARY for place in range(length)] for number, length in enumerate((3, 17, 30, 1, 9, 40))
    ]
    sampling = Sampling(temperature=0.0, max_tokens=12)
    roomy = EngineSettings(kv_cache_bytes=1 << 22, max_batch_tokens=256, threads=1, native=True)
    tight = roomy.model_copy(update={"max_batch_tokens": 16, "max_sequences": 8})
    answers = []
    for options, blocks in ((roomy, None), (tight, 5)):
        with LocalEngine(directories["llama"], settings=options, blocks=blocks, dtype="bfloat16", quantization="int8") as engine:
            assert isinstance(engine.shard.runner, Decoder)
            answers.append([result.token_ids for result in engine.generate(prompts, sampling)])
            preempted = engine.engine.stats().preemptions
    assert preempted > 0
    assert answers[0] == answers[1]
