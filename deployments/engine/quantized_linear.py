"""A linear module with its weights in eight bits, and how a model gets them: as its files are read, or in place.

Quantised is every linear module but the output, which decides between neighbouring tokens, and routers, which decide between
experts. Embeddings, norms and biases stay. What DeepSpeed has cut is quantised by each rank for itself: scales of outputs go with
the outputs, and where inputs are cut each rank has its own scales for its part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import ModelNotServable
from deployments.engine.quantization import FORMATS, Format, product, quantize

ROUTERS = {"gate", "shared_expert_gate", "router"}
SHARE_LEFT = 0.05
"""Of the numbers in matrices, how many may stay as they are in a model that calls itself quantised, embeddings and output aside."""

AT_ONCE = 1 << 18
"""Numbers that are widened to float32 at a time; several threads read weights at once."""


class QuantizedLinear(nn.Module):
    """Stands in the place of a linear module of torch's or DeepSpeed's. On the meta device until `take` has had the weight."""

    def __init__(self, name: str, linear: Any, form: Format) -> None:
        super().__init__()
        self.name, self.form = name, form
        self.bias: Tensor | None = linear.bias
        self._sum: Callable[[Tensor], Any] | None = _sum_over_ranks(linear)
        self.weight = _constant(torch.empty(linear.weight.shape, dtype=form.dtype, device="meta"))
        self.scales: Any = _constant(torch.empty(len(linear.weight), dtype=torch.float32, device="meta"))
        if not linear.weight.is_meta:
            self.weight, self.scales = map(_constant, self.take(linear.weight.detach()))

    def take(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`N x K` numbers, and `N` scales. Raises ModelNotServable for weights that aren't finite."""
        numbers = torch.empty(weight.shape, dtype=self.form.dtype, device=weight.device)
        scales = torch.empty(len(weight), device=weight.device)
        step = max(1, AT_ONCE // max(1, weight.shape[1]))
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            numbers[rows], scales[rows] = quantize(weight[rows], self.form)
        if not scales.isfinite().all():
            raise ModelNotServable(f"{self.name} has weights that are infinite or no numbers; they can't be quantised")
        return numbers, scales

    def forward(self, x: Tensor) -> Tensor:
        y = product(x.reshape(-1, x.shape[-1]), self.weight, self.scales, self.form)
        if self._sum:
            self._sum(y)
        if self.bias is not None:
            y += self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def quantize_model(model: nn.Module, quantization: str) -> None:
    """Put a `QuantizedLinear` in the place of every linear module that isn't one yet; the memory of each goes as its turn comes.

    Raises ModelNotServable for a model whose layers are made of something else.
    """
    for name, linear in linears(model).items():
        put(model, name, linear, FORMATS[quantization])
    for module in model.modules():
        if isinstance(module, QuantizedLinear):  # transformers widens some parameters
            module.weight.data = module.weight.data.to(module.form.dtype)


def put(model: nn.Module, name: str, linear: Any, form: Format) -> QuantizedLinear:
    """Quantise one module of the model; on the meta device, prepare it."""
    quantized = QuantizedLinear(name, linear, form)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, quantized)
    if not linear.weight.is_meta:
        linear.weight.data = torch.empty(0, dtype=linear.weight.dtype)  # somebody may still hold the module
    return quantized


def linears(model: nn.Module) -> dict[str, Any]:
    """What is to be quantised, by name. Raises ModelNotServable where much would be left."""
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    found = {
        name: module
        for name, module in model.named_modules()
        if module is not output and name.rpartition(".")[2] not in ROUTERS and _is_linear(module)
    }
    _require_most(model, found, output)
    return found


def _require_most(model: nn.Module, found: dict[str, Any], output: nn.Module) -> None:
    taken = {f"{name}.weight": module.weight.numel() for name, module in found.items()}
    aside = {
        id(parameter)
        for module in model.modules()
        if module is output or isinstance(module, (nn.Embedding, QuantizedLinear))
        for parameter in module.parameters(recurse=False)
    }
    left = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in taken and id(parameter) not in aside
    }
    if sum(left.values()) > SHARE_LEFT * (sum(taken.values()) + sum(left.values())):
        most = max(left, key=lambda name: left[name])
        raise ModelNotServable(
            f"{type(model).__name__} can't be quantised: {most} and its like are no linear modules; serve it without quantization",
            param="quantization",
        )


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or bool(_kinds(module) & {"LinearLayer", "LinearAllreduce"})


def _sum_over_ranks(linear: nn.Module) -> Callable[[Tensor], Any] | None:
    """What DeepSpeed does with a linear's results on every rank. Raises ModelNotServable for what this module doesn't do."""
    kinds = _kinds(linear)
    if "LinearAllreduce" in kinds and type(linear).__name__ == "LinearAllreduce":
        from deepspeed import comm

        return lambda results: comm.inference_all_reduce(results, group=linear.mp_group)
    if kinds and ("LinearLayer" not in kinds or getattr(linear, "gather_output", False)):
        raise ModelNotServable(f"a {type(linear).__name__} of DeepSpeed can't be quantised; use tp=1", param="quantization")
    return None


def _kinds(module: nn.Module) -> set[str]:
    """By name, because DeepSpeed is loaded only where there are ranks."""
    return {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("deepspeed.")}


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
