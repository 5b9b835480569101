"""What may be written down of what people gave us: no secrets in the audit log, no personal data in what is kept of calls.

Pure. `facts` is for before and after of the audit log; `REDACTIONS` are the hooks that a project can name for its kept inputs and
outputs. Patterns find what has a shape; a name or an address in plain words has none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_FACTS = 8192
"""Characters of JSON that an audit record may hold before or after an act; more is replaced by its size and digest."""

MAX_DEPTH = 16
HIDDEN = "[redacted]"

_SECRET_WORDS = frozenset(
    {"secret", "password", "passwd", "passphrase", "pepper", "token", "credential", "credentials", "authorization"}
)
_SECRET_PAIRS = frozenset({"api_key", "private_key", "signing_key", "access_key"})
# Keys by their usual prefixes, and anything of that form that is longer than the identifiers that we make ourselves.
_KEY_TEXT = re.compile(r"\b((?:mk|sk|pk|hf|gh|xox)[a-z]{0,4}[-_](?=[\w-]{16})|[a-z]{2,8}[-_](?=\w{40}))[\w-]+", re.ASCII)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_URL_PASSWORD = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s/:@]*):[^\s/@]+@")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


def facts(value: Mapping[str, Any] | None) -> str | None:
    """JSON of what a thing was or became, sorted, without secrets, bounded. None stays None: there was nothing."""
    if value is None:
        return None
    text = json.dumps(_plain(value, MAX_DEPTH), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    if len(text) <= MAX_FACTS:
        return text
    return json.dumps({"too_long": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()})


def _plain(value: Any, depth: int, name: str = "") -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, str):
        return HIDDEN if _is_secret(name) else without_keys(value)
    if depth == 0:
        return "[too deep]"
    if isinstance(value, Mapping):
        return {without_keys(str(key)): _plain(item, depth - 1, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth - 1, name) for item in value]
    if isinstance(value, set | frozenset):
        return [_plain(item, depth - 1, name) for item in sorted(value, key=str)]
    return f"[{type(value).__name__}]"


def _is_secret(name: str) -> bool:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().replace("-", "_")
    return not _SECRET_WORDS.isdisjoint(words.split("_")) or any(pair in words for pair in _SECRET_PAIRS)


def without_keys(text: str) -> str:
    """Texts of keys, bearer tokens, passwords in URLs and private keys are cut out; a key's prefix stays."""
    text = _PEM.sub(HIDDEN, text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    text = _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    return _KEY_TEXT.sub(rf"\1{HIDDEN}", text)


_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_DIGITS = re.compile(r"(?<!\w)\+?\d(?:[ ().-]{0,2}\d){6,18}(?!\w)")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}\b")


def without_contacts(text: str) -> str:
    """Without addresses of e-mail, telephone, card and account numbers (any run of 7 to 19 digits), and keys."""
    return _DIGITS.sub("[number]", _IBAN.sub("[account]", _EMAIL.sub("[email]", without_keys(text))))


Redaction = Callable[[str], str]
REDACTIONS: Mapping[str, Redaction] = {"keys": without_keys, "contacts": without_contacts}
"""Hooks by the name that a project's consent says."""
