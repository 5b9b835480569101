"""The bytes that each token id stands for. Knows nothing of how text is cut into tokens.

Two families of tokenizers are known, which between them cover the causal language models in use: byte-level BPE (GPT-2 and its
heirs), whose tokens spell bytes with letters, and SentencePiece, whose tokens are text with `▁` for the space and `<0xE2>` for a
byte that no token covers. In both the text of a sequence is the concatenation of its tokens' bytes, decoded once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from cluster.errors import ModelNotServable

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PIECE_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Vocabulary:
    """Tokens by id. Special ones stand for no bytes: they are never part of a text."""

    def __init__(self, tokens: Mapping[int, str], *, added: frozenset[int], special: frozenset[int], decoder: Any) -> None:
        """`decoder` is that section of tokenizer.json. Raises ModelNotServable for a family that isn't known."""
        self.size = max(tokens, default=-1) + 1
        self._tokens = tokens
        self._added = added
        self._special = special
        self._bytes: dict[int, bytes] = {}
        steps = list(_steps(decoder))
        kinds = {step.get("type") for step in steps}
        self._byte_level = "ByteLevel" in kinds
        if not kinds or not kinds <= _PIECE_DECODERS | {"ByteLevel"} or (self._byte_level and kinds - {"ByteLevel", "Fuse"}):
            raise ModelNotServable(
                f"tokenizer.json decodes by {', '.join(map(str, sorted(kinds, key=str))) or 'nothing'}; "
                "byte-level BPE and SentencePiece tokenizers are supported"
            )
        self._byte_pieces = "ByteFallback" in kinds
        self._replacements = [pair for step in steps if (pair := _replacement(step))]
        self._opening_strip = sum(int(step.get("start", 0)) for step in steps if step["type"] == "Strip")
        self._opening_bare = next((mark for step in steps if (mark := _dropped_at_opening(step))), "")

    def token_text(self, token_id: int) -> str:
        """The token for a reader: special tokens by name, half of a character as U+FFFD."""
        if token_id in self._special:
            return self._tokens[token_id]
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text that has already begun."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute(token_id, self._replacements)
        return known

    def opening_bytes(self, token_id: int) -> bytes:
        """What the token adds at the start of a text, where SentencePiece drops the space it put there itself."""
        if self._opening_bare:
            return self._compute(token_id, [(self._opening_bare, ""), *self._replacements])
        content = self.token_bytes(token_id)
        for _ in range(self._opening_strip):
            content = content.removeprefix(b" ")
        return content

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of a whole sequence; bytes that aren't UTF-8 become U+FFFD."""
        visible = [token_id for token_id in token_ids if token_id not in self._special]
        if not visible:
            return ""
        content = [self.opening_bytes(visible[0]), *map(self.token_bytes, visible[1:])]
        return b"".join(content).decode("utf-8", "replace")

    def _compute(self, token_id: int, replacements: Iterable[tuple[str, str]]) -> bytes:
        token = self._tokens.get(token_id)
        if token is None or token_id in self._special:
            return b""
        if self._byte_level:
            return token.encode() if token_id in self._added else _spelled_bytes(token)
        if self._byte_pieces and (match := _BYTE_PIECE.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    """The decoder's parts, sequences laid flat."""
    if not isinstance(decoder, dict):
        return
    if decoder.get("type") == "Sequence":
        for part in decoder.get("decoders", ()):
            yield from _steps(part)
    else:
        yield decoder


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    if step["type"] == "Metaspace":
        return str(step.get("replacement", "▁")), " "
    if step["type"] != "Replace":
        return None
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or not isinstance(pattern.get("String"), str):
        raise ModelNotServable("tokenizer.json decodes by a regular expression; SentencePiece tokenizers replace a string")
    return pattern["String"], str(step.get("content", ""))


def _dropped_at_opening(step: dict[str, Any]) -> str:
    """The mark for a space that a Metaspace decoder drops from the first token, if it does."""
    if step["type"] != "Metaspace":
        return ""
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    return "" if scheme == "never" else str(step.get("replacement", "▁"))


@cache
def _spelling() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 letters stand for their own byte, the other bytes for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _spelled_bytes(token: str) -> bytes:
    spelling = _spelling()
    return bytes(spelling[letter] for letter in token) if all(letter in spelling for letter in token) else token.encode()
