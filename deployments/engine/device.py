"""Which device a rank computes on. Knows settings and counts, no tensor."""

from __future__ import annotations

from collections.abc import Callable

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from cluster.types import Quantization

FP8_NEEDS = (
    "quantization=fp8 needs GPUs that multiply it (Ada, Hopper or newer), and engine.device=cuda; use int8, which CPUs multiply too"
)


def choose(wanted: str, gpu: int | None, visible: Callable[[], int]) -> str:
    """`cpu` or `cuda:N`, for a rank whose own GPU is number `gpu` among the `visible` ones of its process; None: it has none.

    Raises ModelNotServable where a GPU is demanded and there is none: nothing is served from the CPU instead.
    """
    if wanted == "cpu" or (wanted == "auto" and gpu is None):
        return "cpu"
    if gpu is not None and gpu < visible():
        return f"cuda:{gpu}"
    if wanted == "auto":
        return "cpu"
    why = "no GPU was reserved for this shard" if gpu is None else f"torch sees {visible()} of the {gpu + 1} that its rank needs"
    raise ModelNotServable(
        f"engine.device=cuda, but {why}; check the driver, torch's build and CUDA_VISIBLE_DEVICES", param="device"
    )


def reserved(settings: EngineSettings, tp: int, gpus: float) -> EngineSettings:
    """`device` decided for a group of `tp` shards by what the cluster has, so that all of them do alike."""
    if settings.device != "auto":
        return settings
    device = "cuda" if gpus >= tp * settings.gpus_per_shard else "cpu"
    return settings.model_copy(update={"device": device})


def multiplies(quantization: Quantization | None, device: str) -> None:
    """Raises ModelNotServable for weights that `engine.device` doesn't promise to multiply; `auto` may come to be CPUs."""
    if quantization == "fp8" and device != "cuda":
        raise ModelNotServable(FP8_NEEDS, param="quantization")


def bundle(settings: EngineSettings) -> dict[str, float]:
    """What one shard reserves in Ray; `device` is decided."""
    gpus = {"GPU": settings.gpus_per_shard} if settings.device == "cuda" else {}
    return {"CPU": settings.cpus_per_shard} | gpus


def visible_gpus() -> int:
    import torch

    return int(torch.cuda.device_count())
