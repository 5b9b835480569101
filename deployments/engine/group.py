"""The ranks of one model: how the leader's batches reach them, and how the model is cut. What they talk through is in `wire.py`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import ModelNotServable, ReplicaLost
from deployments.engine.batch import Ints
from deployments.engine.native.meeting import Meeting
from deployments.engine.orders import Order, pack, unpack
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.wire import Wires, all_agree, join, smallest

log = logging.getLogger(__name__)

HEAD = 4096
"""Numbers in the first message of a step. A longer batch needs a second message."""
PING, STOP = 0, -1
ORDER = -2
"""The next number is the order's length in bytes, which come in a message of their own."""
REFUSALS = (AssertionError, ValueError, NotImplementedError)
"""How DeepSpeed says that it can't cut a model. Other RuntimeErrors are a lost rank, memory that is full, or our mistake."""


class Group:
    """A joined group of two or more ranks; rank 0 leads. A process joins once; a second model shares the group."""

    wires: ClassVar[Wires | None] = None
    joined: ClassVar[str | None] = None  # the address where this process met its others

    def __init__(self, rendezvous: Rendezvous, *, native: Path | None, device: str = "cpu") -> None:
        """`native` is where compiled parts are kept or built, for shared memory; None: gloo. `device`: see `wire.join`."""
        self.rank, self.size = rendezvous.rank, rendezvous.size
        self._buffer = torch.zeros(HEAD, dtype=torch.int32)
        assert Group.joined in (None, rendezvous.address), "this process belongs to a group of other ranks already"
        self.place = rendezvous.place
        Group.wires, Group.joined = Group.wires or join(rendezvous, native, device), rendezvous.address
        self._wire, self._stage = Group.wires.all, Group.wires.stage

    @property
    def meeting(self) -> Meeting | None:
        """The shared memory of this stage's ranks, if they have any."""
        return self._stage if isinstance(self._stage, Meeting) else None

    @property
    def talk(self) -> int:
        """How far this rank has come in talking with the others."""
        return self._wire.talk

    def shard(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Cut a whole model to this rank's part of every layer (DeepSpeed AutoTP, Megatron-style tensor parallelism).

        A model on the meta device stays there: what is cut are its modules and shapes. Raises ModelNotServable when DeepSpeed
        can't, or leaves (almost) everything on every rank.
        """
        import deepspeed

        before = sum(parameter.numel() for parameter in model.parameters())
        buffers = dict(model.named_buffers())
        try:
            with _stays_on_meta(model):
                engine = deepspeed.init_inference(
                    model, tensor_parallel={"tp_size": self.place.tp}, dtype=dtype, replace_with_kernel_inject=False
                )
        except REFUSALS as error:
            raise ModelNotServable(f"DeepSpeed can't cut {type(model).__name__} into {self.place.tp} parts: {error}") from error
        after = sum(parameter.numel() for parameter in engine.module.parameters())
        if after == before:
            raise ModelNotServable(
                f"DeepSpeed left {type(model).__name__} whole on each of {self.place.tp} ranks; serve it with --tp 1"
            )
        _restore(engine.module, buffers)
        log.info("sharded", extra={"rank": self.rank, "parameters": after, "of": before})
        return engine.module  # type: ignore[no-any-return]

    def all_agree(self, mine: bool) -> bool:
        """Whether every rank says yes."""
        return all_agree(mine)

    def smallest(self, mine: int) -> int:
        """Of all ranks' numbers."""
        return smallest(mine)

    def all_reduce(self, numbers: Tensor) -> None:
        """Sum over the ranks of this stage, in place."""
        self._stage.all_reduce(numbers)

    def send(self, batch: Ints) -> None:
        """Leader: the next step's batch to every other rank."""
        self._buffer[0] = len(batch)
        head = min(len(batch), HEAD - 1)
        self._buffer[1 : head + 1] = torch.from_numpy(batch[:head])
        self._wire.broadcast(self._buffer)
        if len(batch) > head:
            self._wire.broadcast(torch.from_numpy(np.ascontiguousarray(batch[head:])))

    def order(self, order: Order) -> None:
        """Leader: what every other rank is to do before the next batch."""
        packed = torch.frombuffer(bytearray(pack(order)), dtype=torch.uint8).to(torch.int32)
        self._buffer[:2] = torch.tensor([ORDER, len(packed)])
        self._wire.broadcast(self._buffer)
        self._wire.broadcast(packed)

    def receive(self) -> Ints | Order | None:
        """Follower: wait for the next batch or order, and answer pings; None when the leader has stopped."""
        while True:
            self._wire.broadcast(self._buffer)
            length = int(self._buffer[0])
            if length == STOP:
                return None
            if length == PING:
                self._count()
                continue
            if length == ORDER:
                packed = torch.empty(int(self._buffer[1]), dtype=torch.int32)
                self._wire.broadcast(packed)
                return unpack(packed.to(torch.uint8).numpy().tobytes())
            batch = self._buffer[1 : min(length, HEAD - 1) + 1].numpy().copy()
            if length > HEAD - 1:
                rest = torch.empty(length - (HEAD - 1), dtype=torch.int32)
                self._wire.broadcast(rest)
                batch = np.concatenate([batch, rest.numpy()])
            return batch

    def ping(self) -> None:
        """Leader, when idle: a round through every rank. Raises ReplicaLost when one doesn't answer in time."""
        self._buffer[0] = PING
        self._wire.broadcast(self._buffer)
        if self._count() != self.size:
            raise ReplicaLost("a rank answered a ping with nonsense")

    def stop(self) -> None:
        self._buffer[0] = STOP
        self._wire.broadcast(self._buffer)

    def _count(self) -> int:
        present = torch.ones(1)
        self._wire.all_reduce(present)
        return int(present)


@contextlib.contextmanager
def _stays_on_meta(model: nn.Module) -> Iterator[None]:
    """DeepSpeed ends by giving a meta model memory without content, which would also drop its notes on the cut."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield
        return
    model.to_empty = lambda **_: model  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.to_empty


def _restore(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """DeepSpeed converts every buffer to the model's type; rotary frequencies in 16 bits would turn far positions wrong."""
    for name, _ in list(model.named_buffers()):
        if name in buffers:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffers[name]
