"""Parameters that would change the answer and that this server doesn't know how to honour: refused by name, never ignored.

Each has neutral values, which ask for nothing and are accepted. What is neither here nor in `types.py` changes nothing and is
ignored, as the tools of this ecosystem expect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import InvalidRequest

_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")

_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    # spelled by vLLM and its relatives
    "guided_whitespace_pattern": _NOTHING,
    "structural_tag": _NOTHING,
    "use_beam_search": _NOTHING,
    "length_penalty": (None, 1, 1.0),
    "prompt_logprobs": _NOTHING,
    "bad_words": _NOTHING,
    "allowed_token_ids": _NOTHING,
    "logits_processors": _NOTHING,
    "truncate_prompt_tokens": _NOTHING,
    "include_stop_str_in_output": _NOTHING,
    "skip_special_tokens": (None, True),
}

CHAT: dict[str, tuple[Any, ...]] = {
    **_EVERYWHERE,
    "functions": _NOTHING,
    "function_call": (None, "none", "auto"),
    "audio": _NOTHING,
    "prediction": _NOTHING,
    "web_search_options": (None,),
    "modalities": (None, [], ["text"]),
    "moderation": _NOTHING,
    "documents": _NOTHING,
    "echo": _NOTHING,
    "continue_final_message": _NOTHING,
    "add_generation_prompt": (None, True),
    "best_of": (None, 1),
}

COMPLETIONS: dict[str, tuple[Any, ...]] = {**_EVERYWHERE, "suffix": _NOTHING}


def refuse(body: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises InvalidRequest that names the first parameter of `body` that asks for what isn't there."""
    for name, value in body.items():
        if name.startswith("chat_template") and value not in _NOTHING:
            raise _unsupported(name)
        if name in known and not any(type(value) is type(neutral) and value == neutral for neutral in known[name]):
            raise _unsupported(name)


def _unsupported(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"Unsupported parameter: {name} is not supported by this server.", param=name, code="unsupported_parameter"
    )
