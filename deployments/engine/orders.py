"""What a group does between two steps, other than computing one: every rank does the same, or says that it could not.

An order is plain data, decided by the replica, and reaches every rank in the place of a batch, so that all of them have it between
the same two steps. `Shard.obey` knows how each is done.
"""

from __future__ import annotations

import msgspec


class Order(msgspec.Struct, frozen=True, tag=True):
    """The base of all; a kind of order is a subclass in `ORDERS`."""


class Look(Order, frozen=True, tag=True):
    """Do nothing but say that this rank is there."""


class ReadAdapter(Order, frozen=True, tag=True):
    """Begin to read an adapter's files, beside the steps, for this slot (from 1)."""

    slot: int
    directory: str


class AwaitAdapter(Order, frozen=True, tag=True):
    """Can't be obeyed while the slot's adapter is still being read on some rank."""

    slot: int


class InstallAdapter(Order, frozen=True, tag=True):
    """Put what was read into the slot. Where a rank can't, the slot must be dropped."""

    slot: int


class DropAdapter(Order, frozen=True, tag=True):
    """Empty the slot."""

    slot: int


class Sleep(Order, frozen=True, tag=True):
    """Give weights and KV cache back to the system, and stay. Nothing is computed until `Wake`."""


class Wake(Order, frozen=True, tag=True):
    """Load the weights again."""


class Swap(Order, frozen=True, tag=True):
    """Go on with the weights in another directory, of a model of the same shape; with the old ones where that fails."""

    directory: str


ORDERS = Look | ReadAdapter | AwaitAdapter | InstallAdapter | DropAdapter | Sleep | Wake | Swap
"""The union of all kinds."""


def forgets(order: Order) -> bool:
    """Whether keys and values of all sequences are gone afterwards."""
    return isinstance(order, (Sleep, Swap))


_decoder = msgspec.msgpack.Decoder(ORDERS)


def pack(order: Order) -> bytes:
    return msgspec.msgpack.encode(order)


def unpack(packed: bytes) -> Order:
    """Raises msgspec.ValidationError for what is no order."""
    found: Order = _decoder.decode(packed)
    return found
