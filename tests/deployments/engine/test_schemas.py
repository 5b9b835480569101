"""Which schemas are taken, what is said of those that aren't, and what is left of those that are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.errors import InvalidRequest
from deployments.engine.schemas import MAX_BYTES, MAX_DEPTH, MAX_PROPERTIES, admit
from tests.deployments.engine.forms import SCHEMAS, deep, record


def refusal(schema: Any, *, strict: bool = False) -> str:
    with pytest.raises(InvalidRequest) as refused:
        admit(schema, strict=strict, param="the.param")
    assert refused.value.param == "the.param"
    return refused.value.message


@pytest.mark.parametrize("name", SCHEMAS)
def test_ordinary_schemas_are_taken_strictly(name: str) -> None:
    kept = json.loads(admit(SCHEMAS[name], strict=True, param="p"))
    assert kept.get("properties", {}).keys() == SCHEMAS[name].get("properties", {}).keys()


def test_notes_are_left_out_and_the_order_of_properties_is_kept() -> None:
    schema = {
        "title": "T",
        **record(z={"type": "null", "description": "D"}, a={"default": 1, "type": "integer"}),
        "$id": "https://x/y",
    }
    assert admit(schema, strict=True, param="p") == json.dumps(
        record(z={"type": "null"}, a={"type": "integer"}), separators=(",", ":")
    )


def test_a_property_may_have_the_name_of_a_word() -> None:
    schema = record(title={"type": "null"}, **{"not": {"type": "null"}, "$ref": {"type": "null"}})
    assert json.loads(admit(schema, strict=True, param="p")) == schema


@pytest.mark.parametrize(
    "word", ["not", "if", "contains", "propertyNames", "dependentRequired", "unevaluatedProperties", "$dynamicRef"]
)
@pytest.mark.parametrize("strict", [False, True])
def test_what_cannot_be_enforced_is_refused_by_name(word: str, strict: bool) -> None:
    assert word in refusal(record(a={word: {}}), strict=strict)


def test_unknown_words_and_formats_are_notes_unless_strict() -> None:
    schema = {"type": "string", "format": "iban", "minLenght": 4}
    assert admit(schema, strict=False, param="p") == '{"type":"string"}'
    assert "format" in refusal({"type": "string", "format": "iban"}, strict=True)
    assert "minLenght" in refusal({"type": "string", "minLenght": 4}, strict=True)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (deep(MAX_DEPTH), f"deeper than {MAX_DEPTH}"),
        (record(**{f"p{i}": True for i in range(MAX_PROPERTIES + 1)}), f"more than {MAX_PROPERTIES}"),
        ({"enum": ["x" * MAX_BYTES]}, f"longer than {MAX_BYTES}"),
        ({"type": "string", "maxLength": 1 << 40}, "maxLength"),
        ({"type": "string", "minLength": True}, "minLength"),
        ({"type": "string", "pattern": "a{1000000}"}, "10000 times"),
        ({"type": "string", "pattern": 5}, "pattern"),
        ({"patternProperties": {"a{,1}b{3,99999}": True}}, "10000 times"),
        ({"$ref": "https://example.com/schema.json"}, "point into the schema itself"),
        ({"$ref": "#/$defs/none"}, "points to no schema"),
        ({"$ref": "#/enum/0", "enum": [{}]}, "points to no schema"),
        ({"additionalProperties": True, "minProperties": 2}, "minProperties"),
        ({"const": 2**60}, "2^53"),
        ({"properties": []}, "properties must be an object"),
        ({"anyOf": []}, "anyOf"),
        ({"items": 5}, "object or a boolean"),
        ({"required": "a"}, "required"),
        ({"minimum": "1"}, "minimum"),
        ({"properties": {"a": {"$id": "https://other"}}}, "$id"),
        ("not JSON", "not valid JSON"),
        ("[" * 60000, "JSON"),
        ('{"const": ' + "[" * 30000 + "]" * 30000 + "}", ""),
        ([], "object or a boolean"),
        ({"const": "\ud800"}, "Unicode"),
    ],
)
def test_bounds_say_what_is_too_much(schema: Any, says: str) -> None:
    assert says in refusal(schema)


def test_a_reference_may_be_escaped_or_point_to_the_root() -> None:
    schema = {
        "$defs": {"a/b~c": {"type": "null"}},
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/$defs/a~1b~0c"}, {"$ref": "#"}]},
    }
    assert admit(schema, strict=True, param="p")
