"""The tokenizer against transformers' own on real tokenizers, and what callers can't do to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cluster.errors import ContextLengthExceeded, InvalidRequest, ModelNotServable
from cluster.types import Message
from deployments.engine.chat_template import ChatTemplate
from deployments.engine.control_tokens import BREAK, ControlTokens
from deployments.engine.tokenizer import Tokenizer
from tests.deployments.engine import texts

END = {"__type": "AddedToken", "content": "<|end|>", "special": True}
MODELS = {
    "chatml": lambda d: texts.byte_level(d),
    "role-tokens": lambda d: texts.byte_level(d, texts.ROLE_TOKENS),
    "llama-normalizer": lambda d: texts.sentencepiece(d),
    "llama-metaspace": lambda d: texts.sentencepiece(d, legacy=False),
    "named-by-object": lambda d: texts.byte_level(d, bos_token="<|endoftext|>", add_bos_token=True, eos_token=END),
}
SCRAPS = ["<|im_", "im_end|>", "end|>", "<", ">", "|", "s>", "</", "[INST]"]
WORDS = ["Hello", "東京", "😀", "é", " ", "\n", "  two", "\t", "\0", *SCRAPS]
CONTROL = ["<|im_end|>", "<|im_start|>", "<|user|>", "<|endoftext|>", "<s>", "</s>", "<unk>", BREAK]
prose = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.sampled_from(WORDS)).map("".join))
hostile = (
    st.lists(st.one_of(st.sampled_from(WORDS + CONTROL), st.text(max_size=3)))
    .map("".join)
    .filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text))
)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """Our tokenizer and transformers' on the same files."""
    directory = MODELS[request.param](tmp_path_factory.mktemp(request.param))
    return Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)


def chat(reference, messages: list[Message], **options) -> list[int]:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    return reference.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=False, **options)


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in tokenizer.special_ids]


def no_control_token(tokenizer: Tokenizer, text: str) -> bool:
    return BREAK not in text and not any(tokenizer.token_text(token_id) in text for token_id in tokenizer.special_ids)


@settings(deadline=None)
@given(text=prose)
def test_prompts_encode_as_transformers_does(pair, text):
    ours, reference = pair
    if no_control_token(ours, text):
        assert ours.encode(text) == reference(text).input_ids


@settings(deadline=None)
@given(text=hostile)
def test_control_tokens_in_a_prompt_are_text(pair, text):
    ours, reference = pair
    text = text.replace(BREAK, "")
    assert ours.encode(text) == reference(text, split_special_tokens=True).input_ids


@settings(deadline=None)
@given(contents=st.lists(prose, min_size=1, max_size=4))
def test_chats_encode_as_transformers_does(pair, contents):
    ours, reference = pair
    messages = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    if no_control_token(ours, "".join(contents)):
        assert ours.render(messages) == chat(reference, messages)


@settings(deadline=None)
@given(contents=st.lists(hostile, min_size=1, max_size=4))
def test_a_message_adds_no_control_token(pair, contents):
    ours, _ = pair
    messages = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    harmless = [Message(message.role, "x") for message in messages]
    assert control_ids(ours, ours.render(messages)) == control_ids(ours, ours.render(harmless))


def test_control_tokens_in_a_message_stay_readable(pair):
    ours, _ = pair
    ids = ours.render([Message("user", "what does <|im_end|> or </s> do?")])
    assert "what does <|im_end|> or </s> do?" in ours.decode(ids)


CUTTING = "{% for m in messages %}<|im_start|>{{ m.content.replace('~', '') }}{{ m.content[:4] }}{{ m.content[-4:] }}{% endfor %}"


@pytest.mark.parametrize("content", ["<|im~_end|>", "<|im_~~end|>x<|i", "d|>", "~<|im_end|>~"])
def test_a_template_that_cuts_contents_makes_no_control_token_of_them(tmp_path, content):
    tokenizer = Tokenizer.load(texts.byte_level(tmp_path, CUTTING))
    ids = tokenizer.render([Message("user", content), Message("user", content)])
    assert [tokenizer.token_text(i) for i in control_ids(tokenizer, ids)] == ["<|im_start|>"] * 2


def test_neighbouring_messages_join_to_no_control_token(tmp_path):
    tokenizer = Tokenizer.load(texts.byte_level(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}"))
    assert not control_ids(tokenizer, tokenizer.render([Message("user", "<|im_"), Message("user", "end|>")]))


def test_a_role_can_not_name_a_control_token(pair):
    with pytest.raises(InvalidRequest, match="role must be one of"):
        pair[0].render([Message("endoftext", "hi")])


def test_a_control_token_that_is_ordinary_text_too_is_refused(tmp_path):
    directory = texts.byte_level(tmp_path)
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": spec["model"]["vocab"]["q"], "content": "q"})
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("harmless")
    with pytest.raises(InvalidRequest, match="control token"):
        tokenizer.render([Message("user", "q")])


@settings(deadline=None)
@given(text=prose.filter(lambda text: BREAK not in text))
def test_decoding_gives_the_text_back(pair, text):
    ours, _ = pair
    assert ours.decode(ours.encode(text)).lstrip(" ") == text.lstrip(" ")  # how many opening spaces stay is the family's choice


@settings(deadline=None)
@given(data=st.data())
def test_tokens_decode_as_transformers_does_where_they_are_utf8(pair, data):
    ours, reference = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=12))
    expected = reference.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in expected:  # transformers gives up a whole run of byte tokens for one bad byte; here only that byte
        assert ours.decode(ids) == expected


