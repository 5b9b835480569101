"""Which JSON schemas a caller may hold an answer to. Pure: knows the words of JSON Schema, and nothing of how they are enforced.

A schema that passes says nothing that would be ignored: what can't be enforced is refused by name. What JSON Schema itself takes
for a mere note (titles, unknown words, formats that aren't known) is left out, unless `strict` asks to be told of the last two.
Drafts 4 to 2020-12. Bounds are those of size and nesting; what a schema costs to compile is found out by trying (`trial.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from cluster.errors import InvalidRequest

MAX_BYTES = 16 << 10
MAX_DEPTH = 16
MAX_PROPERTIES = 256
MAX_COUNT = 10_000
"""Of characters, items and repetitions that a bound may name."""
MAX_NUMBER = 1 << 53
"""Beyond it a number that was computed with is another one."""

FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
_DRAFTS = frozenset(
    f"{scheme}://json-schema.org/{draft}/schema"
    for scheme in ("http", "https")
    for draft in ("draft-04", "draft-06", "draft-07", "draft/2019-09", "draft/2020-12")
)
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SCHEMAS = frozenset({"items", "additionalItems", "additionalProperties"})
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_VALUES = frozenset({"const", "enum", "type", "required", "pattern", "format", "$ref"})
_NOTES = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment", "$anchor"}
    | {"contentMediaType", "contentEncoding", "contentSchema", "discriminator"}
)
_UNENFORCED = frozenset(
    {"not", "if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas", "contains", "minContains"}
    | {"maxContains", "uniqueItems", "propertyNames", "unevaluatedItems", "unevaluatedProperties"}
    | {"$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary", "extends", "disallow", "divisibleBy"}
)
_REPETITION = re.compile(r"\{(\d+)(?:,(\d*))?\}")


def admit(schema: object, *, strict: bool, param: str) -> str:
    """The schema as text, without its notes. Raises InvalidRequest for `param`, which says what to change."""
    if isinstance(schema, str):
        schema = _parsed(schema, param)
    reading = _Reading(strict, param)
    kept = reading.schema(schema, "#", 1)
    reading.check_references()
    try:
        text = json.dumps(kept, ensure_ascii=False, separators=(",", ":"))
        size = len(text.encode())
    except (RecursionError, UnicodeEncodeError):
        raise InvalidRequest("The schema holds a value that is nested too deep, or no Unicode text.", param=param) from None
    if size > MAX_BYTES:
        raise InvalidRequest(f"The schema is longer than {MAX_BYTES} bytes; split it or leave parts to the prompt.", param=param)
    return text


def check_repetitions(pattern: str, param: str) -> None:
    """Raises InvalidRequest for an expression that counts beyond `MAX_COUNT`."""
    for match in _REPETITION.finditer(pattern):
        if any(len(number) > 9 or int(number) > MAX_COUNT for number in match.groups() if number):
            raise InvalidRequest(f"A pattern repeats something more than {MAX_COUNT} times; write a smaller bound.", param=param)


@dataclass(slots=True)
class _Reading:
    """One walk over a schema."""

    strict: bool
    param: str
    places: set[str] = field(default_factory=set)  # where a schema is, as JSON pointers
    references: list[tuple[str, str]] = field(default_factory=list)  # from where, to where
    num_properties: int = 0

    def schema(self, node: object, place: str, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise self._bad(place, f"schemas are nested deeper than {MAX_DEPTH} levels; use $defs and $ref")
        self.places.add(place)
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise self._bad(place, "a schema must be an object or a boolean")
        kept = {}
        for word, value in node.items():
            if self._is_kept(word, value, place):
                kept[word] = self._value(word, value, place, depth)
        self._check_properties(node, place)
        return kept

    def check_references(self) -> None:
        for place, target in self.references:
            if target not in self.places:
                raise self._bad(place, "$ref points to no schema within this one; write it as #/$defs/NAME")

    def _is_kept(self, word: str, value: object, place: str) -> bool:
        if word in _MAPS | _LISTS | _SCHEMAS | _COUNTS | _NUMBERS | _VALUES:
            return word != "format" or value in FORMATS or self._is_dropped_format(value, place)
        if word in ("$schema", "$id", "id") and place == "#":
            return word == "$schema" and isinstance(value, str) and value.rstrip("#") in _DRAFTS
        if word in _NOTES:
            return False
        if word in _UNENFORCED or word == "$id":
            if word == "uniqueItems" and value is False:
                return False
            raise self._bad(place, f"{word} can't be enforced here; leave it out and check it yourself")
        if self.strict:
            raise self._bad(place, f"{word[:64]} is no word of JSON Schema that is known here; with strict=true none is ignored")
        return False

    def _is_dropped_format(self, value: object, place: str) -> bool:
        if self.strict:
            known = ", ".join(sorted(FORMATS))
            raise self._bad(place, f"the format isn't known; known are {known}; with strict=true none is ignored")
        return False

    def _value(self, word: str, value: object, place: str, depth: int) -> object:
        if word in _MAPS:
            return self._map(word, value, place, depth)
        if word in _LISTS or (word == "items" and isinstance(value, list)):
            if not isinstance(value, list) or not value:
                raise self._bad(place, f"{word} must be a list that isn't empty")
            return [self.schema(item, f"{place}/{word}/{index}", depth + 1) for index, item in enumerate(value)]
        if word in _SCHEMAS:
            return self.schema(value, f"{place}/{word}", depth + 1)
        self._check_value(word, value, place)
        return value

    def _map(self, word: str, value: object, place: str, depth: int) -> object:
        if not isinstance(value, dict):
            raise self._bad(place, f"{word} must be an object")
        if word.endswith("roperties"):
            self.num_properties += len(value)
            if self.num_properties > MAX_PROPERTIES:
                raise self._bad(place, f"the schema names more than {MAX_PROPERTIES} properties")
        if word == "patternProperties":
            for pattern in value:
                check_repetitions(pattern, self.param)
        return {name: self.schema(item, f"{place}/{word}/{name}", depth + 1) for name, item in value.items()}

    def _check_value(self, word: str, value: Any, place: str) -> None:
        if word in _COUNTS and not (type(value) is int and 0 <= value <= MAX_COUNT):
            raise self._bad(place, f"{word} must be an integer from 0 to {MAX_COUNT}")
        if word in _NUMBERS and not isinstance(value, (int, float)):
            raise self._bad(place, f"{word} must be a number")
        if word == "required" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise self._bad(place, "required must be a list of names")
        if word == "pattern":
            if not isinstance(value, str):
                raise self._bad(place, "pattern must be a string")
            check_repetitions(value, self.param)
        if word == "$ref":
            self._refer(value, place)
        if word in _NUMBERS | {"const", "enum"} and any(abs(number) > MAX_NUMBER for number in _numbers(value)):
            raise self._bad(place, f"{word} holds a number beyond 2^53, which can't be compared exactly")

    def _refer(self, target: object, place: str) -> None:
        if not isinstance(target, str) or not (target in ("#", "#/") or target.startswith("#/")):
            raise self._bad(place, "$ref may only point into the schema itself, as in #/$defs/NAME")
        pointer = unquote(target).replace("~1", "/").replace("~0", "~").rstrip("/")
        self.references.append((place, pointer))

    def _check_properties(self, node: dict[str, Any], place: str) -> None:
        """Names that no property lists may come twice, and count once."""
        least = node.get("minProperties", 0)
        if least > max(1, len(set(node.get("required") or ()))):
            raise self._bad(place, "minProperties above 1 can't be enforced beyond the required properties")

    def _bad(self, place: str, why: str) -> InvalidRequest:
        return InvalidRequest(f"Invalid schema at {place[:200]}: {why}.", param=self.param)


def _numbers(value: object) -> Iterator[int]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, int) and not isinstance(item, bool):
            yield item


def _parsed(text: str, param: str) -> object:
    if len(text) > 4 * MAX_BYTES:
        raise InvalidRequest(f"The schema is longer than {MAX_BYTES} bytes.", param=param)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest("The schema is not valid JSON.", param=param) from None
