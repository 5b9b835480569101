"""`mmaas chat`: a conversation in the terminal, over the same HTTP interface that every caller uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx


def add_to(app: typer.Typer) -> None:
    app.command()(chat)


def chat(
    message: Annotated[str | None, typer.Argument(help="Ask this and leave; without it a conversation starts.")] = None,
    model: Annotated[str | None, typer.Option(help="Served model; the one of quickstart.json by default.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Address that ends in /v1.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key; quickstart.json's by default.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; as long as the model can by default.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
) -> None:
    """Talk to a served model. An empty line or Ctrl-D leaves."""
    import httpx

    from cluster import settings
    from mmaas.quickstart import Quickstart

    found = Quickstart.load(settings.load())
    headers = {"Authorization": f"Bearer {api_key or found.api_key}"}
    options = {"model": model or found.model, "temperature": temperature, "stream": True}
    options |= {"max_tokens": max_tokens} if max_tokens else {}
    turns: list[dict[str, str]] = []
    # trust_env=False: the address is ours, and a proxy of the environment must not see the key
    with httpx.Client(base_url=base_url or found.base_url, headers=headers, timeout=600, trust_env=False) as client:
        while asked := message or _ask():
            turns.append({"role": "user", "content": asked})
            answer = _print_all(stream(client, options | {"messages": turns}))
            turns.append({"role": "assistant", "content": answer})
            if message:
                return


def stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    """The answer's text in pieces, as the server sends them. Raises PlatformError with the server's own message."""
    import httpx

    from cluster.errors import PlatformError, Unavailable

    try:
        with client.stream("POST", "chat/completions", json=body) as answer:
            if answer.is_error:
                raise PlatformError(_message(answer.read()))
            for line in answer.iter_lines():
                if not line.startswith("data:") or (data := line.removeprefix("data:").strip()) == "[DONE]":
                    continue
                event = json.loads(data)
                if event.get("error"):
                    raise PlatformError(event["error"].get("message", "the stream broke"))
                yield from (choice["delta"].get("content") or "" for choice in event["choices"])
    except httpx.TransportError as error:
        raise Unavailable(f"{client.base_url} does not answer ({error}); is it up? mmaas status") from None


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _ask() -> str:
    try:
        return input("you> ").strip()
    except EOFError:
        return ""


def _print_all(pieces: Iterator[str]) -> str:
    """Write pieces as they come, without what could steer the terminal: a model's output is not to be trusted."""
    written = []
    for piece in pieces:
        written.append(piece)
        print(
            "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in piece),
            end="",
            flush=True,
        )
    print()
    return "".join(written)
