from __future__ import annotations

import json
import secrets

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tenancy.redaction import HIDDEN, MAX_FACTS, facts, without_contacts, without_keys

KEY = f"mk_{secrets.token_hex(6)}{secrets.token_hex(32)}{secrets.token_hex(4)}"

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5)
places = st.recursive(
    st.text(max_size=10).map(lambda text: f"{text} {KEY}, {text}") | st.just(KEY),
    lambda inner: (
        st.lists(inner | plain, max_size=3)
        | st.dictionaries(st.text(max_size=8), inner | plain, max_size=3)
        | st.dictionaries(st.just(KEY), plain, min_size=1, max_size=1)
        | st.tuples(inner, plain)
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=8), places, min_size=1, max_size=4))
def test_the_text_of_a_key_never_comes_through(value: dict[str, object]) -> None:
    text = facts(value)
    assert text is not None
    assert KEY not in text
    assert KEY[20:60] not in text
    json.loads(text)


def test_secrets_are_known_by_their_names() -> None:
    told = {"client_secret": "abc", "password": "p", "apiKey": "x", "api_key": {"value": KEY, "id": "key_1"}, "authToken": "t"}
    assert json.loads(facts(told) or "") == {
        "client_secret": HIDDEN,
        "password": HIDDEN,
        "apiKey": HIDDEN,
        "api_key": {"value": f"mk_{HIDDEN}", "id": "key_1"},
        "authToken": HIDDEN,
    }


def test_what_is_no_secret_stays() -> None:
    names = [f"{kind}{'0a' * 16}" for kind in ("req_", "proj_", "user-", "audit_log-", "file-")]
    kept = {
        "names": names,
        "max_tokens": 5,
        "max_tokens_per_1_minute": "9",
        "scopes": ["inference"],
        "key_id": "0123456789ab",
        "digest": "ab" * 32,
    }
    assert json.loads(facts(kept) or "") == kept
    assert facts(None) is None


def test_secrets_with_a_shape_are_cut_out_of_text() -> None:
    assert without_keys("Authorization: Bearer abcdefghij") == f"Authorization: Bearer {HIDDEN}"
    assert without_keys("postgresql://u:geheim@h/db") == f"postgresql://u:{HIDDEN}@h/db"
    pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQ\n-----END PRIVATE KEY-----"
    assert without_keys(f"a {pem} b") == f"a {HIDDEN} b"


def test_what_is_too_long_leaves_its_size_and_digest() -> None:
    told = json.loads(facts({"a": "x" * MAX_FACTS}) or "")
    assert set(told) == {"too_long", "sha256"}


def test_contacts_are_masked() -> None:
    text = "Write to ada@example.org or call +49 (30) 901820, card 4111 1111 1111 1111, DE89 3704 0044 0532 0130 00, room 12"
    assert without_contacts(text) == "Write to [email] or call [number], card [number], [account], room 12"
