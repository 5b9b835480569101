"""Buckets of usage and costs as the OpenAI administration API has them: how a question is cut, and its pages. Pure.

Buckets are whole minutes, hours or days in UTC; the first begins and the last ends where the question does. Those without usage are
there and empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from cluster.errors import InvalidRequest

Width = Literal["1m", "1h", "1d"]

SECONDS: Mapping[Width, int] = {"1m": 60, "1h": 3600, "1d": 86_400}
BOUNDS: Mapping[Width, tuple[int, int]] = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
"""How many buckets a page has if nothing is said, and at most, as published."""
BOUNDS_OF_COSTS = (7, 180)

_PAGE = re.compile(r"page_([0-9]{1,12})\Z")


class Bucket(TypedDict):
    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[dict[str, Any]]


class UsagePage(TypedDict):
    object: Literal["page"]
    data: list[Bucket]
    has_more: bool
    next_page: str | None


@dataclass(frozen=True, slots=True)
class Buckets:
    """The buckets of one page, in seconds since the epoch: of `width` each, from `start` on, before `end`, at most `limit`."""

    start: int
    end: int
    width: int
    limit: int

    @classmethod
    def of(
        cls, start: int, end: int, width: Width, limit: int | None, page: str | None, bounds: tuple[int, int] | None = None
    ) -> Buckets:
        """From what a query says. Raises InvalidRequest."""
        usual, most = bounds or BOUNDS[width]
        if not start < end:
            raise InvalidRequest("end_time must come after start_time, and start_time before now.", param="end_time")
        if limit is not None and not 1 <= limit <= most:
            raise InvalidRequest(f"limit is 1 to {most} with a bucket_width of {width}.", param="limit")
        seconds = SECONDS[width]
        return cls(_begin(page, start, end, seconds), end, seconds, limit or usual)

    @property
    def edges(self) -> list[tuple[int, int]]:
        found, begins = list[tuple[int, int]](), self.start
        while begins < self.end and len(found) < self.limit:
            found.append((begins, min(self.end, (begins // self.width + 1) * self.width)))
            begins = found[-1][1]
        return found

    def page(self, results: Mapping[int, Sequence[dict[str, Any]]]) -> UsagePage:
        """`results` by the begin of their bucket."""
        edges = self.edges
        last = edges[-1][1]
        data: list[Bucket] = [
            {"object": "bucket", "start_time": begins, "end_time": ends, "results": list(results.get(begins, ()))}
            for begins, ends in edges
        ]
        has_more = last < self.end
        return {"object": "page", "data": data, "has_more": has_more, "next_page": f"page_{last}" if has_more else None}


def _begin(page: str | None, start: int, end: int, width: int) -> int:
    """Where a page begins: at the start, or at a bucket behind it that an earlier page has named."""
    if page is None:
        return start
    match = _PAGE.match(page)
    begin = int(match[1]) if match else 0
    if not start < begin < end or begin % width:
        raise InvalidRequest("page is not the next_page of this question.", param="page")
    return begin
