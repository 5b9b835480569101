"""Text to token ids and back, for one model directory. Light: neither torch nor transformers is imported.

Reads what Hugging Face models bring: tokenizer.json (the `tokenizers` library's own format), tokenizer_config.json,
special_tokens_map.json, chat_template.jinja, generation_config.json and config.json. Streams are `detokenizer.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from cluster.errors import InvalidRequest, ModelNotServable
from cluster.types import Message, Tool
from deployments.engine.chat_template import ChatTemplate
from deployments.engine.control_tokens import BREAK, ControlTokens
from deployments.engine.model_config import context_length, read_json, token_ids
from deployments.engine.vocabulary import Vocabulary

MAX_CHARS_PER_TOKEN = 16
"""A rendered chat of more characters than this for every token of the context can't be a prompt."""
_WELL_KNOWN = "<think> <tool_call> <tool_response>"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Made by `Tokenizer.load`. Calls don't change it, so threads may share it."""

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Raises ModelNotServable for a directory without a tokenizer that can be used, with what to do."""
        directory = Path(directory)
        spec = read_json(directory / "tokenizer.json")
        if not spec:
            raise ModelNotServable(
                f"{directory.name} has no tokenizer.json; write one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        config = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
        model, generation = read_json(directory / "config.json"), read_json(directory / "generation_config.json")
        eos = token_ids(generation.get("eos_token_id")) or token_ids(model.get("eos_token_id"))
        templates = template_sources(directory, config)
        return cls(spec, config, templates=templates, eos_ids=eos, context=context_length(model, 1 << 17))

    def __init__(
        self, spec: dict[str, Any], config: Mapping[str, Any], *, templates: Templates, eos_ids: frozenset[int], context: int
    ) -> None:
        """`spec` and `config`: contents of tokenizer.json and tokenizer_config.json; `context` in tokens."""
        named = {name: text for name in _NAMES if (text := _content(config.get(name)))}
        markup = _markup(spec, templates)
        self._library = _build(spec, named, markup)
        added = self._library.get_added_tokens_decoder()
        special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(special)
        self._unknown = {token_id for token_id, content in special.items() if content == named.get("unk_token", "<unk>")}
        tokens = {token_id: token for token, token_id in self._library.get_vocab(with_added_tokens=True).items()}
        self._vocabulary = Vocabulary(tokens, added=frozenset(added), special=self.special_ids, decoder=spec.get("decoder"))
        self.eos_ids = eos_ids | {token_id for token_id, content in special.items() if content == named.get("eos_token")}
        self._control = ControlTokens(special.values())
        self._ids = {token.content: token_id for token_id, token in added.items()}

        def made(source: str) -> ChatTemplate:
            room = MAX_CHARS_PER_TOKEN * context
            return ChatTemplate(source, special_tokens=named, control=self._control, markup=markup, max_chars=room)

        self._template = made(templates.chat) if templates.chat is not None else None
        self._tool_template = made(templates.tools) if templates.tools is not None else self._template
        self.tool_template = templates.tools or templates.chat

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; a model's own vocabulary may be padded beyond it."""
        return self._vocabulary.size

    @property
    def can_chat(self) -> bool:
        return self._template is not None

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template does anything with functions that a model may call."""
        return self._tool_template is not None and self._tool_template.knows_tools

    def token_id(self, token: str) -> int | None:
        """The id of an added token, special or not."""
        return self._ids.get(token)

    def encode(self, text: str) -> list[int]:
        """A raw prompt: special tokens only where the model's own post-processing puts them, never from the text itself."""
        return self._encode(self._control.defuse(text), add_special_tokens=True)

    def encode_inside(self, text: str) -> list[int] | None:
        """A piece of a text that has already begun, all of it ordinary text. None where the library can't cut it out of a longer
        one, as with pieces that don't begin where a token does."""
        wanted, text = text.encode(), self._control.defuse(text)
        for before in ("", "\x02"):  # SentencePiece puts a space in front of what begins
            ids = self._library.encode(before + text, add_special_tokens=False).ids
            skipped = b""
            while ids and skipped.strip(b" ") != before.encode():
                skipped += self.token_bytes(ids.pop(0))
            if b"".join(map(self.token_bytes, ids)) == wanted:
                return ids
        return None

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """A chat, up to where the assistant's answer begins. `tools`: what the model may call. Raises InvalidRequest for a model
        without a chat template, and for what its template refuses."""
        template = self._tool_template if tools else self._template
        if template is None:
            raise InvalidRequest("this model has no chat template; use the completions API with a prompt", param="messages")
        if not messages:
            raise InvalidRequest("a chat needs at least one message", param="messages")
        return self._encode(template.render(messages, tools), add_special_tokens=False)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text without special tokens; bytes that aren't UTF-8 become U+FFFD."""
        return self._vocabulary.decode(token_ids)

    def token_text(self, token_id: int) -> str:
        """One token for a reader: special tokens by name, half of a character as U+FFFD."""
        return self._vocabulary.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """One token's share of the text: the bytes of a sequence's tokens, joined, are its text in UTF-8."""
        return self._vocabulary.token_bytes(token_id)

    def opening_bytes(self, token_id: int) -> bytes:
        """The same for the first token of a text that continues nothing."""
        return self._vocabulary.opening_bytes(token_id)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            encoding = self._library.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequest("the text holds half of a surrogate pair, which is not Unicode text") from None
        self._check_control(text, encoding.ids)
        return self._library.post_process(encoding).ids if add_special_tokens else encoding.ids

    def _check_control(self, text: str, ids: list[int]) -> None:
        """Some models know a control token as a piece of ordinary text too (Unigram): then the text can't be told from it."""
        num_special = sum(token_id in self.special_ids and token_id not in self._unknown for token_id in ids)
        if num_special > len(self._control.find(text)):
            raise InvalidRequest("the text holds a control token that this model can't read as text")


