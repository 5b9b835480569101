"""The text of a key: `mk_` + 12 hexadecimal digits of id + 64 of secret (256 bits) + 8 of CRC32 over all before.

The checksum lets a scanner tell a leaked key from noise without asking us.
"""

from __future__ import annotations

import re
import zlib

from cluster.errors import Unauthenticated

_TEXT = re.compile(r"(mk_([0-9a-f]{12})([0-9a-f]{64}))([0-9a-f]{8})")


def written(key_id: str, secret: str) -> str:
    body = f"mk_{key_id}{secret}"
    return f"{body}{zlib.crc32(body.encode()):08x}"


def parsed(text: str) -> tuple[str, str]:
    match = _TEXT.fullmatch(text)
    if match is None or zlib.crc32(match[1].encode()) != int(match[4], 16):
        raise Unauthenticated("the API key is malformed: check that it was copied whole")
    return match[2], match[3]
