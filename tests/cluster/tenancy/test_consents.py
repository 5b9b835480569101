from __future__ import annotations

import pytest

from cluster.errors import InvalidRequest
from cluster.store import Store
from cluster.tenancy.audit import Audit
from cluster.tenancy.chain import Actor
from cluster.tenancy.consents import Consent, Consents, consents
from deployments.gateway.exchange import new_request_id
from tests.cluster.tenancy.conftest import Clock

SOMEBODY = Actor("session", "root")


@pytest.fixture
def parts(migrated: Store, clock: Clock) -> tuple[Consents, Audit]:
    with migrated.begin() as connection:
        connection.execute(consents.delete())
    audit = Audit(migrated, bytes(32), clock)
    return Consents(migrated, clock, audit.by(SOMEBODY)), audit


def test_consents_are_given_changed_and_withdrawn_with_a_record_of_each(parts: tuple[Consents, Audit]) -> None:
    consents, audit = parts
    before = audit.head().number
    consents.put(Consent("acme", 0.5))
    consents.put(Consent("acme", 0.0, redaction=None))
    assert consents.list() == [Consent("acme", 0.0, redaction=None)]
    last, first = [record for record in audit.records() if record.number > before][::-1]
    assert first.before is None
    assert last.before == first.after
    assert (last.action, last.target, last.project, last.actor) == ("project.updated", "acme", "acme", SOMEBODY)


@pytest.mark.parametrize(
    "bad",
    [
        Consent("Not a name", 1),
        Consent("acme", 1.1),
        Consent("acme", -0.1),
        Consent("acme", float("nan")),
        Consent("acme", 1, 0),
        Consent("acme", 1, 1e12),
        Consent("acme", 1, redaction="other"),
    ],
)
def test_what_is_out_of_range_is_refused(parts: tuple[Consents, Audit], bad: Consent) -> None:
    consents, audit = parts
    before = audit.head()
    with pytest.raises(InvalidRequest):
        consents.put(bad)
    assert audit.head() == before


def test_the_sample_has_the_share_and_is_the_same_everywhere() -> None:
    ids = [new_request_id() for _ in range(20_000)]
    taken = sum(Consent("acme", 0.1).takes(one) for one in ids)
    assert 1700 < taken < 2300
    assert all(Consent("acme", 1).takes(one) for one in ids)
    assert not any(Consent("acme", 0).takes(one) for one in ids)