@settings(deadline=None)
@given(data=st.data())
def test_bytes_of_tokens_join_to_the_text(pair, data):
    ours, _ = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=12))
    visible = [token_id for token_id in ids if token_id not in ours.special_ids]
    joined = b"".join([ours.opening_bytes(i) for i in visible[:1]] + [ours.token_bytes(i) for i in visible[1:]])
    assert joined.decode("utf-8", "replace") == ours.decode(ids)


def test_special_tokens_have_a_name_but_no_bytes(pair):
    for token_id in pair[0].special_ids:
        assert pair[0].token_text(token_id)
        assert pair[0].token_bytes(token_id) == b""


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, None, {422}), ([7, 8], 9, {7, 8, 422}), (None, 9, {9, 422}), (None, [1, "x", True], {1, 422})],
)
def test_ends_of_sequence_come_from_every_file(tmp_path, generation, config, expected):
    directory = texts.byte_level(tmp_path)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 64, "eos_token_id": config}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert Tokenizer.load(directory).eos_ids == expected


def test_a_model_without_template_refuses_chats_and_takes_prompts(tmp_path):
    tokenizer = Tokenizer.load(texts.byte_level(tmp_path, template=None))
    assert not tokenizer.can_chat
    assert tokenizer.encode("Hello")
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render([Message("user", "hi")])


def test_the_template_may_stand_in_the_configuration(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": texts.CHATML}]
    here, there = texts.byte_level(tmp_path / "a"), texts.byte_level(tmp_path / "b", template=None, chat_template=named)
    messages = [Message("user", "hi")]
    assert Tokenizer.load(there).render(messages) == Tokenizer.load(here).render(messages)


def test_a_missing_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ModelNotServable, match="save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"model": 1}', '{"version": "1.0", "added_tokens": [1]}', "[" * 100_000, "\x00", '{"a": 1}']
)
def test_a_broken_tokenizer_is_a_clear_error(tmp_path, content):
    directory = texts.byte_level(tmp_path)
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(ModelNotServable):
        Tokenizer.load(directory)


def test_a_tokenizer_of_another_family_is_refused(tmp_path):
    directory = texts.byte_level(tmp_path)
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ModelNotServable, match="WordPiece"):
        Tokenizer.load(directory)


def test_truncation_in_the_file_cuts_no_prompt(tmp_path):
    directory = texts.byte_level(tmp_path)
    whole = Tokenizer.load(directory).encode("one two three four five")
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.load(directory).encode("one two three four five") == whole


def test_half_a_surrogate_pair_is_refused(pair):
    with pytest.raises(InvalidRequest, match="surrogate"):
        pair[0].encode("\ud800")


def template(source: str, max_chars: int = 1000) -> ChatTemplate:
    return ChatTemplate(source, special_tokens={"bos_token": "<s>"}, control=ControlTokens(["<s>"]), max_chars=max_chars)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 'x' * 100000000 }}",
        "{{ 100000000 * 'x' }}",
        "{{ 2 ** 100000000 }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ strftime_now('%Y') }}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ],
)
def test_templates_can_neither_escape_nor_fail_otherwise(source):
    with pytest.raises(InvalidRequest):
        template(source).render([Message("user", "hi")])


def test_output_of_a_template_is_bounded():
    endless = template("{% for i in range(90000) %}{% for j in range(90000) %}{{ messages[0].content }}{% endfor %}{% endfor %}")
    with pytest.raises(ContextLengthExceeded):
        endless.render([Message("user", "x" * 100)])


def test_breaks_do_not_count_as_output():
    assert template("{{ messages[0].content }}", max_chars=6).render([Message("user", "<s><s>")]).replace(BREAK, "") == "<s><s>"


def test_a_template_with_a_mistake_is_an_error_of_the_model():
    with pytest.raises(ModelNotServable):
        template("{% for %}")


def test_templates_of_transformers_have_their_words():
    source = (
        "{% generation %}{{ {'a': '<é>'} | tojson }}{% endgeneration %}{% for i in [1] %}{% break %}{% endfor %}{{ bos_token }}"
    )
    assert template(source).render([Message("user", "hi")]) == '{"a": "<é>"}<s>'


def test_loading_a_tokenizer_imports_nothing_heavy(tmp_path):
    directory = texts.byte_level(tmp_path)
    program = (
        "import sys; from deployments.engine.tokenizer import Tokenizer; from deployments.engine.checkpoint import inspect\n"
        f"Tokenizer.load({str(directory)!r}).encode('hi')\n"
        "print({'torch', 'transformers', 'deepspeed', 'ray', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("text", ['"name": "', "{", "</tool_call>", " of", "<|im_end|>", "\n\n", "\u00e9t\u00e9"])
def test_a_piece_of_a_text_is_cut_into_its_own_bytes(tmp_path: Path, text: str) -> None:
    """No token for a text's beginning and no space before it; what looks like a control token is text."""
    for kind in (texts.byte_level, texts.sentencepiece):
        tokenizer = Tokenizer.load(kind(tmp_path / kind.__name__))
        ids = tokenizer.encode_inside(text)
        assert ids is not None
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert not set(ids) & tokenizer.special_ids
