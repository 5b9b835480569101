"""Days and months in UTC, as whole numbers and as seconds since the epoch. Budgets, tiers and invoices all use these windows.

A day is the number of days since 1970-01-01. A month is `year * 12 + month - 1`, so that both only grow and the next is one more.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Literal

from cluster.errors import InvalidRequest

Window = Literal["day", "month"]

DAY_S = 86_400


def day_of(at: float) -> int:
    return int(at // DAY_S)


def month_of(at: float) -> int:
    moment = datetime.fromtimestamp(at, UTC)
    return moment.year * 12 + moment.month - 1


def label(window: Window, at: float) -> int:
    return day_of(at) if window == "day" else month_of(at)


def month_start(month: int) -> float:
    """Seconds since the epoch."""
    year, index = divmod(month, 12)
    return datetime(year, index + 1, 1, tzinfo=UTC).timestamp()


def month_text(month: int) -> str:
    return f"{month // 12:04}-{month % 12 + 1:02}"


def parse_month(text: str) -> int:
    """The month `2026-11`. Raises InvalidRequest."""
    if (match := re.fullmatch(r"(20[0-9][0-9])-(0[1-9]|1[0-2])", text)) is None:
        raise InvalidRequest(f"{text[:40]!r} is not a month like 2026-11", param="month")
    return int(match[1]) * 12 + int(match[2]) - 1


def iso(at: float) -> str:
    """`2026-11-23T00:00:00Z`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
