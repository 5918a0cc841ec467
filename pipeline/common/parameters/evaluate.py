"""params.yaml, `evaluate`: the exams."""

from typing import Annotated

from pydantic import Field

from pipeline.common.parameters.section import Positive, Section


class Evaluate(Section):
    max_new_tokens: Positive
    batch_size: Positive
    max_kl: Annotated[float, Field(gt=0)]
    repeats: Annotated[int, Field(ge=3)]
