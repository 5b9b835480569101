"""What the ledger writes: postings of entries that sum to zero, and the accounts they move between. Plain data.

Amounts are micro-units; a debit is positive, a credit negative. What is promised to others is negative, what they owe is positive:

    held/PROJECT        reserved for requests under way        against   committed
    receivable/ORG      used and not yet invoiced              against   revenue
    invoiced/ORG        invoiced and not yet paid              against   receivable/ORG, revenue (fees)
    credit/GRANT        what is left of a grant                against   granted
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["reserve", "settle", "grant", "lapse", "invoice"]

COMMITTED, REVENUE, GRANTED = "committed", "revenue", "granted"


def held(project: str) -> str:
    return f"held/{project}"


def receivable(organization: str) -> str:
    return f"receivable/{organization}"


def invoiced(organization: str) -> str:
    return f"invoiced/{organization}"


def credit(grant: str) -> str:
    return f"credit/{grant}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line. Those of revenue say for how much of what, by which version of the prices."""

    account: str
    amount: int
    model: str | None = None
    meter: str | None = None
    quantity: int | None = None
    price: int | None = None


@dataclass(frozen=True, slots=True)
class Posting:
    """One fact, whole or not at all. `seq` counts an organization's postings without a gap; `subject` and `kind` together are
    unique, and so make sure that a request is reserved once and settled once."""

    organization: str
    seq: int
    subject: str
    kind: Kind
    project: str
    booked_at: float  # seconds since the epoch; never goes back within an organization
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        total = sum(entry.amount for entry in self.entries)
        assert total == 0, f"a posting of {self.subject} sums to {total} micro-units"


def moved(amount: int, debit: str, credited: str) -> tuple[Entry, ...]:
    """The two entries of a plain transfer; none for nothing."""
    return (Entry(debit, amount), Entry(credited, -amount)) if amount else ()
