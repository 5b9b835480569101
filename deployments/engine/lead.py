"""Rank 0's loop: take commands, step, deliver; when idle, ping every rank. It ends when the replica hangs up."""

from __future__ import annotations

import contextlib
import time

from cluster.errors import Conflict, PlatformError
from deployments.engine.channel import Abort, Add, Beat, Do, Done, LeaderEnd, Tokens
from deployments.engine.compiling import Compiling
from deployments.engine.engine import Engine
from deployments.engine.orders import DropAdapter, Order, Swap, forgets
from deployments.engine.shard import Shard
from deployments.engine.structured import Grammars

BEAT_S = 1.0
LOOK_S = 0.001
"""Between two looks whether a constraint is compiled, when there is nothing else to do."""


def lead(shard: Shard, path: str) -> None:
    """Serve the replica that listens at `path`. Raises what breaks the group; returns when the replica is gone."""
    grammars = Grammars(shard.spec.directory)
    engine = Engine.of(
        shard.execute,
        shard.spec.num_blocks,
        shard.spec.settings,
        sampler=shard.sampler,
        grammars=grammars,
        launch=shard.launch,
        depth=shard.depth,
    )
    compiling = Compiling(grammars)
    with LeaderEnd(path) as wire, contextlib.suppress(ConnectionError):  # which only the replica's end gives
        wire.send(Beat(engine.stats()))
        _loop(shard, engine, compiling, wire)
    compiling.close()
    engine.drain()
    shard.stop()


def _loop(shard: Shard, engine: Engine, compiling: Compiling, wire: LeaderEnd) -> None:
    last_beat = time.monotonic()
    while (commands := wire.take(_patience_s(shard, engine, compiling))) is not None:
        for command in commands:
            match command:
                case Add(request):
                    if not compiling.add(request):
                        engine.add(request)
                case Abort(request_id, index):
                    if not compiling.forget(request_id):
                        engine.abort(request_id, index)
                case Do():
                    if outputs := engine.drain():  # an order comes between two steps on every rank
                        wire.send(Tokens(outputs))
                    wire.send(_done(shard, engine, command))
        for request in compiling.ready():
            engine.add(request)
        if engine.has_work and not shard.is_asleep:
            if outputs := engine.step():
                wire.send(Tokens(outputs))
        elif not commands and not compiling:
            shard.ping()
            engine.scheduler.check_integrity()
        if commands or time.monotonic() - last_beat >= BEAT_S:
            wire.send(Beat(engine.stats()))
            last_beat = time.monotonic()


def _patience_s(shard: Shard, engine: Engine, compiling: Compiling) -> float:
    """How long to wait for commands when there are none."""
    if engine.has_work and not shard.is_asleep:
        return 0.0
    return LOOK_S if compiling else BEAT_S


def _done(shard: Shard, engine: Engine, command: Do) -> Done:
    try:
        obey(shard, engine, command.order)
    except PlatformError as error:
        return Done(command.id, error.message, error.public_code)
    return Done(command.id)


def obey(shard: Shard, engine: Engine, order: Order) -> None:
    """Between two steps. Raises PlatformError for what some rank could not do; the group goes on as before."""
    if isinstance(order, DropAdapter) and engine.uses(order.slot):
        raise Conflict(f"the adapter in slot {order.slot} is in use")
    if isinstance(order, Swap) and engine.has_work:
        raise Conflict("answers are still running, and would go on with other weights")
    if forgets(order):
        engine.forget()
    shard.command(order)
