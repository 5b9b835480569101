"""Stands in the place of the `haproxy` program that Ray Serve starts, and closes what Serve's configuration leaves open.

Serve renders a configuration with statistics and metrics on all interfaces, an admin socket that every local user may write to,
plain-text errors, its own pages (`/-/routes`) for everybody, no time by which a request must have been sent, and no filter for the
headers that steer Serve itself. Before each start or reload this program rewrites that file and then becomes the real HAProxy (same
process id, same arguments). Run by path in isolated mode, so it imports the standard
library only. Knows the template of Ray 2.60; whatever it does not recognise ends up closed, not open.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

SERVE_HEADERS = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve_multiplexed_model_id",
    "serve-multiplexed-model-id",
    "x-session-id",
    "x-serve- -m beg",
    "x-ray- -m beg",
)
"""With these a caller could change Serve's time limit, keep a call running after leaving, choose a replica or pass a token."""

DEFAULTS = ("timeout http-request 10s", "timeout http-keep-alive 60s")
"""Who has not sent a whole head by then, or nothing at all on an open connection, makes room."""

FRONT = (
    "http-request reject if { method CONNECT }",
    "http-request reject if { req.hdr(content-length) -m len ge 16 }",  # HAProxy 2.8 reads 2**64 as 0
    "option http-restrict-req-hdr-names delete",  # `x_session_id`: applications read `_` and `-` alike, filters don't
    *(f"http-request del-header {header}" for header in SERVE_HEADERS),
    "http-request deny deny_status 404 if { path,url_dec -m beg /-/ }",
    "http-response del-header server",
)
"""What the one public listener does before Serve's own rules."""

_SECTION = re.compile(r"(?:global|defaults|frontend|backend|listen)\b\s*(\S*)")


def tighten(config: str, bind: str, sockets: str, errors: dict[int, str]) -> str:
    """The configuration with only `http_frontend` on the network, at `bind` (HOST:PORT).

    Every other listener becomes a socket of mode 600 in the directory `sockets`; `errors` maps a status to the file of its answer.
    """
    section, lines = "", []
    for line in config.splitlines():
        if heading := _SECTION.match(line):
            section = heading[1]
        lines += _tighten_line(line, section, bind, sockets)
        if line.strip() == "defaults":
            lines += [f"    errorfile {status} {path}" for status, path in sorted(errors.items())]
            lines += [f"    {default}" for default in DEFAULTS]
    return "\n".join(lines) + "\n"


def _tighten_line(line: str, section: str, bind: str, sockets: str) -> list[str]:
    word = line.split()[:1]
    if word == ["errorfile"]:
        return []
    if word == ["bind"]:
        options = line.split()[2:]
        if section != "http_frontend":
            return [" ".join(["    bind", f"unix@{sockets}/{section}.sock", "mode", "600", *options])]
        return [" ".join(["    bind", bind, *options])] + [f"    {rule}" for rule in FRONT]
    if line.split()[:2] == ["timeout", "http-request"] or line.split()[:2] == ["timeout", "http-keep-alive"]:
        return []
    if line.split() == ["option", "splice-request"]:
        return []  # with it HAProxy misses that a caller hangs up while its answer is being made
    if line.split()[:2] == ["stats", "socket"]:
        return [re.sub(r"\bmode \d+", "mode 600", line)]
    return [line]


def main(argv: list[str]) -> None:
    """`haproxy.py BINARY HOST:PORT ERRORS_DIRECTORY ARGUMENTS…`, the arguments being HAProxy's own with `-f CONFIGURATION`."""
    binary, bind, errors, *arguments = argv
    path = Path(arguments[arguments.index("-f") + 1])
    answers = {int(file.stem): str(file) for file in Path(errors).glob("*.http")}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(tighten(path.read_text(), bind, str(path.parent), answers))
    temporary.replace(path)
    os.execv(binary, [binary, *arguments])  # noqa: S606 - replaces this process on purpose, without a shell


if __name__ == "__main__":
    main(sys.argv[1:])
