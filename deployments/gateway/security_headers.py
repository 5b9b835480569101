"""Headers of every answer that tell browsers to do nothing with it: the API is for programs, and its answers are one caller's."""

from __future__ import annotations

from starlette.types import Message, Receive, Scope, Send

from deployments.gateway.stage import Stage

Headers = list[tuple[bytes, bytes]]

ALWAYS: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]
"""There is no Strict-Transport-Security among them: TLS ends in front of us, and whoever ends it knows whether it is there."""

PAGE = (
    b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; connect-src 'self'; img-src data: https://fastapi.tiangolo.com; "
    b"style-src https://cdn.jsdelivr.net 'unsafe-inline'; script-src https://cdn.jsdelivr.net 'unsafe-inline'"
)
"""For the one page that we have, /docs, which FastAPI writes."""


class SecurityHeaders(Stage):
    """Adds what is not there already."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = guard(message["headers"])
            await send(message)

        await self.app(scope, receive, guarded)


def guard(headers: Headers) -> Headers:
    said = dict(headers)
    missing = [(name, value) for name, value in ALWAYS if name not in said]
    if said.get(b"content-type", b"").startswith(b"text/html"):
        missing = [(name, PAGE if name == b"content-security-policy" else value) for name, value in missing]
    return [*headers, *missing]
