"""params.yaml, `merge`: checking and splitting the rows."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.common.parameters.section import Section

# The columns by which the stages merge, corpus and pairs recognize the format of a row.
Column = Literal[
    "messages",
    "conversations",
    "system",
    "tools",
    "functions",
    "question",
    "answer",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "chosen",
    "rejected",
    "label",
    "kto_tag",
    "preferred_output",
    "non_preferred_output",
]


class Merge(Section):
    columns: dict[Column, str]
    on_invalid: Literal["raise", "skip"]
    on_leak: Literal["raise", "drop"]
    near_leak: Annotated[float, Field(ge=0.5, le=1)]
    near_duplicate: Annotated[float, Field(ge=0.5, lt=1)] | None
    valid_share: Annotated[float, Field(gt=0, lt=1)]
    split_by: Literal["row", "source"]
