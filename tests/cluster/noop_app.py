"""A program for tests: joins the platform whose settings are its argument (JSON) and serves an application that does nothing."""

from __future__ import annotations

import asyncio
import json
import sys

from cluster import ingress, raynode, settings


def serve_noop(loaded: settings.Settings) -> None:
    raynode.join(loaded)
    from fastapi import FastAPI
    from ray import serve

    api = FastAPI()

    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    @serve.ingress(api)
    class Noop:
        def __init__(self) -> None:
            ingress.bind_inside()

        @api.get("/slow")
        async def slow(self) -> str:
            await asyncio.sleep(2)
            return "late"

    serve.start(http_options=ingress.http_options(loaded))
    serve.run(Noop.bind(), name="noop", route_prefix="/")


if __name__ == "__main__":
    serve_noop(settings.load(**json.loads(sys.argv[1])))
