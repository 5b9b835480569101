"""Eight-bit numbers: how far rounding goes, and products that are what plain arithmetic says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import ModelNotServable
from deployments.engine.quantization import FORMATS, FP8, INT8, SMALLEST, Format, dequantize, product, quantize, require

SIZES = {"rows": st.integers(1, 40), "inputs": st.integers(1, 70), "outputs": st.integers(1, 70), "seed": st.integers(0, 1 << 30)}
FORMS = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def numbers(rows: int, inputs: int, seed: int) -> Tensor:
    """Of many sizes: every row and every number has its own."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, 1, generator=random).mul(8).exp()
    return torch.randn(rows, inputs, generator=random).pow(3) * sizes


@settings(deadline=None)
@given(rows=SIZES["rows"], inputs=SIZES["inputs"], seed=SIZES["seed"])
def test_an_int8_number_is_off_by_half_a_step_at_most(rows: int, inputs: int, seed: int) -> None:
    x = numbers(rows, inputs, seed)
    q, scales = quantize(x, INT8)
    assert (dequantize(q, scales) - x).abs().le(scales[:, None] * 0.5001).all()
    assert q.abs().amax(1).eq(127).all(), "the largest of a row uses the whole range"


@settings(deadline=None)
@given(rows=SIZES["rows"], inputs=SIZES["inputs"], seed=SIZES["seed"])
def test_an_fp8_number_is_off_by_a_sixteenth_at_most(rows: int, inputs: int, seed: int) -> None:
    x = numbers(rows, inputs, seed)
    q, scales = quantize(x, FP8)
    step = 2.0**-10 * scales[:, None]  # half of what lies between the smallest numbers
    assert ((dequantize(q, scales) - x).abs() <= torch.maximum(x.abs() * 1.001 / 16, step)).all()
    assert q.float().abs().amax(1).eq(448).all()


@settings(deadline=None)
@given(**SIZES)
def test_int8_products_are_exact_integers_times_the_scales(rows: int, inputs: int, outputs: int, seed: int) -> None:
    x, w = numbers(rows, inputs, seed), numbers(outputs, inputs, seed + 1)
    (xq, xs), (wq, ws) = quantize(x, INT8), quantize(w, INT8)
    exact = (xq.double() @ wq.double().T).float()  # integers below 2^53
    assert torch.equal(product(x, wq, ws, INT8), exact * xs[:, None] * ws)


@settings(deadline=None)
@given(**SIZES)
def test_fp8_products_are_those_of_the_rounded_numbers(rows: int, inputs: int, outputs: int, seed: int) -> None:
    x, w = numbers(rows, inputs, seed), numbers(outputs, inputs, seed + 1)
    (xq, xs), (wq, ws) = quantize(x, FP8), quantize(w, FP8)
    rounded, weights = dequantize(xq, xs).double(), dequantize(wq, ws).double()
    found = product(x, wq, ws, FP8)
    bound = rounded.abs() @ weights.abs().T
    assert ((found.double() - rounded @ weights.T).abs() <= 1e-5 * bound).all()


@FORMS
def test_zeros_stay_zeros_and_what_is_too_small_becomes_one(form: Format) -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [SMALLEST / 2, 0.0, -SMALLEST / 3], [1e-42, 0.0, 0.0], [1.0, 0.0, 1e-30]])
    q, scales = quantize(x, form)
    assert q[:3].float().eq(0).all()
    assert q[3].float().tolist() == [form.largest, 0, 0]
    assert scales.isfinite().all()
    assert product(x, q, scales, form)[:3].eq(0).all()


@FORMS
def test_an_outlier_takes_the_precision_of_its_own_row_alone(form: Format) -> None:
    x, w = numbers(3, 64, 1), numbers(8, 64, 2)
    wild = x.clone()
    wild[1, 5] = 3e38
    q, scales = quantize(w, form)
    plain, found = product(x, q, scales, form), product(wild, q, scales, form)
    assert torch.equal(plain[[0, 2]], found[[0, 2]])
    assert dequantize(*quantize(wild, form)).isfinite().all()


@FORMS
@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_not_finite_gives_no_finite_result(form: Format, number: float) -> None:
    x, (q, scales) = torch.ones(2, 8), quantize(torch.ones(4, 8), form)
    x[1, 3] = number
    found = product(x, q, scales, form)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


@FORMS
def test_a_row_gives_the_same_beside_any_others(form: Format) -> None:
    x, (q, scales) = numbers(40, 128, 3), quantize(numbers(48, 128, 4), form)
    together = product(x, q, scales, form)
    alone = torch.cat([product(row[None], q, scales, form) for row in x])
    torch.testing.assert_close(
        together, alone, rtol=0 if form is INT8 else 1e-5, atol=0 if form is INT8 else 1e-5 * float(together.abs().max())
    )


def test_a_rank_without_inputs_adds_nothing() -> None:
    q, scales = quantize(torch.empty(4, 0), INT8)
    assert product(torch.empty(3, 0), q, scales, INT8).tolist() == [[0.0] * 4] * 3


def test_fp8_is_refused_on_a_cpu_and_int8_is_not() -> None:
    require(INT8, torch.device("cpu"))
    with pytest.raises(ModelNotServable, match="use int8"):
        require(FP8, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@FORMS
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 32), (17, 128, 48), (40, 4864, 896), (3, 40, 24)])
def test_a_gpu_multiplies_as_the_simulation_does(form: Format, rows: int, inputs: int, outputs: int) -> None:
    require(form, torch.device("cuda"))
    x, (q, scales) = torch.randn(rows, inputs), quantize(torch.randn(outputs, inputs), form)
    found = product(x.cuda(), q.cuda(), scales.cuda(), form).cpu()
    expected = product(x, q, scales, form)
    torch.testing.assert_close(found, expected, rtol=0 if form is INT8 else 1e-2, atol=0 if form is INT8 else 1e-2)
