"""Mails about spend alerts that were passed, through the SMTP server of the settings. Without one nobody calls this.

A mail is claimed in the store before it is sent, so that of several gateways one sends it; if sending fails, it is let go and tried
again at the next turn, for a day. Who dies between claim and sending has lost it: the record stays, and no mail comes twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import smtplib
import ssl
import time
from collections.abc import Callable
from email.message import EmailMessage
from typing import Any

import sqlalchemy as sa

from cluster.errors import PlatformError
from cluster.private_files import read_private
from cluster.settings import MailSettings
from cluster.store import Store
from cluster.tenancy import money, periods
from cluster.tenancy.prices import Prices
from cluster.tenancy.spend_alerts import passed_alerts, spend_alerts

logger = logging.getLogger(__name__)

GIVEN_UP_S = 86_400.0
AT_ONCE = 10
"""Mails in one turn."""
TIMEOUT_S = 10.0

Send = Callable[[EmailMessage], None]
"""May block; raises OSError (as smtplib's errors are) or PlatformError for what isn't sent."""


def sender(settings: MailSettings) -> Send:
    """Sends through `settings.host`, which must be set."""
    host = settings.host
    assert host is not None, "without a server there are no mails"

    def send(message: EmailMessage) -> None:
        message["From"] = settings.sender
        with contextlib.closing(_connected(host, settings)) as server:
            if settings.user is not None and settings.password_file is not None:
                server.login(settings.user, read_private(settings.password_file).decode().strip())
            server.send_message(message)
            with contextlib.suppress(OSError):  # it has been taken, however the server takes its leave
                server.quit()

    return send


def _connected(host: str, settings: MailSettings) -> smtplib.SMTP:
    context = ssl.create_default_context()
    if settings.security == "tls":
        return smtplib.SMTP_SSL(host, settings.port, timeout=TIMEOUT_S, context=context)
    server = smtplib.SMTP(host, settings.port, timeout=TIMEOUT_S)
    if settings.security == "starttls":
        try:
            server.starttls(context=context)
        except BaseException:
            server.close()
            raise
    return server


class AlertMails:
    def __init__(self, store: Store, send: Send, clock: Callable[[], float] = time.time) -> None:
        self._store, self._send, self._clock = store, send, clock
        self._prices = Prices(store)

    def deliver(self) -> int:
        """Send what waits; returns how many mails were sent. What fails is logged and waits on."""
        sent, currency = 0, self._prices.currency()
        for row in self._waiting():
            if not self._mark(row, self._clock(), claimed=False):
                continue  # another gateway has it
            try:
                self._send(message(row, currency))
                sent += 1
            except (OSError, PlatformError) as error:
                logger.warning("a spend alert could not be mailed", extra={"alert": row.alert_id, "reason": str(error)[:200]})
                self._mark(row, None, claimed=True)
                break  # a server that takes no mail takes none of the others either
        return sent

    def _waiting(self) -> list[sa.Row[Any]]:
        p = passed_alerts.c
        alert = (spend_alerts.c[name] for name in ("scope", "period", "recipients", "subject_prefix"))
        query = sa.select(passed_alerts, *alert).join(spend_alerts, spend_alerts.c.id == p.alert_id)
        waiting = query.where(p.mailed_at.is_(None), p.passed_at > self._clock() - GIVEN_UP_S)
        with self._store.read() as connection:
            return list(connection.execute(waiting.order_by(p.passed_at).limit(AT_ONCE)).all())

    def _mark(self, row: sa.Row[Any], at: float | None, *, claimed: bool) -> bool:
        p = passed_alerts.c
        same = sa.and_(p.alert_id == row.alert_id, p.label == row.label, p.threshold == row.threshold)
        as_it_was = p.mailed_at.is_not(None) if claimed else p.mailed_at.is_(None)
        with self._store.begin() as connection:
            return bool(connection.execute(passed_alerts.update().where(same, as_it_was).values(mailed_at=at)).rowcount)


def message(row: sa.Row[Any], currency: str) -> EmailMessage:
    """What is said of an alert that was passed, to all of its recipients."""
    kind, _, name = row.scope.partition(":")
    window = periods.month_text(row.label) if row.period == "month" else periods.iso(row.label * periods.DAY_S)[:10]
    made = EmailMessage()
    what = f"{kind} {name} has spent {money.plain(row.spent)} {currency} in {window}"
    made["Subject"] = f"{row.subject_prefix}: {what}" if row.subject_prefix else what
    made["To"] = ", ".join(json.loads(row.recipients))
    made.set_content(
        f"The {what}.\nThe spend alert {row.alert_id} is set to {money.plain(row.threshold)} {currency} a {row.period}.\n"
        f"It was passed at {periods.iso(row.passed_at)}. Calls go on: only a spend limit refuses them.\n"
    )
    return made
