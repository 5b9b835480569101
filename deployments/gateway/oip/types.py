"""Requests of the Open Inference Protocol as strict, bounded types (KServe's specification, Triton's binary tensor extension).

Unknown fields and parameters are ignored; Triton's that would change the answer, and that aren't here, are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from deployments.gateway.openai.bounded import Bounded

MAX_TENSORS = 4096
"""Inputs of a call: a table's columns, at most."""
MAX_DIMENSIONS = 8

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]
DATATYPES: tuple[Datatype, ...] = get_args(Datatype)
Name = Annotated[str, Field(min_length=1, max_length=256)]
Size = Annotated[int, Field(ge=0)]

REFUSED = {
    "shared_memory_region": "shared memory is not offered: send the tensor",
    "shared_memory_byte_size": "shared memory is not offered: send the tensor",
    "classification": "the classification extension is not offered: take the tensor",
    "sequence_id": "models here keep no state between calls",
}
"""Parameters that would change an answer."""


class _Parameters(Bounded):
    @pydantic.model_validator(mode="before")
    @classmethod
    def _offered(cls, value: Any) -> Any:
        for name, reason in REFUSED.items():
            if isinstance(value, dict) and name in value:
                raise PydanticCustomError("unsupported_parameter", "{name}: {reason}", {"name": name, "reason": reason})
        return value


class CallParameters(_Parameters):
    binary_data_output: bool | None = None
    """Whether outputs come as raw bytes behind the JSON, unless one says otherwise."""


class InputParameters(_Parameters):
    binary_data_size: Size | None = None
    """Bytes of the tensor, which lie behind the JSON in the order of the inputs."""


class OutputParameters(_Parameters):
    binary_data: bool | None = None


class Input(Bounded):
    name: Name
    shape: Annotated[list[Size], Field(min_length=1, max_length=MAX_DIMENSIONS)]
    datatype: Datatype
    parameters: InputParameters | None = None
    data: list[Any] | None = None


class Output(Bounded):
    name: Name
    parameters: OutputParameters | None = None


class InferRequest(Bounded):
    id: str | None = Field(default=None, max_length=256)
    parameters: CallParameters | None = None
    inputs: Annotated[list[Input], Field(min_length=1, max_length=MAX_TENSORS)]
    outputs: Annotated[list[Output], Field(max_length=MAX_TENSORS)] | None = None


class LoadRequest(Bounded):
    """Of load and unload. A model's configuration and files can't be sent."""

    parameters: dict[str, Any] | None = None

    @pydantic.field_validator("parameters")
    @classmethod
    def _none_of_ours(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if set(value or {}) - {"unload_dependents"}:
            raise PydanticCustomError(
                "unsupported_parameter", "a model's configuration and files can't be sent: register a version, then `mmaas deploy`"
            )
        return value


class IndexRequest(Bounded):
    ready: bool | None = None
    """Only models that answer."""
