"""params.yaml, `align`: preference training, after train_qlora."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.common.parameters.section import Positive, Section, Share


class Align(Section):
    method: Literal["none", "dpo", "kto", "orpo"]
    beta: Annotated[float, Field(gt=0)]
    sft_weight: Annotated[float, Field(ge=0)]
    repeat_weight: Annotated[float, Field(ge=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    epochs: Annotated[float, Field(gt=0)]
    batch_size: Positive
    gradient_accumulation: Positive
    warmup_share: Share
    eval_steps: Positive
