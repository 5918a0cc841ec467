"""params.yaml, `tokenize`: rows as token ids."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.common.parameters.section import Section, Share


class Tokenize(Section):
    max_length: Annotated[int, Field(ge=2)]
    on_overflow: Literal["raise", "drop", "truncate"]
    mask_history: bool
    tool_format: Literal["auto", "hermes"]
    thinking: Literal["train", "mask", "drop"]
    corpus_share: Share | None
