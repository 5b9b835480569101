"""POST /v2/models/{model}/infer: what is asked of a model of tensors, and how to say what comes back. Does no I/O."""

from __future__ import annotations

from typing import Any

from cluster.errors import InvalidRequest
from cluster.types import Predict, Predicted, Tensor
from deployments.gateway.oip import elements
from deployments.gateway.oip.types import InferRequest, Input
from deployments.gateway.oip.wire import Body
from deployments.gateway.openai.types import parse

Answer = tuple[dict[str, Any], list[bytes]]
"""The JSON, and the tensors that lie behind it."""


class InferCall:
    """One request. Making it raises InvalidRequest, and takes long for a long one."""

    def __init__(self, model: str, version: str | None, body: Body, *, request_id: str, tenant: str) -> None:
        request = parse(InferRequest, body.tree)
        self.model, self._id = model, request.id
        outputs = request.outputs or []
        _check_once("inputs", [one.name for one in request.inputs])
        _check_once("outputs", [one.name for one in outputs])
        self._binary = bool(request.parameters and request.parameters.binary_data_output)
        self._chosen = {
            one.name: one.parameters.binary_data for one in outputs if one.parameters and one.parameters.binary_data is not None
        }
        tensors = _tensors(request.inputs, body.binary)
        self.asked = Predict(request_id, tenant, tensors, tuple(one.name for one in outputs), version)

    def answer(self, predicted: Predicted) -> Answer:
        """Raises InvalidRequest for an output that can't be said in JSON."""
        outputs, behind = list[dict[str, Any]](), list[bytes]()
        for tensor in predicted.outputs:
            said: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
            if self._chosen.get(tensor.name, self._binary):
                outputs.append(said | {"parameters": {"binary_data_size": len(tensor.data)}})
                behind.append(tensor.data)
            else:
                outputs.append(said | {"data": elements.written(tensor)})
        named = {} if self._id is None else {"id": self._id}
        return {"model_name": self.model, "model_version": predicted.version, **named, "outputs": outputs}, behind


def _tensors(inputs: list[Input], binary: memoryview) -> tuple[Tensor, ...]:
    """The inputs with their bytes, which must be all that there are."""
    tensors, place = [], 0
    for one in inputs:
        size = one.parameters.binary_data_size if one.parameters else None
        if (size is None) == (one.data is None):
            raise InvalidRequest(f"The input {one.name!r} needs either data or binary_data_size.", param="inputs")
        shape = tuple(one.shape)
        if one.data is not None:
            tensors.append(Tensor(one.name, one.datatype, shape, elements.read(one.name, one.datatype, shape, one.data)))
        elif size is not None:
            if place + size > len(binary):
                raise InvalidRequest(
                    f"The input {one.name!r} has {size} bytes, and {len(binary) - place} are left.", param="inputs"
                )
            tensors.append(Tensor(one.name, one.datatype, shape, bytes(binary[place : place + size])))
            place += size
    if place != len(binary):
        raise InvalidRequest(f"{len(binary) - place} bytes lie behind the last tensor.", param="inputs")
    return tuple(tensors)


def _check_once(field: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise InvalidRequest(f"Two {field} have the same name.", param=field)
