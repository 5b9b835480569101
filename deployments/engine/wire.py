"""How ranks find each other, and what they talk through: memory that they share where all of them can, else sockets.

They join one `torch.distributed` group over gloo per process. On one node they meet through a file, so no port is opened for it;
over several nodes through the leader's TCP store. With several stages, the ranks of a stage sum among themselves, and what goes
from rank 0 to all goes point to point: ranks of other stages are at other steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deployments.engine.native import build
from deployments.engine.native.meeting import Meeting
from deployments.engine.native.meeting import Place as Segment
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.stages import Place

log = logging.getLogger(__name__)

_SIOCGIFADDR = 0x8915
"""Of <linux/sockios.h>."""


class Wire(Protocol):
    """What ranks talk through. Every rank makes the same calls, with tensors of the same size."""

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's to all."""

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place."""

    @property
    def talk(self) -> int:
        """How many of these this rank has begun, in whatever unit; the same on all ranks whenever none waits."""


class Gloo:
    """Sockets, between any machines. `group` None: all ranks."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.talk = 0

    def broadcast(self, tensor: Tensor) -> None:
        self.talk += 1
        dist.broadcast(tensor, group_src=0, group=self._group)

    def all_reduce(self, tensor: Tensor) -> None:
        self.talk += 1
        dist.all_reduce(tensor, group=self._group)


class Line:
    """Sockets, between ranks that are at different steps: rank 0 doesn't wait for those who still compute an earlier one."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._sending: deque[tuple[Tensor, list[Any]]] = deque()
        self._most = 2 * (place.pp + 1)  # messages that may be under way: two a step, and one step more than there are stages
        self.talk = 0

    def broadcast(self, tensor: Tensor) -> None:
        self.talk += 1
        if self._place.rank:
            dist.recv(tensor, 0)
            return
        copy = tensor.clone()
        self._sending.append((copy, [dist.isend(copy, rank) for rank in range(1, self._place.tp * self._place.pp)]))
        if len(self._sending) > self._most:
            for work in self._sending.popleft()[1]:
                work.wait()

    def all_reduce(self, tensor: Tensor) -> None:
        self.talk += 1
        dist.all_reduce(tensor)


class Nccl:
    """Numbers on GPUs through NCCL, without passing the host; what ranks tell each other through another wire."""

    def __init__(self, messages: Wire) -> None:
        self.messages = messages
        self._on_gpu = 0

    @property
    def talk(self) -> int:
        return self.messages.talk + self._on_gpu

    def broadcast(self, tensor: Tensor) -> None:
        self.messages.broadcast(tensor)

    def all_reduce(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu":
            self.messages.all_reduce(tensor)
        else:
            self._on_gpu += 1
            dist.all_reduce(tensor)


@dataclass(frozen=True)
class Wires:
    """What a rank talks through: to all others, and to those of its stage, which sum their parts."""

    all: Wire
    stage: Wire


def join(rendezvous: Rendezvous, native: Path | None, device: str = "cpu") -> Wires:
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
    place = rendezvous.place
    stage = stage_group(place)
    meeting = _meet(rendezvous, native, stage) if place.tp > 1 else None
    dist.barrier()
    messages: Wire = meeting or Gloo(stage)
    among = Nccl(messages) if on_gpu else messages
    if not isinstance(among, Gloo):  # DeepSpeed's own way
        _reduce_through(among)
    return Wires(Line(place) if place.pp > 1 else messages, among)


def stage_group(place: Place) -> Any:
    """The process group of this rank's stage, None where all ranks are one stage. DeepSpeed has one group for a process, made of
    the world's first ranks when it is first asked to cut; it takes one that is there already."""
    if place.pp == 1:
        return None
    from deepspeed.inference.engine import InferenceEngine

    groups = [dist.new_group(list(Place(first, place.tp, place.pp).peers)) for first in range(0, place.tp * place.pp, place.tp)]
    InferenceEngine.inference_mp_group = groups[place.rank // place.tp]
    return InferenceEngine.inference_mp_group


def _meet(rendezvous: Rendezvous, native: Path | None, stage: Any) -> Meeting | None:
    """Shared memory, if every rank of the stage can have it: one that reduces another way would hang the rest."""
    meeting = None
    library = _library(native) if rendezvous.stage_on_one_node else None
    segment = _segment(library, rendezvous.place, stage)
    if library and segment:
        try:
            meeting = Meeting(library, segment, rendezvous.place.part, rendezvous.place.tp, rendezvous.timeout_s)
        except OSError as error:
            log.warning("ranks talk over gloo: this one can't map the leader's memory", extra={"reason": str(error)})
    if all_agree(meeting is not None, stage):
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


def _segment(library: ctypes.CDLL | None, place: Place, stage: Any) -> Segment | None:
    """The stage's first rank makes it and tells the others; None if it could not."""
    numbers = torch.zeros(4, dtype=torch.int64)
    if library and place.part == 0:
        try:
            numbers = torch.tensor(Segment.create(library, place.tp).numbers())
        except OSError as error:
            log.warning("ranks talk over gloo: there is no memory to share", extra={"reason": str(error)})
    dist.broadcast(numbers, group_src=0, group=stage)
    return Segment(*numbers.tolist()) if numbers.any() else None


def _reduce_through(wire: Wire) -> None:
    """Every row-parallel layer of DeepSpeed's ends in this call of its backend, over all ranks."""
    import deepspeed.comm

    def all_reduce(tensor: Tensor, op: Any = deepspeed.comm.ReduceOp.SUM, group: Any = None) -> Tensor:
        assert op == deepspeed.comm.ReduceOp.SUM, "ranks only sum"
        wire.all_reduce(tensor)
        return tensor

    deepspeed.comm.comm.cdb.inference_all_reduce = all_reduce


def all_agree(mine: bool, group: Any = None) -> bool:
    """Whether every rank says yes; of a group, where one is given."""
    votes = torch.tensor([int(mine)])
    dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=group)
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
    if interface := "lo" if rendezvous.one_node else interface_of(rendezvous.host):
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def interface_of(host: str) -> str | None:
    """The network interface with this IPv4 address, so that gloo listens where other nodes know this one; None if none has it."""
    try:
        wanted = socket.inet_aton(host)
    except OSError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                if fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == wanted:
                    return name
    return None
