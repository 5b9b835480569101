"""A model that repeats, as a Serve deployment, and bare FastAPI on Serve in front of it: what a gateway is measured against.

The model answers as a replica of ours does, with the same chunks, so that our gateway finds nothing changed. `Bare` is what one
writes in ten lines: it parses JSON, calls the model over a handle and puts the answer together. It knows no keys, bounds, deadlines
or errors.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cluster.types import Chunk, Delta, Generate, Message, Sampling, Usage

NAME = "echo"


class LLM:
    """Says `max_tokens` words. Its prompt is the time between two of them in seconds."""

    async def generate(self, request: Generate) -> AsyncGenerator[Chunk, None]:
        tokens, pause_s = request.sampling.max_tokens or 8, float(request.messages[-1].content or 0)
        if pause_s:
            for place in range(tokens):
                yield Chunk((Delta(0, " word", token_ids=(1,)),), begun=None if place else Usage(3, 0))
                await asyncio.sleep(pause_s)
        else:
            yield Chunk((Delta(0, " word" * tokens, token_ids=(1,) * tokens),), begun=Usage(3, 0))
        yield Chunk((Delta(0, "", finish_reason="length"),), Usage(3, tokens))

    async def info(self) -> dict[str, Any]:
        return {"max_model_len": 1 << 20, "vocab_size": 2, "digest": NAME, "state": "awake"}

    async def stats(self) -> dict[str, float]:
        return {}


def generate(body: dict[str, Any], request_id: str) -> Generate:
    messages = tuple(Message(message["role"], message["content"]) for message in body["messages"])
    return Generate(request_id, "bench", messages, sampling=Sampling(max_tokens=body.get("max_tokens", 8)))


class Bare:
    """Here and not in a function: Serve would carry it to its replica without the names that FastAPI reads in annotations."""

    def __init__(self, model: Any) -> None:
        self._model = model.options(stream=True)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI()
        app.post("/v1/chat/completions")(self.chat)
        return app

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        chunks = self._model.generate.remote(generate(body, "req"))
        if body.get("stream"):
            return StreamingResponse(_events(chunks), media_type="text/event-stream")
        text = "".join([delta.text async for chunk in chunks for delta in chunk.deltas])
        return JSONResponse(_answer("chat.completion", {"message": {"role": "assistant", "content": text}}, "length"))


def bare(handle: Any) -> Any:
    """The Serve application around the model's handle."""
    from ray import serve

    deployment = serve.deployment(serve.ingress()(Bare), name="Bare", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=4096)
    return deployment.bind(handle)


async def _events(chunks: Any) -> AsyncGenerator[str, None]:
    async for chunk in chunks:
        delta = {"delta": {"role": "assistant", "content": chunk.deltas[0].text}}
        yield f"data: {json.dumps(_answer('chat.completion.chunk', delta, chunk.deltas[0].finish_reason))}\n\n"
    yield "data: [DONE]\n\n"


def _answer(kind: str, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
    usage = {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    choice = {"index": 0, "logprobs": None, "finish_reason": reason, **said}
    return {"id": "chatcmpl-x", "object": kind, "created": int(time.time()), "model": NAME, "choices": [choice], "usage": usage}
