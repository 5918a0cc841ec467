"""params.yaml, `lora`: the adapter."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.common.parameters.section import Positive, Section, Share


class Lora(Section):
    r: Positive
    alpha: Positive
    dropout: Share
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
    use_rslora: bool
    use_dora: bool
    modules_to_save: list[str]
    trainable_tokens: Literal["auto"] | list[str]
