"""One call as most models write it: a JSON object of a name and arguments. Formats differ in what stands around it."""

from __future__ import annotations

import json

from deployments.tools.source import Malformed, Reading, Source

_NAME = "name"
_ARGUMENTS = ("arguments", "parameters")
_IGNORED = ("id", "type")
"""What some models write beside the two; callers get their own."""


def read_call(source: Source) -> Reading[None]:
    """`{"name": …, "arguments": {…}}` in any order. Arguments are told as they come once the name is known, and are `{}` where a
    call has none. Raises Malformed for anything else, and for a name that nobody offered."""
    is_open, held, has_arguments = False, "", False
    yield from source.expect("{")
    while True:
        yield from source.space()
        key = yield from _string(source)
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        if key == _NAME:
            source.open((yield from _string(source)))
            is_open = True
            source.tell(held)
        elif key in _ARGUMENTS and not has_arguments:
            has_arguments = True
            if is_open:
                yield from read_arguments(source)
            else:
                held = yield from _object(source)
        elif key in _IGNORED:
            yield from source.value()
        else:
            raise Malformed
        yield from source.space()
        if (yield from source.skip("}")):
            break
        yield from source.expect(",")
    if not is_open:
        raise Malformed
    if not has_arguments:
        source.tell("{}")


def read_arguments(source: Source) -> Reading[None]:
    """A JSON object, told as it comes."""
    if (yield from source.peek()) != "{":
        raise Malformed
    yield from source.arguments()


def _object(source: Source) -> Reading[str]:
    if (yield from source.peek()) != "{":
        raise Malformed
    return (yield from source.value())


def _string(source: Source) -> Reading[str]:
    if (yield from source.peek()) != '"':
        raise Malformed
    return str(json.loads((yield from source.value())))
