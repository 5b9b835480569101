"""One choice's text on its way to the caller: calls taken out of it as it comes."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import NamedTuple

from cluster.types import ToolCallDelta
from deployments.tools.source import Ended, Part, Reading, Said, Source, Unsaid

Reader = Callable[[Source], Reading[None]]


class News(NamedTuple):
    """Text that isn't part of a call, and what is new about calls. Either may be empty. `spans` says what became of the characters
    that came in: so many were text, so many weren't."""

    text: str
    calls: tuple[ToolCallDelta, ...]
    spans: tuple[Said | Unsaid, ...]

    def then(self, later: News) -> News:
        return News(self.text + later.text, self.calls + later.calls, self.spans + later.spans)


_NOTHING = News("", (), ())


class CallStream:
    """Calls of the functions `names` in a text that `read` understands. Not `parallel`: the first call ends the answer."""

    def __init__(self, read: Reader, names: frozenset[str], *, parallel: bool = True) -> None:
        self._source = Source(names, parallel=parallel)
        self._reading = read(self._source)
        self._runs = True
        self._index = -1
        self._calls: dict[int, ToolCallDelta] = {}  # what is new since the last time
        self._advance()

    @property
    def has_calls(self) -> bool:
        """Whether a whole call has been found."""
        return self._source.num_calls > 0

    @property
    def has_enough(self) -> bool:
        """Whether nothing that could follow is wanted."""
        return self._source.has_enough

    def push(self, text: str) -> News:
        if self._runs and text:
            self._source.push(text)
            self._advance()
        return self._news()

    def finish(self, *, cut: bool) -> News:
        """The rest. `cut`: the answer was ended from outside, as by its greatest length; a call it breaks off stays one."""
        if self._runs:
            self._source.end(cut=cut)
            self._advance()
        self._source.finish()
        return self._news()

    def _advance(self) -> None:
        try:
            next(self._reading)
        except Ended:
            self._runs = False

    def _news(self) -> News:
        found = self._source.found
        if not found:
            return _NOTHING
        self._source.found = []
        if len(found) == 1 and isinstance(only := found[0], Said):
            return News(only.text, (), (only,))
        spans = tuple([item for item in found if not isinstance(item, Part)])
        text = "".join([item.text for item in spans if isinstance(item, Said)])
        for item in found:
            if isinstance(item, Part):
                self._tell(item)
        calls, self._calls = tuple(self._calls.values()), {}
        return News(text, calls, spans)

    def _tell(self, part: Part) -> None:
        if part.name is not None:
            self._index += 1
            self._calls[self._index] = ToolCallDelta(self._index, f"call_{secrets.token_hex(12)}", part.name)
        elif part.arguments:
            known = self._calls.get(self._index, ToolCallDelta(self._index))
            self._calls[self._index] = ToolCallDelta(known.index, known.id, known.name, known.arguments + part.arguments)
        elif part.end == "broken":
            self._take_back()

    def _take_back(self) -> None:
        """The call that is open was none. What nobody was told yet needs no taking back, nor an index."""
        news = self._calls.pop(self._index, None)
        if news is not None and news.id is not None:
            self._index -= 1
        else:
            self._calls[self._index] = ToolCallDelta(self._index, broken=True)
