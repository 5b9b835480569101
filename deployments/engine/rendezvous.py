"""Where the ranks of a group meet. Plain data: the replica that arranges the meeting loads no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where and as whom a rank joins. `address` is `file:///…` (one node) or `tcp://HOST:PORT`."""

    address: str
    rank: int
    size: int
    timeout_s: float

    @property
    def one_node(self) -> bool:
        return self.address.startswith("file:")
