"""`mmaas usage`, `invoice`, `prices` and `budgets` against a store of their own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import settings
from cluster.errors import BudgetExceeded
from cluster.store import Store
from cluster.tenancy import periods
from cluster.tenancy.invoices import Invoices
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.spend_alerts import SpendAlerts
from cluster.types import Usage
from mmaas.cli import run
from mmaas.up import opened_store
from tests.cluster.tenancy.accounts import caller
from tests.cluster.tenancy.conftest import Clock

OCTOBER = periods.month_start(periods.parse_month("2025-10"))
PRICES = '{"charges": [{"meter": "output_tokens", "price": "2", "per": 1000}, {"meter": "requests", "price": "0.01"}]}'
Printed = pytest.CaptureFixture[str]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    for name in [name for name in os.environ if name.startswith("MMAAS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MMAAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    with opened_store(settings.load()) as store:
        yield store


def used(store: Store, clock: Clock) -> Ledger:
    from cluster.tenancy.prices import parse

    ledger = Ledger(store, clock)
    ledger.prices.publish("default", parse(PRICES))
    for number, project in enumerate(("web", "web", "api")):
        ledger.reserve(caller(project, organization="default"), f"r{number}", "chat", 10_000_000)
        ledger.settle(f"r{number}", Usage(10, 500, 4), "finished")
    return ledger


def printed(capsys: Printed, *words: str) -> str:
    assert run(list(words)) == 0
    return capsys.readouterr().out


def test_usage_of_a_month_by_what_is_asked(store: Store, capsys: Printed) -> None:
    used(store, Clock(OCTOBER))
    rows = json.loads(printed(capsys, "usage", "--month", "2025-10", "--by", "project", "--json"))
    assert [(row["project"], row["requests"], row["output_tokens"], row["amount"]) for row in rows] == [
        ("api", 1, 500, "1.01"),
        ("web", 2, 1000, "2.02"),
    ]
    assert "2.02" in printed(capsys, "usage", "--month", "2025-10", "--by", "model", "--by", "project")
    [row] = json.loads(printed(capsys, "usage", "--month", "2025-10", "--by", "operation", "--by", "user", "--json"))
    assert (row["operation"], row["user_id"], row["requests"]) == ("completions", None, 3)
    assert "completions" in printed(capsys, "usage", "--month", "2025-10", "--by", "operation", "--by", "user")
    assert json.loads(printed(capsys, "usage", "--month", "2025-09", "--json")) == []
    assert run(["usage", "--month", "october"]) == 1


def test_an_invoice_from_draft_to_file(store: Store, capsys: Printed, tmp_path: Path) -> None:
    used(store, Clock(OCTOBER))
    assert "(draft)" in printed(capsys, "invoice", "show", "2025-10")
    assert "3.03" in printed(capsys, "invoice", "issue", "2025-10")
    assert json.loads(printed(capsys, "invoice", "list", "--json"))[0]["total"] == "3.03"
    assert json.loads(printed(capsys, "invoice", "show", "2025-10", "--format", "json"))["total"] == "3.03"
    for form, begins in (("csv", b"invoice,"), ("focus", b"BilledCost,"), ("pdf", b"%PDF-")):
        file = tmp_path / f"invoice.{form}"
        assert printed(capsys, "invoice", "show", "2025-10", "--format", form, "--output", str(file)) == ""
        assert file.read_bytes().startswith(begins)
    assert run(["invoice", "show", "2025-10", "--format", "pdf"]) == 1
    assert run(["invoice", "issue", "2199-01"]) == 1
    assert "right" in printed(capsys, "invoice", "check")


def test_the_check_of_the_books_can_fail(store: Store, capsys: Printed) -> None:
    used(store, Clock(OCTOBER))
    with store.begin() as connection:
        connection.exec_driver_sql("UPDATE balances SET spent = 0")
    assert run(["invoice", "check"]) == 1
    assert "usage of" in capsys.readouterr().err


def test_a_credit_stands_on_the_next_invoice(store: Store, capsys: Printed) -> None:
    used(store, Clock(OCTOBER))
    assert "Granted 1.00" in printed(capsys, "invoice", "credit", "1.00", "--reason", "sorry")
    assert Invoices(store).issue("default", "2025-10").total == 2_030_000


def test_spend_alerts_are_made_shown_and_forgotten(store: Store, capsys: Printed) -> None:
    words = ("budgets", "alert", "3.03", "--to", "ada@example.org", "--kind", "organization")
    made = json.loads(printed(capsys, *words, "--json"))["id"]
    assert "web has spent" not in printed(capsys, *words)
    assert json.loads(printed(capsys, "budgets", "alerts", "--json"))[0]["last_passed"] == ""
    used(store, Clock(time.time()))
    SpendAlerts(store).evaluate()
    shown = next(one for one in json.loads(printed(capsys, "budgets", "alerts", "--json")) if one["id"] == made)
    assert (shown["scope"], shown["threshold"], shown["spent"]) == ("organization:default", "3.03", "3.03")
    assert made in printed(capsys, "budgets", "alerts")
    assert "is gone" in printed(capsys, "budgets", "forget", made)
    assert run(["budgets", "forget", made]) == 1
    assert run(["budgets", "alert", "1", "--to", "ada"]) == 1
    assert run(["budgets", "alert", "1", "--to", "ada@example.org", "--name", "nobody"]) == 1


def test_prices_and_budgets_are_set_and_shown(store: Store, capsys: Printed, tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    file.write_text(PRICES)
    assert "Version 1 of default" in printed(capsys, "prices", "publish", str(file))
    printed(capsys, "prices", "publish", str(file), "--plan", "gold", "--days", "1")
    assert [one["plan"] for one in json.loads(printed(capsys, "prices", "list", "--json"))] == ["default", "gold"]
    assert "chat" not in printed(capsys, "prices", "list")
    assert "is on gold" in printed(capsys, "prices", "subscribe", "gold")
    printed(capsys, "budgets", "set", "0.50", "--name", "web")
    with pytest.raises(BudgetExceeded):
        Ledger(store).reserve(caller(), "r1", "chat", 500_001)
    Ledger(store).reserve(caller(), "r2", "chat", 400_000)
    assert "0.00 spent and 0.40 reserved of 0.50" in printed(capsys, "budgets", "list")
    assert json.loads(printed(capsys, "budgets", "list", "--json"))[0]["reserved"] == "0.40"
    printed(capsys, "budgets", "set", "none", "--name", "web")
    assert json.loads(printed(capsys, "budgets", "list", "--json")) == []
    file.write_text("{}[")
    assert run(["prices", "publish", str(file)]) == 1
