"""What every type of a request has in common: nothing is coerced, unknown fields are ignored, no value is repeated in an error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Bounded(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, hide_input_in_errors=True)
