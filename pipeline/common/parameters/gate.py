"""params.yaml, `gate`: what `make gate` demands of a model."""

from typing import Annotated

from pydantic import Field

from pipeline.common.parameters.section import Section


class Gate(Section):
    minimum: dict[str, float]
    max_drop: dict[str, Annotated[float, Field(ge=0)]]
    max_conversion_drop: Annotated[float, Field(ge=0, le=1)]
    max_kl: Annotated[float, Field(gt=0)]
    max_general_drop: Annotated[float, Field(ge=0, le=1)]
    min_preferred: Annotated[float, Field(ge=0, le=1)]
    max_align_drop: Annotated[float, Field(ge=0, le=1)]
