"""Rank 0's loop: take commands, step, deliver; when idle, ping every rank. It ends when the replica hangs up."""

from __future__ import annotations

import contextlib
import time

from cluster.errors import PlatformError
from deployments.engine.channel import Abort, Add, Beat, Do, Done, LeaderEnd, Tokens
from deployments.engine.engine import Engine
from deployments.engine.orders import DropAdapter
from deployments.engine.shard import Shard

BEAT_S = 1.0


def lead(shard: Shard, path: str) -> None:
    """Serve the replica that listens at `path`. Raises what breaks the group; returns when the replica is gone."""
    engine = Engine.of(
        shard.execute, shard.spec.num_blocks, shard.spec.settings, choose=shard.choose, launch=shard.launch, depth=shard.depth
    )
    with LeaderEnd(path) as wire, contextlib.suppress(ConnectionError):  # which only the replica's end gives
        wire.send(Beat(engine.stats()))
        _loop(shard, engine, wire)
    engine.drain()
    shard.stop()


def _loop(shard: Shard, engine: Engine, wire: LeaderEnd) -> None:
    last_beat = time.monotonic()
    while (commands := wire.take(0.0 if engine.has_work else BEAT_S)) is not None:
        for command in commands:
            match command:
                case Add(request):
                    engine.add(request)
                case Abort(request_id, index):
                    engine.abort(request_id, index)
                case Do():
                    if outputs := engine.drain():  # an order comes between two steps on every rank
                        wire.send(Tokens(outputs))
                    wire.send(_done(shard, engine, command))
        if engine.has_work:
            if outputs := engine.step():
                wire.send(Tokens(outputs))
        elif not commands:
            shard.ping()
            engine.scheduler.check_integrity()
        if commands or time.monotonic() - last_beat >= BEAT_S:
            wire.send(Beat(engine.stats()))
            last_beat = time.monotonic()


def _done(shard: Shard, engine: Engine, command: Do) -> Done:
    if isinstance(command.order, DropAdapter) and engine.uses(command.order.slot):
        return Done(command.id, f"the adapter in slot {command.order.slot} is in use")
    try:
        shard.command(command.order)
    except PlatformError as error:
        return Done(command.id, error.message)
    return Done(command.id)
