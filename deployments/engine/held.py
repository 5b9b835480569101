"""What one rank holds of a model: awake, a runner and its adapters; asleep, nothing but the knowledge of what it was. Between two
steps it can fall asleep, wake, and take other weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import PlatformError, Unavailable
from deployments.engine import sameness
from deployments.engine.memory import available, give_back
from deployments.engine.shard_spec import ShardSpec

if TYPE_CHECKING:
    from deployments.engine.adapters import Adapters
    from deployments.engine.runners import AnyRunner, Runners

SWAP_ROOM = 2.5
"""Times a model's weights that a machine must have free for a second set of all ranks: as loaded, as packed, and some to spare."""


class Held:
    """Awake from the beginning. `spec` says what is held, with the blocks that fit."""

    def __init__(self, spec: ShardSpec, runners: Runners) -> None:
        self._runners = runners
        self.running: AnyRunner | None
        self.running, self.spec = runners.load(spec)
        self.adapters = self._adapters()
        give_back()

    def _adapters(self) -> Adapters:
        from deployments.engine.adapters import Adapters
        from deployments.engine.runner import DTYPES

        return Adapters(self.runner, self.spec.directory, self._runners.cuts, DTYPES[self.spec.model.dtype])

    @property
    def runner(self) -> AnyRunner:
        """Raises Unavailable while it sleeps."""
        if self.running is None:
            raise Unavailable("the model is asleep", retry_after_s=5)
        return self.running

    def sleep(self) -> None:
        self._put_down()
        give_back()

    def wake(self) -> None:
        """Raises PlatformError for files that can't be loaded any more."""
        self._pick_up()
        give_back()

    def swap(self, directory: Path) -> None:
        """The new weights are loaded beside the old ones where memory allows on every rank, else in their place. Raises
        PlatformError for weights that can't take that place; the old ones are held then."""
        before, group = self.spec, self._runners.group
        place = before.rendezvous.place
        self._runners.everywhere(
            lambda: sameness.require(before.directory, directory, before.model, place.tp, place.pp), before.directory.name
        )
        beside = available() > SWAP_ROOM * before.model.weight_bytes
        if not (group.all_agree(beside) if group else beside):
            self.sleep()
        try:
            loaded, spec = self._runners.load(replace(before, directory=directory))
        except PlatformError:
            self._pick_up()
            raise
        self._put_down()
        self.running, self.spec = loaded, spec
        self.adapters.move(loaded, self._runners.cuts)
        give_back()

    def close(self) -> None:
        self._put_down()
        self.adapters.close()

    def _put_down(self) -> None:
        running, self.running = self.running, None
        self.adapters.rest()
        if running:
            running.close()

    def _pick_up(self) -> None:
        if self.running is None:
            self.running, self.spec = self._runners.load(self.spec)
            self.adapters.move(self.running, self._runners.cuts)
