"""Whether a model's weights are numbers. One that is not would end every answer that it touches, so such a model never starts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cluster.errors import ModelNotServable


def require(model: nn.Module, name: str) -> None:
    """Raises ModelNotServable that names the first parameter with a NaN or an infinity."""
    for parameter, tensor in model.named_parameters():
        if not is_finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelNotServable(f"{name}: {parameter} holds numbers that are not finite in {kind}; the weights are damaged")


@torch.inference_mode()
def is_finite(tensor: Tensor) -> bool:
    """One pass at the speed of memory: extremes are NaN where any number is. `torch.isfinite` takes twenty times as long."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no extremes of 8-bit floats
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(wide.detach()))
