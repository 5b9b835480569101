"""Small chat templates in the style of published models' own, one for each way of writing calls, with a tokenizer of its tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deployments.engine import texts

_HERMES = """{%- if tools %}
    {{- '<|im_start|>system\\nYou may call functions:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\nWrite a call as <tool_call>{"name": …, "arguments": …}</tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.role == 'assistant' %}{{- message.content.split('</think>')[-1] }}{% else %}{{- message.content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
_LLAMA = """{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length > 1 %}{{- raise_exception('one call a turn') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|im_start|>assistant\\n{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|im_end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>ipython\\n' + ({'output': message.content} | tojson) + '<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.first and tools %}
            {{- 'Respond as {"name": function, "parameters": values}.\\n' }}
            {%- for tool in tools %}{{- tool | tojson(indent=4) }}{%- endfor %}
        {%- endif %}
        {{- message.content | trim }}{{- '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}"""
_MISTRAL = """{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == asked[-1] %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last else ']<|im_end|>' }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + (message.content | tojson) + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- else %}{{- message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}"""
_NAMED = """{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if loop.last and tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
        {%- endfor %}
        {{- '<|im_end|>' }}
    {%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}{{- message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}"""


@dataclass(frozen=True)
class Chat:
    """A template with the added tokens that its model has: special ones, and words."""

    template: str
    special: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


_INST = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"]
CHATS = {
    "hermes": Chat(_HERMES, words=["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<b>", "<|fim|>"]),
    "llama": Chat(_LLAMA, special=["<|python_tag|>", "<|eom_id|>"]),
    "mistral": Chat(_MISTRAL, special=_INST),
    "mistral-named": Chat(_NAMED, special=[*_INST, "[ARGS]", "[CALL_ID]"]),
}


def write_tokenizer(directory: Path, chat: Chat, **config: Any) -> Path:
    """A byte-level tokenizer with that chat's tokens and template."""
    texts.byte_level(directory, chat.template, **config)
    spec = json.loads((directory / "tokenizer.json").read_text())
    added, first = spec["added_tokens"], max(token["id"] for token in spec["added_tokens"]) + 1
    for number, content in enumerate([*chat.special, *chat.words]):
        token = {"id": first + number, "content": content, "special": content in chat.special}
        added.append({**added[0], **token, "normalized": content == "<tool_response>"})
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    return directory
