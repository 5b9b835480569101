from __future__ import annotations

import itertools
import smtplib
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import replace
from email.message import EmailMessage
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Conflict, InvalidRequest, NotFound
from cluster.metrics import SPEND_ALERTS
from cluster.settings import MailSettings
from cluster.store import Store
from cluster.tenancy import periods, spend_alerts
from cluster.tenancy.alert_mails import GIVEN_UP_S, AlertMails, sender
from cluster.tenancy.budgets import Balance, scope
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.metered import Metered
from cluster.tenancy.spend_alerts import SpendAlert, SpendAlerts, Wish, newly_passed
from tests.cluster.tenancy.accounts import PRICES, caller
from tests.cluster.tenancy.conftest import Clock

NOON = Clock().now
DAY = 86_400
WEB = scope("project", "web")
TO = ("ada@example.org",)
NUMBERS = itertools.count()


@pytest.fixture
def alerts(ledger: Ledger, either_store: Store, clock: Clock) -> SpendAlerts:
    """Of a store where a token costs five millionths."""
    ledger.prices.publish("default", PRICES)
    return SpendAlerts(either_store, clock)


def spend(ledger: Ledger, tokens: int) -> None:
    request_id = f"r{next(NUMBERS)}"
    ledger.reserve(caller(), request_id, "chat", 10**6)
    ledger.settle(request_id, Metered(output_tokens=tokens), "finished")


def test_an_alert_is_passed_once_in_its_period(alerts: SpendAlerts, ledger: Ledger, clock: Clock) -> None:
    daily, monthly = (alerts.create("acme", WEB, Wish(100, period, TO)) for period in ("day", "month"))  # type: ignore[arg-type]
    before = SPEND_ALERTS._value.get()
    spend(ledger, 19)
    assert alerts.evaluate() == []
    spend(ledger, 1)
    assert {passed.alert_id for passed in alerts.evaluate()} == {daily.id, monthly.id}
    assert SPEND_ALERTS._value.get() == before + 2
    spend(ledger, 50)
    assert alerts.evaluate() == []
    clock.now += DAY
    assert alerts.evaluate() == [], "a new day has begun, and nothing is spent in it"
    spend(ledger, 20)
    assert [(passed.alert_id, passed.spent) for passed in alerts.evaluate()] == [(daily.id, 100)]
    assert alerts.passed([monthly.id])[monthly.id].spent == 100


def test_of_two_gateways_one_notices(alerts: SpendAlerts, ledger: Ledger, either_store: Store, clock: Clock) -> None:
    alerts.create("acme", WEB, Wish(5, "month", TO))
    spend(ledger, 1)
    found: list[object] = []
    together = threading.Barrier(4)

    def look() -> None:
        other = SpendAlerts(either_store, clock)
        together.wait()
        found.extend(other.evaluate())

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1


def test_another_threshold_may_be_passed_again_and_an_old_months_spending_is_no_news(
    alerts: SpendAlerts, ledger: Ledger, clock: Clock
) -> None:
    made = alerts.create("acme", WEB, Wish(5, "month", TO))
    spend(ledger, 1)
    assert len(alerts.evaluate()) == 1
    alerts.update(WEB, made.id, Wish(10, "month", TO))
    assert alerts.evaluate() == []
    spend(ledger, 1)
    assert [passed.threshold for passed in alerts.evaluate()] == [10]
    clock.now += 40 * DAY
    alerts.create("acme", WEB, Wish(1, "month", TO))
    assert alerts.evaluate() == []


def test_alerts_stay_in_their_scope_and_are_not_too_many(
    alerts: SpendAlerts, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spend_alerts, "MOST", 2)
    first = alerts.create("acme", WEB, Wish(5, "month", TO, "Hello"))
    clock.now += 1
    second = alerts.create("acme", WEB, Wish(0, "day", TO))
    assert alerts.list(WEB) == [first, second]
    assert alerts.list(scope("organization", "acme")) == []
    for act in (alerts.get, alerts.delete):
        with pytest.raises(NotFound):
            act(scope("organization", "acme"), first.id)
    with pytest.raises(Conflict):
        alerts.create("acme", WEB, Wish(1, "month", TO))
    alerts.delete(WEB, first.id)
    alerts.create("acme", WEB, Wish(1, "month", TO))


@pytest.mark.parametrize(
    "wish",
    [
        Wish(-1, "day", TO),
        Wish(10**16, "day", TO),
        Wish(1, "day", ()),
        Wish(1, "day", TO * 21),
        Wish(1, "day", ("ada",)),
        Wish(1, "day", ("ada@example.org\nBcc: eve@example.org",)),
        Wish(1, "day", ("Ada <ada@example.org>",)),
        Wish(1, "day", TO, "x\ny"),
        Wish(1, "day", TO, "x" * 201),
    ],
)
def test_what_is_no_alert_is_refused(alerts: SpendAlerts, wish: Wish) -> None:
    with pytest.raises(InvalidRequest):
        alerts.create("acme", WEB, wish)
    assert alerts.list(WEB) == []


