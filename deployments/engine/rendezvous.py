"""Where the ranks of a group meet. Plain data: the replica that arranges the meeting loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.engine.stages import Place


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where and as whom a rank joins. `address` is `file:///…` (one node) or `tcp://HOST:PORT`."""

    address: str
    rank: int
    size: int
    timeout_s: float
    pp: int = 1  # stages that the ranks form, of `size / pp` each
    host: str = ""  # this rank's own address, for groups over several nodes; empty: whatever its host's name means

    @property
    def place(self) -> Place:
        return Place(self.rank, self.size // self.pp, self.pp)

    @property
    def one_node(self) -> bool:
        return self.address.startswith("file:")

    @property
    def stage_on_one_node(self) -> bool:
        """Whether the ranks of a stage share a node: always where there are several stages, as whoever places them makes sure."""
        return self.one_node or self.pp > 1
