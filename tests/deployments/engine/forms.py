"""Schemas, expressions and grammars to hold answers to: ordinary ones, which must be met, and hostile ones, to be survived."""

from __future__ import annotations

from typing import Any

from cluster.types import Constraint

SHORT = {"type": "string", "maxLength": 12}
NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}},
    "required": ["value", "children"],
    "additionalProperties": False,
}


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: dict[str, Any] = {
    "flat": record(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "optional": {"type": "object", "properties": {"a": SHORT, "b": {"type": "null"}}, "additionalProperties": False},
    "nested": record(outer=record(inner=record(leaf={"type": "boolean"}))),
    "enum": record(color={"enum": ["red", "green", 'blu"e', "\u00e9t\u00e9", "\u6771\u4eac"]}),
    "enum of kinds": {"enum": [1, "1", None, True, [1, "a"], {"k": 1.5}]},
    "const": record(kind={"const": "circle"}, radius={"type": "number", "exclusiveMinimum": 0, "maximum": 10}),
    "bounds": {"type": "integer", "minimum": -17, "exclusiveMaximum": 4203},
    "fractions": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "tens": {"type": "integer", "multipleOf": 10, "minimum": 0, "maximum": 990},
    "lengths": {"type": "string", "minLength": 5, "maxLength": 9},
    "exact length": {"type": "string", "minLength": 3, "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "loose pattern": {"type": "string", "pattern": "ab+c", "maxLength": 20},
    "anchored halves": {"type": "string", "pattern": "^a|b$", "maxLength": 10},
    "date": record(on={"type": "string", "format": "date"}, at={"type": "string", "format": "time"}),
    "addresses": record(ip={"type": "string", "format": "ipv4"}, id={"type": "string", "format": "uuid"}),
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 5},
    "array of records": {"type": "array", "items": record(a={"type": "boolean"}), "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, SHORT], "items": False, "minItems": 2},
    "tuple of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "boolean"}, {"type": "null"}],
        "additionalItems": False,
        "minItems": 2,
    },
    "any of": {"anyOf": [record(a={"type": "integer", "maximum": 99, "minimum": 0}), {"type": "null"}, SHORT]},
    "one of": {"oneOf": [record(kind={"const": "a"}, x={"type": "boolean"}), record(kind={"const": "b"}, y={"type": "null"})]},
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"]},
        ],
        "properties": {"a": True, "b": True},
        "additionalProperties": False,
    },
    "several types": {"type": ["integer", "null", "boolean"], "minimum": 0, "maximum": 99},
    "references": {
        "$defs": {"point": record(x={"type": "boolean"})},
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "maxItems": 2,
    },
    "tree": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    "map of patterns": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,8}$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "needs one": {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": {"type": "null"}},
    "escapes": record(**{'q"uote': {"type": "null"}, "back\\slash": {"type": "null"}, "t\tab": {"type": "boolean"}}),
    "annotated": {"title": "T", "description": "D", "examples": [1], "default": True, "type": "boolean", "$comment": "none"},
    "strings of one letter": {"type": "string", "pattern": "^(\u00e4|\U0001f600){1,6}$"},
}
"""Met by every complete answer, and soon complete even when every token is a throw of dice."""

CONSTRAINTS: dict[str, tuple[Constraint, str]] = {
    "expression": (Constraint("regex", r"(yes|no), [0-9]{1,3}%"), r"(yes|no), [0-9]{1,3}%"),
    "anchors": (Constraint("regex", r"^[a-f]{4}$"), r"[a-f]{4}"),
    "choice": (Constraint("regex", r"red|green|a\.b"), r"red|green|a\.b"),
    "lark": (
        Constraint("grammar", 'start: "<" NAME ">" item ("," item)~0..3\nitem: "x" | "yy"\nNAME: /[a-z]{1,4}/'),
        r"<[a-z]{1,4}>(x|yy)(,(x|yy)){0,3}",
    ),
    "schema within lark": (
        Constraint(
            "grammar",
            'start: "<call>" body "</call>"\nbody: %json {"type": "object", "properties": {"n": {"enum": [1, 2]}}, '
            '"required": ["n"], "additionalProperties": false}',
        ),
        r'<call>\{\s*"n"\s*:\s*[12]\s*\}</call>',
    ),
}
"""Each with an expression of Python's that says the same."""


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE_SCHEMAS: dict[str, Any] = {
    "deep": deep(30),
    "hundred thousand values": {"enum": [f"v{number}" for number in range(100_000)]},
    "many properties": record(**{f"p{number}": {"type": "null"} for number in range(300)}),
    "circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "itself": {"$ref": "#"},
    "elsewhere": {"$ref": "https://example.com/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "nowhere": {"$ref": "#/$defs/none"},
    "no string": {"type": "string", "minLength": 5, "maxLength": 3},
    "nothing": {"not": {}},
    "look ahead": {"type": "string", "pattern": "(?=a)b"},
    "look back": {"type": "string", "pattern": r"(a)\1"},
    "million repetitions": {"type": "string", "pattern": "a{1000000}"},
    "huge bound": {"type": "string", "maxLength": 1 << 40},
    "half of a character": {"type": "string", "pattern": r"[\uD800]"},
    "unbalanced": {"type": "string", "pattern": "(((("},
    "exponential union": {
        "allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"minimum": j}}} for j in range(2)]} for i in range(22)]
    },
    "wrong type": {"type": "integr"},
    "control": {"x-guidance": {"lenient": True}, "type": "object", "uniqueItems": True},
    "map of two": {"type": "object", "additionalProperties": True, "minProperties": 2},
    "no exact number": {"const": (1 << 53) + 1},
}
"""Refused."""

HOSTILE_CONSTRAINTS: dict[str, Constraint] = {
    "nested repetition": Constraint("regex", "(a+)+b"),
    "wide repetition": Constraint("regex", r"(\w{1,300}\s?){1,300}"),
    "nested counts": Constraint("regex", "(a{9999}){9999}"),
    "many states": Constraint("regex", "(.*a.{14}b)|(.*c.{15}d)"),
    "many alternatives": Constraint("regex", "(?:" + "|".join(f"(a{{1,{i}}}b{{1,{i}}})*" for i in range(1, 200)) + ")"),
    "intersection": Constraint("grammar", "start: A\nA: /(.*a.{14})/ & /(.*b.{15})/ & ~/(.*c.{13}d)/"),
    "ambiguous": Constraint("grammar", 'start: e\ne: e e | e e e | "a" | "aa" |'),
    "endless": Constraint("grammar", "start: start"),
    "no end": Constraint("grammar", 'start: "a" start'),
    "unknown rule": Constraint("grammar", "start: nobody"),
    "a file": Constraint("grammar", "%import .etc.passwd\nstart: passwd"),
    "empty": Constraint("grammar", ""),
    "no grammar": Constraint("grammar", "\0\x01{{{"),
    "names": Constraint("regex", r"\p{L}{1,2000}\p{Greek}{1,2000}"),
    "deep parentheses": Constraint("regex", "(" * 2000 + "a" + ")" * 2000),
    "exponential rules": Constraint(
        "grammar", "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"'
    ),
}
"""Refused, or served within the bounds."""
