"""A Ray job that talks to a served model through the gateway's handle; nothing of it passes over HTTP.

    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"MMAAS_API_KEY": "mk_…"}}' \\
        -- python examples/chat_job.py "What does str.split do?"

Without MMAAS_API_KEY the key is read from `quickstart.json` in MMAAS_HOME (default `./.mmaas`), which `mmaas up` wrote. On several
nodes pass the key, because only the head has that file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mmaas.client import connect


def main(question: str) -> None:
    quickstart = Path(os.environ.get("MMAAS_HOME", ".mmaas")) / "quickstart.json"
    known = json.loads(quickstart.read_text()) if quickstart.is_file() else {}
    with connect(api_key=os.environ.get("MMAAS_API_KEY") or known.get("api_key")) as client:
        model = known.get("model") or client.models.list()[0].id
        messages = [{"role": "user", "content": question}]
        for chunk in client.chat.completions.create(model=model, messages=messages, stream=True, max_tokens=128):
            print("".join(choice.delta.content or "" for choice in chunk.choices), end="", flush=True)  # noqa: T201
    print()  # noqa: T201


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What does str.split do?")
