"""Numbers in eight bits with a scale: how they are rounded, and the product of rows with weights. Knows nothing of models.

    int8    integers from -127 to 127; sums are exact integers
    fp8     e4m3: 4 bits of exponent, 3 of mantissa, up to 448; sums in float32

Symmetric, without a zero point: a number is scale * q. Weights have a scale for each output, found once; rows (tokens) have one
each, found in every step, so that what a row gives depends on that row alone. This is the specification of `native/int8.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import ModelNotServable
from cluster.types import Quantization
from deployments.engine.device import FP8_NEEDS

SMALLEST = 2.0**-100
"""A row whose numbers are all of less is zero: the inverse of its scale would be infinite."""


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of eight-bit numbers. `sums` multiplies `R x K` with the transpose of `N x K`, scales aside, to float32."""

    name: Quantization
    dtype: torch.dtype
    largest: float
    sums: Callable[[Tensor, Tensor], Tensor]


def quantize(rows: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """`R x K` numbers as `R x K` eight-bit ones and `R` float32 scales. Of a row that isn't finite the scale isn't either."""
    rows = rows.float()
    widest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    inverse = torch.where(widest > SMALLEST, form.largest / widest, 0.0)
    scaled = rows * inverse[:, None]
    if not form.dtype.is_floating_point:
        scaled = scaled.nan_to_num_(0.0).round_()  # ties to even
    return scaled.to(form.dtype), widest / form.largest


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """float32."""
    return numbers.float() * scales[:, None]


def product(rows: Tensor, weight: Tensor, scales: Tensor, form: Format) -> Tensor:
    """`R x N` float32: rows of any floating type, rounded to eight bits, times the transpose of the quantised `N x K` weight."""
    numbers, row_scales = quantize(rows, form)
    return form.sums(numbers, weight) * row_scales[:, None] * scales


def require(form: Format, device: torch.device) -> None:
    """Raises ModelNotServable where the device doesn't multiply such numbers. On CPUs fp8 is only simulated, for tests."""
    if form.dtype.is_floating_point and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ModelNotServable(FP8_NEEDS, param="quantization")


def _integer_sums(rows: Tensor, weight: Tensor) -> Tensor:
    if weight.shape[1] < 8:  # torch's integer product of one input is wrong on CPUs; of so few this is exact
        return rows.float() @ weight.float().T
    if not rows.is_cuda:
        return torch._int_mm(rows, weight.T).float()
    few = max(0, 17 - len(rows))  # CUDA's takes more than 16 rows
    return torch._int_mm(torch.nn.functional.pad(rows, (0, 0, 0, few)), weight.T)[: len(rows)].float()


def _fp8_sums(rows: Tensor, weight: Tensor) -> Tensor:
    if not rows.is_cuda or any(size % 16 for size in weight.shape):
        return rows.float() @ weight.float().T
    one = torch.ones((), device=rows.device)
    return torch._scaled_mm(rows, weight.T, scale_a=one, scale_b=one, out_dtype=torch.float32)


INT8 = Format("int8", torch.int8, 127.0, _integer_sums)
FP8 = Format("fp8", torch.float8_e4m3fn, 448.0, _fp8_sums)
FORMATS: dict[str, Format] = {form.name: form for form in (INT8, FP8)}
