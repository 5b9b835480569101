"""Answers of a given form through the gateway: what callers may write, and what the official client reads back."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from cluster.types import Chunk, Constraint, Generate
from deployments.admission import Admission
from deployments.answer import Answer
from deployments.engine.engine import Engine
from deployments.engine.messages import Request
from tests.deployments.engine import texts
from tests.deployments.engine.forms import HOSTILE_SCHEMAS, record
from tests.deployments.engine.test_structured import Dice
from tests.deployments.gateway.conftest import Server, serving
from tests.fakes import EchoModels

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


def asked(server: Server) -> Constraint | None:
    return server.models.requests[-1].sampling.constraint


@pytest.mark.parametrize(
    ("body", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null", "title": "T"}}}},
            Constraint("json_schema", '{"type":"null"}'),
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, Constraint("json_object")),
        ({"structured_outputs": {"json": {"type": "null"}}}, Constraint("json_schema", '{"type":"null"}')),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, Constraint("json_schema", '{"type":"null"}')),
        ({"structured_outputs": {"json_object": True}}, Constraint("json_object")),
        ({"structured_outputs": {"regex": "a+", "json": None}}, Constraint("regex", "a+")),
        ({"structured_outputs": {"choice": ["a.b", "c|d"]}}, Constraint("regex", r"a\.b|c\|d")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Constraint("grammar", 'start: "a"')),
        ({"guided_json": {"type": "null"}}, Constraint("json_schema", '{"type":"null"}')),
        ({"guided_regex": "a+"}, Constraint("regex", "a+")),
        ({"guided_choice": ["yes", "no"]}, Constraint("regex", "yes|no")),
        ({"guided_grammar": 'start: "a"'}, Constraint("grammar", 'start: "a"')),
    ],
)
def test_every_way_to_say_it_becomes_one_constraint(
    server: Server, client: openai.OpenAI, body: dict, constraint: Constraint
) -> None:
    client.chat.completions.create(model="echo", messages=HELLO, extra_body=body)
    assert asked(server) == constraint
    client.completions.create(model="echo", prompt="hello", extra_body=body)
    assert asked(server) == constraint


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a{99999}"}}, "structured_outputs.regex"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_regex": "x" * 5000}, "guided_regex"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ],
)
def test_what_is_wrong_is_refused_by_its_place(client: openai.OpenAI, body: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="echo", messages=HELLO, extra_body=body)
    assert refused.value.param == param


class Dicer(EchoModels):
    """The rest of a replica around dice in the place of a model: tokenizer, admission, engine, detokeniser."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.dice = Dice(directory)
        self.admission = Admission(directory)
        self.engine: Engine = self.dice.engine(speculation=4)

    async def generate(self, name: str, request: Generate) -> AsyncGenerator[Chunk, None]:
        sampling, tokenizer = request.sampling, self.dice.tokenizer
        if sampling.constraint:
            await self.admission.admit(sampling.constraint)
        prompt = tokenizer.render(request.messages) if request.messages else tokenizer.encode(request.prompt or "")
        work = Request(1, prompt, sampling, sampling.max_tokens or 600, sorted(tokenizer.eos_ids), seed=sampling.seed or 0)
        answer = Answer(tokenizer, work, is_chat=bool(request.messages), stop_choice=lambda index: self.engine.abort(1, index))
        self.engine.add(work)
        while self.engine.has_work:
            yield answer.take(self.engine.step())


@pytest.fixture(scope="module")
def dicer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving() as server:
        models = Dicer(texts.byte_level(tmp_path_factory.mktemp("dicer")))
        vars(server.models).update(vars(models))
        server.models.__class__ = Dicer
        yield server


class Step(pydantic.BaseModel):
    kind: Literal["add", "multiply"]
    value: int = pydantic.Field(ge=0, le=99)


class Plan(pydantic.BaseModel):
    """As the client's users write them."""

    steps: list[Step] = pydantic.Field(min_length=1, max_length=3)
    is_done: bool
    note: str | None = pydantic.Field(max_length=8)


def test_the_official_client_parses_a_whole_answer(dicer: Server) -> None:
    with dicer.client() as client:
        answer = client.chat.completions.parse(model="echo", messages=HELLO, response_format=Plan, n=2, seed=1)
    assert all(isinstance(choice.message.parsed, Plan) for choice in answer.choices)
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]


def test_the_official_client_parses_a_streamed_answer(dicer: Server) -> None:
    with (
        dicer.client() as client,
        client.chat.completions.stream(model="echo", messages=HELLO, response_format=Plan, seed=2) as stream,
    ):
        assert sum(event.type == "content.delta" for event in stream) > 5
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Plan)


def test_text_completions_have_forms_too(dicer: Server) -> None:
    with dicer.client() as client:
        body = {"structured_outputs": {"choice": ["yes", "no"]}}
        answer = client.completions.create(model="echo", prompt="x", max_tokens=50, n=3, seed=3, extra_body=body)
    assert {choice.text for choice in answer.choices} <= {"yes", "no"}


def test_a_cut_answer_is_cut_json(dicer: Server) -> None:
    with dicer.client() as client, pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="echo", messages=HELLO, response_format=Plan, max_tokens=3)


@pytest.mark.parametrize("name", HOSTILE_SCHEMAS)
def test_hostile_schemas_are_refused_by_their_place(dicer: Server, name: str) -> None:
    schema = {"name": "n", "strict": True, "schema": HOSTILE_SCHEMAS[name]}
    body = {"model": "echo", "messages": HELLO, "response_format": {"type": "json_schema", "json_schema": schema}}
    with dicer.http() as http:
        answer: httpx.Response = http.post("/v1/chat/completions", content=json.dumps(body).encode())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] in ("response_format.json_schema.schema", None)


def test_what_a_replica_refuses_names_the_field(dicer: Server) -> None:
    with dicer.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="echo", prompt="x", extra_body={"guided_regex": r"(a)\1"})
    assert (refused.value.param, refused.value.status_code) == ("guided_regex", 400)


def test_unknown_words_are_refused_where_strict(client: openai.OpenAI) -> None:
    schema = record(a={"type": "string", "minLenght": 3})
    for strict in (False, None):
        fine: Any = {"type": "json_schema", "json_schema": {"name": "n", "strict": strict, "schema": schema}}
        client.chat.completions.create(model="echo", messages=HELLO, response_format=fine)
    bad: Any = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="minLenght"):
        client.chat.completions.create(model="echo", messages=HELLO, response_format=bad)
