"""Rank 0's loop: take commands, step, deliver; when idle, ping every rank. It ends when the replica hangs up."""

from __future__ import annotations

import contextlib
import time

from cluster.errors import Conflict, PlatformError
from deployments.engine.channel import Abort, Add, Beat, Do, Done, LeaderEnd, Tokens
from deployments.engine.engine import Engine
from deployments.engine.orders import Order, Swap, forgets
from deployments.engine.shard import Shard

BEAT_S = 1.0


def lead(shard: Shard, path: str) -> None:
    """Serve the replica that listens at `path`. Raises what breaks the group; returns when the replica is gone."""
    engine = Engine.of(shard.execute, shard.spec.num_blocks, shard.spec.settings)
    with LeaderEnd(path) as wire, contextlib.suppress(ConnectionError):  # which only the replica's end gives
        wire.send(Beat(engine.stats()))
        _loop(shard, engine, wire)
    shard.stop()


def _loop(shard: Shard, engine: Engine, wire: LeaderEnd) -> None:
    last_beat = time.monotonic()
    while (commands := wire.take(0.0 if engine.has_work and not shard.is_asleep else BEAT_S)) is not None:
        for command in commands:
            match command:
                case Add(request):
                    engine.add(request)
                case Abort(request_id, index):
                    engine.abort(request_id, index)
                case Do():
                    wire.send(_done(shard, engine, command))
        if engine.has_work and not shard.is_asleep:
            if outputs := engine.step():
                wire.send(Tokens(outputs))
        elif not commands:
            shard.ping()
            engine.scheduler.check_integrity()
        if commands or time.monotonic() - last_beat >= BEAT_S:
            wire.send(Beat(engine.stats()))
            last_beat = time.monotonic()


def _done(shard: Shard, engine: Engine, command: Do) -> Done:
    try:
        obey(shard, engine, command.order)
    except PlatformError as error:
        return Done(command.id, error.message, error.public_code)
    return Done(command.id)


def obey(shard: Shard, engine: Engine, order: Order) -> None:
    """Between two steps. Raises PlatformError for what some rank could not do; the group goes on as before."""
    if isinstance(order, Swap) and engine.has_work:
        raise Conflict("answers are still running, and would go on with other weights")
    if forgets(order):
        engine.forget()
    shard.command(order)
