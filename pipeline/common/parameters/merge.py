"""params.yaml, `merge`: checking and splitting the rows."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.common.parameters.section import Section

# The columns by which the merge stage recognizes the format of a row.
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
]


class Merge(Section):
    columns: dict[Column, str]
    on_invalid: Literal["raise", "skip"]
    on_leak: Literal["raise", "drop"]
    near_leak: Annotated[float, Field(ge=0.5, le=1)]
    near_duplicate: Annotated[float, Field(ge=0.5, lt=1)] | None
    valid_share: Annotated[float, Field(gt=0, lt=1)]
    split_by: Literal["row", "source"]
