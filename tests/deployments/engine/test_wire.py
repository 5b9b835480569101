"""What goes through which wire, and what DeepSpeed is told of a rank's place."""

from __future__ import annotations

import os

import pytest
import torch

from deployments.engine import wire
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.wire import Nccl


class Spy:
    """A wire that remembers what went through it."""

    def __init__(self) -> None:
        self.went: list[str] = []

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.went.append(f"broadcast {tensor.device.type}")

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.went.append(f"sum {tensor.device.type}")


def test_numbers_of_a_gpu_take_its_own_wire_and_messages_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    messages, sums = Spy(), Spy()
    monkeypatch.setattr(wire.dist, "all_reduce", sums.all_reduce)
    between = Nccl(messages)
    between.broadcast(torch.zeros(1))
    between.all_reduce(torch.zeros(1))
    between.all_reduce(torch.zeros(1, device="meta"))  # any that is no CPU
    assert messages.went == ["broadcast cpu", "sum cpu"]
    assert sums.went == ["sum meta"]


@pytest.mark.parametrize(
    ("address", "device", "local_rank", "accelerator"),
    [
        ("file:///tmp/x/y", "cpu", "1", "cpu"),
        ("file:///tmp/x/y", "cuda:1", "1", "cuda"),
        ("file:///tmp/x/y", "cuda:0", "0", "cuda"),  # as Ray has it: each shard sees one GPU, its own
        ("tcp://10.0.0.1:999", "cuda:0", "0", "cuda"),
    ],
)
def test_deepspeed_takes_the_gpu_that_this_process_sees(
    address: str, device: str, local_rank: str, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    wire._set_environment(Rendezvous(address, 1, 2, 60), device)
    assert (os.environ["LOCAL_RANK"], os.environ["DS_ACCELERATOR"]) == (local_rank, accelerator)
    assert os.environ["RANK"] == "1"
