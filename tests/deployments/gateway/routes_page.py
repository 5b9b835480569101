"""Writes docs/openai-routes.md: which published routes of the OpenAI API exist here, and which routes are ours alone.

`python -m tests.deployments.gateway.routes_page > docs/openai-routes.md`; a test holds the page against what this says.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.deployments.gateway.whole import OPERATIONS
from tests.published import DOCUMENT, Route, shape

HEAD = """# Routes of the OpenAI API

Generated: do not edit. Of the published document (specification 2.3.0) the families `models`, `chat/completions`, `completions`,
`embeddings`, `organization` and `projects`; other families do not exist here at all. What is there is driven by the official
client with strict validation, and its answers are held against the published schemas
(`tests/deployments/gateway/test_conformance.py`). What is not there answers 404, or 405 where another method of the path is.
"""


def page() -> str:
    ours = {(one.method, shape(one.path)): str(one) for one in OPERATIONS}
    published: dict[Route, str] = {
        (method.upper(), shape(f"/v1{path}")): f"{method.upper()} /v1{path}"
        for path, item in DOCUMENT["paths"].items()
        for method in item
    }
    there, absent = ours.keys() & published.keys(), published.keys() - ours.keys()
    alone = ours.keys() - published.keys()
    parts = [
        (f"Here ({len(there)} of {len(published)})", (published[route] for route in there)),
        (f"Not here ({len(absent)})", (published[route] for route in absent)),
        (f"Ours alone ({len(alone)})", (ours[route] for route in alone)),
    ]
    return "\n".join([HEAD, *(f"## {title}\n\n{listed(routes)}" for title, routes in parts)])


def listed(routes: Iterable[str]) -> str:
    """A line a path, with its methods."""
    methods: dict[str, list[str]] = {}
    for route in sorted(routes, key=lambda route: route.split(" ")[::-1]):
        method, _, path = route.partition(" ")
        methods.setdefault(path, []).append(method)
    return "".join(f"* `{path}`: {', '.join(found)}\n" for path, found in methods.items())


if __name__ == "__main__":
    print(page(), end="")
