"""The ranks of one model: how they find each other, how the leader's batches reach them, and how the model is cut.

`torch.distributed` over gloo (CPU) or nccl (GPU), one group per process. On one node ranks meet through a file, so no port is
opened for it; over several nodes through the leader's TCP store.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from cluster.errors import ModelNotServable, ReplicaLost
from deployments.engine.batch import Ints
from deployments.engine.rendezvous import Rendezvous

log = logging.getLogger(__name__)

HEAD = 4096
"""Numbers in the first message of a step. A longer batch needs a second message."""
PING, STOP = 0, -1


class Group:
    """A joined group of two or more ranks; rank 0 leads. A process joins once; a second model shares the group."""

    def __init__(self, rendezvous: Rendezvous, *, shared_memory: bool) -> None:
        self.rank, self.size = rendezvous.rank, rendezvous.size
        self._buffer = torch.zeros(HEAD, dtype=torch.int32)
        if not dist.is_initialized():
            _join(rendezvous, shared_memory=shared_memory and rendezvous.one_node)

    def shard(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Cut a whole model to this rank's part (DeepSpeed AutoTP, Megatron-style tensor parallelism).

        Raises ModelNotServable when DeepSpeed can't, or leaves (almost) everything on every rank.
        """
        import deepspeed

        before = sum(parameter.numel() for parameter in model.parameters())
        try:
            engine = deepspeed.init_inference(
                model, tensor_parallel={"tp_size": self.size}, dtype=dtype, replace_with_kernel_inject=False
            )
        except (AssertionError, ValueError, RuntimeError, NotImplementedError) as error:
            raise ModelNotServable(f"DeepSpeed can't cut {type(model).__name__} into {self.size} parts: {error}") from error
        after = sum(parameter.numel() for parameter in engine.module.parameters())
        if after == before:
            raise ModelNotServable(
                f"DeepSpeed left {type(model).__name__} whole on each of {self.size} ranks; serve it with --tp 1"
            )
        log.info("sharded", extra={"rank": self.rank, "parameters": after, "of": before})
        return engine.module  # type: ignore[no-any-return]

    def all_agree(self, mine: bool) -> bool:
        """Whether every rank says yes."""
        return _all_agree(mine)

    def all_reduce(self, numbers: torch.Tensor) -> None:
        """Sum over all ranks, in place."""
        dist.all_reduce(numbers)

    def send(self, batch: Ints) -> None:
        """Leader: the next step's batch to every other rank."""
        self._buffer[0] = len(batch)
        head = min(len(batch), HEAD - 1)
        self._buffer[1 : head + 1] = torch.from_numpy(batch[:head])
        dist.broadcast(self._buffer, 0)
        if len(batch) > head:
            dist.broadcast(torch.from_numpy(np.ascontiguousarray(batch[head:])), 0)

    def receive(self) -> Ints | None:
        """Follower: wait for the next batch and answer pings; None when the leader has stopped."""
        while True:
            dist.broadcast(self._buffer, 0)
            length = int(self._buffer[0])
            if length == STOP:
                return None
            if length == PING:
                self._count()
                continue
            batch = self._buffer[1 : min(length, HEAD - 1) + 1].numpy().copy()
            if length > HEAD - 1:
                rest = torch.empty(length - (HEAD - 1), dtype=torch.int32)
                dist.broadcast(rest, 0)
                batch = np.concatenate([batch, rest.numpy()])
            return batch

    def ping(self) -> None:
        """Leader, when idle: a round through every rank. Raises ReplicaLost when one doesn't answer in time."""
        self._buffer[0] = PING
        dist.broadcast(self._buffer, 0)
        if self._count() != self.size:
            raise ReplicaLost("a rank answered a ping with nonsense")

    def stop(self) -> None:
        self._buffer[0] = STOP
        dist.broadcast(self._buffer, 0)

    def _count(self) -> int:
        present = torch.ones(1, dtype=torch.int32)
        dist.all_reduce(present)
        return int(present)


def _join(rendezvous: Rendezvous, *, shared_memory: bool) -> None:
    _set_environment(rendezvous)
    import deepspeed.comm

    dist.init_process_group(
        "gloo",
        init_method=rendezvous.address,
        rank=rendezvous.rank,
        world_size=rendezvous.size,
        timeout=timedelta(seconds=rendezvous.timeout_s),
    )
    if not _all_agree(shared_memory and _can_reduce_in_shared_memory()):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    dist.barrier()
    _unlink_shared_memory(rendezvous)


def _can_reduce_in_shared_memory() -> bool:
    """Build DeepSpeed's kernel, or load the one built before. It needs g++, ninja and Python's headers."""
    from deepspeed.accelerator import get_accelerator

    try:
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("ranks reduce over gloo: DeepSpeed's shared-memory kernel can't be built", extra={"reason": reason})
        return False
    return True


def _all_agree(mine: bool) -> bool:
    """Whether every rank says yes: one that reduces another way would hang the rest."""
    votes = torch.tensor([int(mine)])
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def _set_environment(rendezvous: Rendezvous) -> None:
    """What DeepSpeed reads. MASTER_ADDR also names its shared memory, so it must be unique to the group."""
    name = rendezvous.address.rpartition("/")[2]
    os.environ |= {
        "RANK": str(rendezvous.rank),
        "LOCAL_RANK": str(rendezvous.rank if rendezvous.one_node else 0),
        "WORLD_SIZE": str(rendezvous.size),
        "LOCAL_SIZE": str(rendezvous.size if rendezvous.one_node else 1),  # DeepSpeed's shared memory starts only with it
        "MASTER_ADDR": name.partition(":")[0],
        "MASTER_PORT": name.partition(":")[2] or "0",
        "DS_ACCELERATOR": "cpu",
    }
    if rendezvous.one_node:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def _unlink_shared_memory(rendezvous: Rendezvous) -> None:
    """Every rank has mapped DeepSpeed's segments by now; without names nothing is left behind, however a rank ends."""
    if rendezvous.rank == 0 and rendezvous.one_node:
        for segment in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_*"):  # noqa: S108
            segment.unlink(missing_ok=True)
