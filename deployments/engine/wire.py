"""How ranks find each other, and what they talk through: memory that they share where all of them can, else sockets.

They join one `torch.distributed` group over gloo per process. On one node they meet through a file, so no port is opened for it;
over several nodes through the leader's TCP store.
"""

from __future__ import annotations

import ctypes
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deployments.engine.native import build
from deployments.engine.native.meeting import Meeting, Place
from deployments.engine.rendezvous import Rendezvous

log = logging.getLogger(__name__)


class Wire(Protocol):
    """What ranks talk through. Every rank makes the same calls, with tensors of the same size."""

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's to all."""

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place."""


class Gloo:
    """Sockets, between any machines."""

    def broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, 0)

    def all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)


class Nccl:
    """Numbers on GPUs through NCCL, without passing the host; what ranks tell each other through another wire."""

    def __init__(self, messages: Wire) -> None:
        self.messages = messages

    def broadcast(self, tensor: Tensor) -> None:
        self.messages.broadcast(tensor)

    def all_reduce(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu":
            self.messages.all_reduce(tensor)
        else:
            dist.all_reduce(tensor)


def join(rendezvous: Rendezvous, native: Path | None, device: str = "cpu") -> Wire:
    """Once per process. `native` is where compiled parts are kept or built, for shared memory; None: sockets. `device`: where
    this rank computes, `cpu` or `cuda:N`; all ranks on the same kind."""
    _set_environment(rendezvous, device)
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.set_device(device)  # before NCCL or DeepSpeed take the first one
    import deepspeed.comm

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=rendezvous.address,
        rank=rendezvous.rank,
        world_size=rendezvous.size,
        timeout=timedelta(seconds=rendezvous.timeout_s),
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # ours does the same, and sleeps while it waits
    deepspeed.comm.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    meeting = _meet(rendezvous, native)
    dist.barrier()
    messages: Wire = meeting or Gloo()
    wire = Nccl(messages) if on_gpu else messages
    if not isinstance(wire, Gloo):  # DeepSpeed's own way
        _reduce_through(wire)
    return wire


def _meet(rendezvous: Rendezvous, native: Path | None) -> Meeting | None:
    """Shared memory, if every rank can have it: one that reduces another way would hang the rest."""
    meeting = None
    library = _library(native) if rendezvous.one_node else None
    place = _place(library, rendezvous)
    if library and place:
        try:
            meeting = Meeting(library, place, rendezvous.rank, rendezvous.size, rendezvous.timeout_s)
        except OSError as error:
            log.warning("ranks talk over gloo: this one can't map the leader's memory", extra={"reason": str(error)})
    if all_agree(meeting is not None):
        return meeting
    if meeting:
        meeting.leave()
    return None


def _library(native: Path | None) -> ctypes.CDLL | None:
    if native is None:
        return None
    try:
        return build.library(native)
    except build.NativeUnavailable as error:
        log.warning("ranks talk over gloo: there are no compiled parts", extra={"reason": str(error)})
        return None


def _place(library: ctypes.CDLL | None, rendezvous: Rendezvous) -> Place | None:
    """The leader makes it and tells the others; None if it could not."""
    numbers = torch.zeros(4, dtype=torch.int64)
    if library and rendezvous.rank == 0:
        try:
            numbers = torch.tensor(Place.create(library, rendezvous.size).numbers())
        except OSError as error:
            log.warning("ranks talk over gloo: there is no memory to share", extra={"reason": str(error)})
    dist.broadcast(numbers, 0)
    return Place(*numbers.tolist()) if numbers.any() else None


def _reduce_through(wire: Wire) -> None:
    """Every row-parallel layer of DeepSpeed's ends in this call of its backend, over all ranks."""
    import deepspeed.comm

    def all_reduce(tensor: Tensor, op: Any = deepspeed.comm.ReduceOp.SUM, group: Any = None) -> Tensor:
        assert op == deepspeed.comm.ReduceOp.SUM, "ranks only sum"
        wire.all_reduce(tensor)
        return tensor

    deepspeed.comm.comm.cdb.inference_all_reduce = all_reduce


def all_agree(mine: bool) -> bool:
    """Whether every rank says yes."""
    votes = torch.tensor([int(mine)])
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def smallest(mine: int) -> int:
    """Of all ranks' numbers."""
    numbers = torch.tensor([mine])
    dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
    return int(numbers)


def _set_environment(rendezvous: Rendezvous, device: str) -> None:
    """What DeepSpeed reads. On GPUs it takes the one of the local rank among those that this process sees."""
    kind, _, number = device.partition(":")
    name = rendezvous.address.rpartition("/")[2]
    os.environ |= {
        "RANK": str(rendezvous.rank),
        "LOCAL_RANK": number or str(rendezvous.rank if rendezvous.one_node else 0),
        "WORLD_SIZE": str(rendezvous.size),
        "LOCAL_SIZE": str(rendezvous.size if rendezvous.one_node else 1),
        "MASTER_ADDR": name.partition(":")[0],
        "MASTER_PORT": name.partition(":")[2] or "0",
        "DS_ACCELERATOR": kind,
    }
    if rendezvous.one_node:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
