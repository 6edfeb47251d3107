"""What the records of a policy file are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(ge=0.0, le=31_536_000.0)]
PositiveSeconds = Annotated[float, Field(gt=0.0, le=31_536_000.0)]
Positive = Annotated[float, Field(gt=0.0)]
Instances = Annotated[int, Field(ge=0, le=4096)]
Steps = Annotated[int, Field(ge=1, le=4096)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )
