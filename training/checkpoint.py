"""Checkpoints of a DeepSpeed group: every rank publishes its own part, and only a whole set of verified parts is resumed from.

Each rank owns one folder of the run's storage, so no rank waits for another's files, and no shared disk is needed while writing.
DeepSpeed's files are pickles: they are read from the run's own storage alone, after their digests matched.
"""

from __future__ import annotations

import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import NotFound, StorageError
from cluster.storage import Storage

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})-of-(\d+)")
_TAG = "parts"


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run as rank `rank` of `world` sees them, below the storage URI `uri`."""

    uri: str
    rank: int
    world: int
    keep: int = 2
    """A damaged newest one has another behind it."""

    def save(self, engine: Any, step: int) -> None:
        """Collective: every rank calls it after `step` steps. When it returns, the checkpoint is whole and durable everywhere."""
        import torch.distributed

        with tempfile.TemporaryDirectory(prefix="mmaas-checkpoint-") as folder:
            engine.save_checkpoint(folder, tag=_TAG, client_state={"step": step})
            self._part(self.rank).publish(folder, self._name(step))
        torch.distributed.barrier()
        self._forget_old()

    def latest(self) -> int | None:
        """Steps of the newest checkpoint of which every part is whole; damaged ones are passed over with a warning."""
        parts = [self._part(rank) for rank in range(self.world)]
        for step in reversed(self._steps(self._part(0))):
            try:
                for part in parts:
                    part.verify(self._name(step))
            except (StorageError, NotFound) as error:
                logger.warning("checkpoint of step %d is not whole and is passed over: %s", step, error)
            else:
                return step
        return None

    def load(self, engine: Any, step: int) -> None:
        """Collective: put the weights and this rank's optimiser state of a whole checkpoint into the engine."""
        with tempfile.TemporaryDirectory(prefix="mmaas-resume-") as folder:
            together = Path(folder, _TAG)
            together.mkdir()
            for rank in {0, self.rank}:  # the weights are in the first part, the optimiser's share in our own
                for file in (self._part(rank).fetch(self._name(step)) / _TAG).iterdir():
                    (together / file.name).symlink_to(file)
            path, state = engine.load_checkpoint(folder, tag=_TAG)
        if path is None or state["step"] != step:
            raise StorageError(f"the checkpoint of step {step} did not load")

    def _forget_old(self) -> None:
        part = self._part(self.rank)
        for step in self._steps(part)[: -self.keep]:
            part.delete(self._name(step))
        part.sweep(older_than_s=0)  # this rank is the only publisher of its part

    def _steps(self, part: Storage) -> list[int]:
        matches = [_NAME.fullmatch(name) for name in part.list()]
        return sorted(int(match[1]) for match in matches if match and int(match[2]) == self.world)

    def _name(self, step: int) -> str:
        return f"step-{step:08d}-of-{self.world}"

    def _part(self, rank: int) -> Storage:
        return Storage(f"{self.uri}/rank-{rank}")