def _markup(spec: Mapping[str, Any], templates: Templates) -> ControlTokens:
    """Tokens of the chat's form that aren't special, as `<tool_call>` and `</think>` often are: added tokens that look like markup
    and that the template writes, or that are well known. Others, like HTML's tags, are text."""
    written = (templates.chat or "") + (templates.tools or "") + _WELL_KNOWN
    added = [token for token in spec.get("added_tokens") or () if isinstance(token, dict)]
    contents = [content for token in added if (content := _content(token.get("content"))) and not token.get("special")]
    return ControlTokens(text for text in contents if _is_control(text) or (_is_markup(text) and _is_written(text, written)))


def _is_control(text: str) -> bool:
    return text.startswith("<|") and text.endswith("|>")


def _is_written(text: str, template: str) -> bool:
    """Whether a template writes this or its other half: `<think>` and `</think>` go together."""
    return text in template or text.replace("/", "", 1) in template or f"{text[0]}/{text[1:]}" in template


def _is_markup(text: str) -> bool:
    return len(text) > 2 and text[0] + text[-1] in ("<>", "[]") and not any(letter.isspace() for letter in text)


def _build(spec: dict[str, Any], named: Mapping[str, str], markup: ControlTokens) -> tokenizers.Tokenizer:
    """The library's tokenizer, changed so that it looks for special tokens in the text as it came, and only then takes the breaks
    out: what a break was put into is then text like any other."""
    parts = [{"type": "Replace", "pattern": {"String": BREAK}, "content": ""}, spec.get("normalizer")]
    normalizer = {"type": "Sequence", "normalizers": [part for part in parts if part]}
    try:
        added = [_literal(token, named, markup) for token in spec.get("added_tokens") or ()]
        library = tokenizers.Tokenizer.from_str(
            json.dumps({**spec, "normalizer": normalizer, "added_tokens": added, "truncation": None, "padding": None})
        )
    except Exception as error:  # the library raises nothing narrower
        raise ModelNotServable(f"tokenizer.json can't be used: {error}") from None
    present = {token["content"] for token in added}
    library.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in named.values() if text not in present])
    return library


def _literal(token: dict[str, Any], named: Mapping[str, str], markup: ControlTokens) -> dict[str, Any]:
    """A token that has to be shielded is looked for in the text as it came; those that have a name (`eos_token`) are always
    special."""
    if token.get("special") or token.get("content") in named.values():
        return {**token, "special": True, "normalized": False}
    return {**token, "normalized": False} if token.get("content") in markup else token


def _content(token: Any) -> str | None:
    """The text of a token, which is written as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


@dataclass(frozen=True)
class Templates:
    """Sources of a model's chat templates: the usual one, and the one for chats with tools where a model has another for those."""

    chat: str | None
    tools: str | None = None


def template_sources(directory: Path, config: Mapping[str, Any]) -> Templates:
    """chat_template.jinja, else the templates in tokenizer_config.json; of several named ones `default` and `tool_use`."""
    found = config.get("chat_template")
    entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
    named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    chat, tools = _file(directory / "chat_template.jinja"), _file(directory / "additional_chat_templates" / "tool_use.jinja")
    return Templates(chat or _text(named.get("default")), tools or _text(named.get("tool_use")))


def _file(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _text(source: Any) -> str | None:
    return source if isinstance(source, str) else None
