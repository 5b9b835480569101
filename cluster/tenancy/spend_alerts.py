"""Spend alerts: who is to hear that an organization or a project has spent so much in a day or a month.

An alert is passed at most once in a period for one threshold, however many gateways look: the row that says so is unique. It looks
at the balance that the ledger keeps, so what a request costs counts as soon as it is settled. Nothing is held back by an alert;
budgets do that. Who carries the word is `alert_mails.py`.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Connection, Float, Integer, String, Table, Text

from cluster import metrics
from cluster.errors import Conflict, InvalidRequest
from cluster.store import Store, metadata
from cluster.tenancy import acts, money, paging, periods
from cluster.tenancy.acts import Note, Rows, unnoted
from cluster.tenancy.budgets import Balance, balances, place
from cluster.tenancy.periods import Window

logger = logging.getLogger(__name__)

MOST = 100
"""Alerts of one organization or project."""
MOST_RECIPIENTS = 20

_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63}){0,8}\Z")

spend_alerts = Table(
    "spend_alerts",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("organization", String(63), nullable=False),
    Column("scope", String(80), nullable=False, index=True),  # a balance's
    Column("period", String(8), nullable=False),
    Column("threshold", BigInteger, nullable=False),  # micro-units, here and below
    Column("recipients", Text, nullable=False),  # a JSON list
    Column("subject_prefix", String(200)),
    Column("created_at", Float(53), nullable=False),  # seconds since the epoch, here and below
    Column("changed_at", Float(53), nullable=False),
)

passed_alerts = Table(
    "passed_alerts",
    metadata,
    Column("alert_id", String(40), primary_key=True),
    Column("label", Integer, primary_key=True, autoincrement=False),  # of the day or the month
    Column("threshold", BigInteger, primary_key=True, autoincrement=False),
    Column("spent", BigInteger, nullable=False),
    Column("passed_at", Float(53), nullable=False),
    Column("mailed_at", Float(53)),
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What an alert is told to be: `threshold` in micro-units."""

    threshold: int
    period: Window
    recipients: Sequence[str]
    subject_prefix: str | None = None

    def check(self) -> Wish:
        """Raises InvalidRequest."""
        if not 0 <= self.threshold <= money.LARGEST:
            raise InvalidRequest(f"a threshold is between 0 and {money.plain(money.LARGEST)}", param="threshold_amount")
        if not 1 <= len(self.recipients) <= MOST_RECIPIENTS or not all(map(_ADDRESS.match, self.recipients)):
            raise InvalidRequest(f"recipients are 1 to {MOST_RECIPIENTS} e-mail addresses", param="notification_channel.recipients")
        prefix = self.subject_prefix or ""
        if len(prefix) > 200 or not prefix.isprintable():
            raise InvalidRequest(
                "a subject's prefix is up to 200 printable characters", param="notification_channel.subject_prefix"
            )
        return self


@dataclass(frozen=True, slots=True)
class SpendAlert:
    """`scope` is a balance's. What was passed before `changed_at` is not told of."""

    id: str
    organization: str
    scope: str
    wish: Wish
    created_at: float
    changed_at: float


@dataclass(frozen=True, slots=True)
class Passed:
    """That an alert was passed in the day or month `label`, and what had been spent by then: micro-units."""

    alert_id: str
    label: int
    threshold: int
    spent: int
    passed_at: float
    mailed_at: float | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.alert_id, self.label, self.threshold


def newly_passed(
    alerts: Iterable[SpendAlert], of: Mapping[str, Balance], known: Collection[tuple[str, int, int]], now: float
) -> list[Passed]:
    """Alerts that their balance has reached, in the window where it stands, and that nobody has noticed yet (`known`: keys)."""
    found = []
    for alert in alerts:
        if (balance := of.get(alert.scope)) is None:
            continue
        label = balance.month if alert.wish.period == "month" else balance.day
        passed = Passed(alert.id, label, alert.wish.threshold, balance.spent_in(alert.wish.period), now)
        has_begun = label >= periods.label(alert.wish.period, alert.changed_at)
        if has_begun and passed.spent >= alert.wish.threshold and passed.key not in known:
            found.append(passed)
    return found