SPENDING = st.lists(st.tuples(st.integers(0, 3 * DAY), st.integers(0, 200)), max_size=20)


@given(steps=SPENDING, thresholds=st.lists(st.integers(0, 1500), max_size=4), each=st.sampled_from(["day", "month"]))
def test_whatever_is_spent_each_threshold_is_told_once_for_each_period_that_reached_it(
    steps: list[tuple[int, int]], thresholds: list[int], each: periods.Window
) -> None:
    """Looked at behind every request, as a chore does sooner or later."""
    alerts = [SpendAlert(f"a{n}", "acme", WEB, Wish(amount, each, TO), NOON, NOON) for n, amount in enumerate(thresholds)]
    balance, now, known = Balance(WEB), NOON, set[tuple[str, int, int]]()
    most: dict[int, int] = {}
    for later, amount in steps:
        now += later
        balance.reach(now)
        balance.spend(amount)
        label = periods.label(each, now)
        most[label] = most.get(label, 0) + amount
        found = newly_passed(alerts, {WEB: balance}, known, now)
        assert not known & {passed.key for passed in found}
        known |= {passed.key for passed in found}
    wanted = {(alert.id, label) for alert in alerts for label, spent in most.items() if spent >= alert.wish.threshold}
    assert {(alert_id, label) for alert_id, label, _ in known} == wanted


class Postbox(socketserver.BaseRequestHandler):
    """A server that takes every mail, keeps it in `server.mails`, and doesn't say goodbye as it should."""

    def handle(self) -> None:
        lines, inside = self.request.makefile("rb"), False
        self.request.sendall(b"220 here\r\n")
        for line in lines:
            if inside:
                self.server.mails[-1] += line  # type: ignore[attr-defined]
                inside = line != b".\r\n"
                if inside:
                    continue
            elif line.upper().startswith(b"DATA"):
                self.server.mails.append(b"")  # type: ignore[attr-defined]
                inside = True
                self.request.sendall(b"354 go on\r\n")
                continue
            self.request.sendall(b"250 well\r\n")
            if line.upper().startswith(b"QUIT"):
                return


@pytest.fixture
def postbox() -> Iterator[socketserver.TCPServer]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Postbox) as server:
        server.mails = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_mail_is_sent_once_through_the_server_of_the_settings(
    alerts: SpendAlerts, ledger: Ledger, either_store: Store, clock: Clock, postbox: socketserver.TCPServer
) -> None:
    made = alerts.create("acme", WEB, Wish(100, "day", ("ada@example.org", "bob@example.org"), "Größer"))
    spend(ledger, 20)
    alerts.evaluate()
    port = postbox.server_address[1]
    mails = AlertMails(either_store, sender(MailSettings(host="127.0.0.1", port=port, security="none")), clock)
    assert (mails.deliver(), mails.deliver()) == (1, 0)
    [mail] = postbox.mails  # type: ignore[attr-defined]
    assert b"To: ada@example.org, bob@example.org" in mail
    assert b"project web has spent 0.0001 EUR in 2026-11-23" in mail.replace(b"=\r\n", b"")
    assert alerts.passed([made.id])[made.id].mailed_at == clock.now


def test_what_can_not_be_mailed_waits_for_a_day(alerts: SpendAlerts, ledger: Ledger, either_store: Store, clock: Clock) -> None:
    made = alerts.create("acme", WEB, Wish(100, "day", TO))
    spend(ledger, 20)
    alerts.evaluate()
    taken: list[EmailMessage] = []

    def refuse(message: EmailMessage) -> None:
        raise smtplib.SMTPServerDisconnected("gone")

    assert AlertMails(either_store, refuse, clock).deliver() == 0
    assert alerts.passed([made.id])[made.id].mailed_at is None
    clock.now += GIVEN_UP_S - 1
    assert AlertMails(either_store, taken.append, clock).deliver() == 1
    alerts.update(WEB, made.id, replace(made.wish, threshold=50))
    spend(ledger, 20)
    alerts.evaluate()
    clock.now += GIVEN_UP_S + 1
    assert AlertMails(either_store, taken.append, clock).deliver() == 0
    assert len(taken) == 1


def test_a_password_that_others_can_read_is_not_used(
    alerts: SpendAlerts, ledger: Ledger, either_store: Store, clock: Clock, postbox: socketserver.TCPServer, tmp_path: Path
) -> None:
    made = alerts.create("acme", WEB, Wish(0, "day", TO))
    spend(ledger, 1)
    alerts.evaluate()
    (tmp_path / "password").write_text("secret")
    (tmp_path / "password").chmod(0o644)
    port = postbox.server_address[1]
    settings = MailSettings(host="127.0.0.1", port=port, security="none", user="u", password_file=tmp_path / "password")
    assert AlertMails(either_store, sender(settings), clock).deliver() == 0
    assert alerts.passed([made.id])[made.id].mailed_at is None
