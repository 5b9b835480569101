"""What every request type is built on: strict, frozen, and silent about the values that it refuses."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Bounded(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, hide_input_in_errors=True)
