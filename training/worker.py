"""The train loop of one Ray Train worker: a DeepSpeed engine, ZeRO over gloo or nccl, reports and checkpoints.

It knows its run only by a `Job`, and where it stands only by the newest whole checkpoint: started again, it goes on from there.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import priority
from cluster.storage import Storage
from training.checkpoint import Checkpoints
from training.config import OptimisationConfig, Recipe
from training.prepared import Prepared

logger = logging.getLogger(__name__)

DATA, MODEL = "data", "model"
"""Names in the run's storage: what the workers read and what the first of them leaves."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker of a run is told."""

    recipe: Recipe
    uri: str
    """The run's storage."""
    report_every: int = 20
    """Optimiser steps between two reports. Ray takes one report in two seconds; more would hold the loop up."""


def train(job: Job) -> None:
    """Runs on every rank. Reports `step`, `loss` (mean since the last report, of this rank), `learning_rate`, `tokens` (of all
    ranks), `tokens_per_s`, `resumed_from` and `pid`; leaves the model directory in the run's storage under the name `model`."""
    import torch
    from ray import train as ray_train

    priority.step_back()  # behind what is served
    context = ray_train.get_context()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    rank, world = context.get_world_rank(), context.get_world_size()
    prepared = Prepared.load(Storage(job.uri).fetch(DATA))
    engine = _engine(job.recipe, prepared, world)
    checkpoints = Checkpoints(f"{job.uri}/checkpoints", rank, world)
    start = _resume(engine, checkpoints)
    loop = _Loop(job, prepared, engine, rank, world, start)
    for step in range(start, loop.num_steps):
        loop.take(step)
        done = step + 1
        if done % job.report_every == 0 or done == loop.num_steps:
            ray_train.report(loop.report(done))
        if done % job.recipe.optimisation.checkpoint_every == 0 and done < loop.num_steps:
            checkpoints.save(engine, done)
    if rank == 0:
        _publish_model(engine, prepared, Storage(job.uri))


class _Loop:
    """One worker's walk over its share of the rows."""

    def __init__(self, job: Job, prepared: Prepared, engine: Any, rank: int, world: int, start: int) -> None:
        self.num_steps = prepared.num_steps(job.recipe)
        self._optimisation = job.recipe.optimisation
        self._rows, self._engine, self._start = prepared.rows, engine, start
        self._share = self._optimisation.global_rows // world
        self._offset = rank * self._share
        self._losses: list[float] = []
        self._clock, self._reported = time.monotonic(), start

    def take(self, step: int) -> None:
        self._rate = learning_rate(step, self.num_steps, self._optimisation)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._rate
        loss = self._engine(*self._batch(step))
        self._engine.backward(loss)
        self._engine.step()
        self._losses.append(loss.item())

    def report(self, done: int) -> dict[str, float | int]:
        now, row_tokens = time.monotonic(), self._rows.input_ids.shape[1] * self._optimisation.global_rows
        report = {
            "step": done,
            "steps": self.num_steps,
            "loss": sum(self._losses) / len(self._losses),
            "learning_rate": self._rate,
            "tokens": done * row_tokens,
            "tokens_per_s": (done - self._reported) * row_tokens / max(now - self._clock, 1e-9),
            "resumed_from": self._start,
            "pid": os.getpid(),
        }
        self._losses, self._clock, self._reported = [], now, done
        return report

    def _batch(self, step: int) -> list[Any]:
        import torch

        first = step * self._optimisation.global_rows + self._offset
        rows = self._rows
        arrays = (rows.input_ids, rows.labels, rows.position_ids)
        return [torch.from_numpy(array[first : first + self._share]).long().to(self._engine.device) for array in arrays]


def learning_rate(step: int, num_steps: int, config: OptimisationConfig) -> float:
    """Linear warm-up, then a cosine down to zero. A function of the step alone, so that resuming needs no scheduler's state."""
    warmup = max(1, round(config.warmup_share * num_steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def deepspeed_config(config: OptimisationConfig, world: int, on_cpu: bool) -> dict[str, Any]:
    """ZeRO with torch's own AdamW: DeepSpeed's is compiled on first use and would need a compiler."""
    adam = {"lr": config.learning_rate, "betas": list(config.betas), "eps": 1e-8, "weight_decay": config.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": config.global_rows // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm,
        "steps_per_print": 1 << 30,
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True, "fused": True}},
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": not on_cpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": 1 << 25,
            "allgather_bucket_size": 1 << 25,
        },
        "zero_allow_untested_optimizer": True,
    }


def _engine(recipe: Recipe, prepared: Prepared, world: int) -> Any:
    import deepspeed
    import deepspeed.ops
    from ray.train.torch import get_device

    from training.model import Learner, build, product_dtype

    device = get_device()
    on_cpu = device.type == "cpu"
    if on_cpu:
        # The shared-memory all-reduce would be compiled on first use: half a minute and a toolchain for one machine's gain.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # On CPU the plain attention is faster forward and backward than the flash kernel in bfloat16 at these lengths.
    model = build(recipe.model, prepared.tokenizer, recipe.seed, attention="eager" if on_cpu else "sdpa")
    learner = Learner(model, product_dtype(recipe.optimisation.dtype, device))
    engine, *_ = deepspeed.initialize(
        model=learner, model_parameters=list(learner.parameters()), config=deepspeed_config(recipe.optimisation, world, on_cpu)
    )
    return engine


def _resume(engine: Any, checkpoints: Checkpoints) -> int:
    """Step to start from. The first rank decides for all, for storage may look different from one moment to the next."""
    import torch.distributed

    chosen = [checkpoints.latest() if checkpoints.rank == 0 else None]
    torch.distributed.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        return 0
    checkpoints.load(engine, chosen[0])
    logger.info("resumed from the checkpoint of step %d", chosen[0])
    return chosen[0]


def _publish_model(engine: Any, prepared: Prepared, storage: Storage) -> None:
    """A directory that `from_pretrained` and our own engine read: safetensors, tokenizer, chat template, generation config."""
    from transformers import GenerationConfig

    model, tokenizer = engine.module.model, prepared.tokenizer
    with tempfile.TemporaryDirectory(prefix="mmaas-model-") as folder:
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        storage.publish(Path(folder), MODEL)