class SpendAlerts:
    """The alerts in the store. An alert is found by its id in its scope; another's isn't there."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note

    def create(self, organization: str, scope: str, wish: Wish) -> SpendAlert:
        """Raises InvalidRequest, and Conflict when there are enough."""
        now = self._clock()
        made = SpendAlert(paging.new_id("alert"), organization, scope, wish.check(), now, now)
        with self._act(scope) as rows:
            if len(_read(rows.connection, scope)) >= MOST:
                raise Conflict(f"There are {MOST} spend alerts already.")
            rows.insert("spend_alert.created", spend_alerts, _row(made))
        return made

    def list(self, scope: str) -> Sequence[SpendAlert]:
        """The oldest first."""
        with self._store.read() as connection:
            return _read(connection, scope)

    def everywhere(self) -> Sequence[SpendAlert]:
        """Of all organizations, for who operates the platform."""
        with self._store.read() as connection:
            return _made(connection.execute(sa.select(spend_alerts).order_by(spend_alerts.c.scope, spend_alerts.c.created_at)))

    def get(self, scope: str, alert_id: str) -> SpendAlert:
        """Raises NotFound."""
        with self._store.read() as connection:
            return _find(connection, scope, alert_id)

    def update(self, scope: str, alert_id: str, wish: Wish) -> SpendAlert:
        """Raises InvalidRequest and NotFound. With another threshold it may be passed again in the same period."""
        with self._act(scope) as rows:
            changed = replace(_find(rows.connection, scope, alert_id), wish=wish.check(), changed_at=self._clock())
            rows.update("spend_alert.updated", spend_alerts, spend_alerts.c.id == alert_id, _row(changed))
        return changed

    def delete(self, scope: str, alert_id: str) -> None:
        """What it was passed by stays on record. Raises NotFound."""
        with self._act(scope) as rows:
            _find(rows.connection, scope, alert_id)
            rows.delete("spend_alert.deleted", spend_alerts, spend_alerts.c.id == alert_id)

    @contextmanager
    def _act(self, scope: str) -> Iterator[Rows]:
        with acts.begin(self._store, self._note) as rows:
            yield rows.at(*place(rows.connection, scope))

    def passed(self, alert_ids: Collection[str]) -> dict[str, Passed]:
        """The last time that each was passed, if it was."""
        query = sa.select(passed_alerts).where(passed_alerts.c.alert_id.in_(sorted(alert_ids)))
        with self._store.read() as connection:
            rows = connection.execute(query.order_by(passed_alerts.c.passed_at)).all()
        return {row.alert_id: Passed(**row._mapping) for row in rows}

    def evaluate(self) -> Sequence[Passed]:
        """Note what is newly passed, and return what this caller was the first to note."""
        with self._store.read() as connection:
            alerts = {alert.id: alert for alert in _made(connection.execute(_reached()))}
            scopes = sorted({alert.scope for alert in alerts.values()})
            rows = connection.execute(sa.select(balances).where(balances.c.scope.in_(scopes))).all()
            of = {row.scope: Balance(**row._mapping) for row in rows}
            known = {tuple(row) for row in connection.execute(_known(sorted(alerts), of.values()))}
        found = newly_passed(alerts.values(), of, known, self._clock())
        return [passed for passed in found if self._told(alerts[passed.alert_id], passed)]

    def _told(self, alert: SpendAlert, passed: Passed) -> bool:
        try:
            with self._store.begin() as connection:
                connection.execute(passed_alerts.insert().values({name: getattr(passed, name) for name in _PASSED}))
        except sa.exc.IntegrityError:
            return False  # another gateway was first
        metrics.SPEND_ALERTS.inc()
        amounts = {"threshold": money.plain(passed.threshold), "spent": money.plain(passed.spent)}
        logger.warning("spend alert", extra={"alert": alert.id, "scope": alert.scope, "period": alert.wish.period, **amounts})
        return True


_PASSED = tuple(column.name for column in passed_alerts.c)


def _reached() -> sa.Select[Any]:
    """The few alerts that may be newly passed, or were: everything else stays in the store."""
    a, b = spend_alerts.c, balances.c
    spent = sa.case((a.period == "month", b.spent_month), else_=b.spent_day)
    return sa.select(spend_alerts).join(balances, sa.and_(b.scope == a.scope, spent >= a.threshold))


def _known(alert_ids: Sequence[str], of: Iterable[Balance]) -> sa.Select[Any]:
    c = passed_alerts.c
    labels = sorted({label for balance in of for label in (balance.day, balance.month)})
    return sa.select(c.alert_id, c.label, c.threshold).where(c.alert_id.in_(alert_ids), c.label.in_(labels))


def _read(connection: Connection, scope: str) -> list[SpendAlert]:
    c = spend_alerts.c
    return _made(connection.execute(sa.select(spend_alerts).where(c.scope == scope).order_by(c.created_at, c.id)))


def _find(connection: Connection, scope: str, alert_id: str) -> SpendAlert:
    query = sa.select(spend_alerts).where(spend_alerts.c.scope == scope, spend_alerts.c.id == alert_id)
    return paging.only(next(iter(_made(connection.execute(query))), None), "spend alert")


def _made(rows: Iterable[Any]) -> list[SpendAlert]:
    return [
        SpendAlert(
            row.id,
            row.organization,
            row.scope,
            Wish(row.threshold, row.period, tuple(json.loads(row.recipients)), row.subject_prefix),
            row.created_at,
            row.changed_at,
        )
        for row in rows
    ]


def _row(alert: SpendAlert) -> dict[str, object]:
    own = {name: getattr(alert, name) for name in ("id", "organization", "scope", "created_at", "changed_at")}
    wish = alert.wish
    words = {"period": wish.period, "threshold": wish.threshold, "subject_prefix": wish.subject_prefix}
    return own | words | {"recipients": json.dumps(list(wish.recipients))}
