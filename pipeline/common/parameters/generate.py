"""params.yaml, `generate`: questions from facts and documents."""

from typing import Annotated

from pydantic import Field

from pipeline.common.parameters.section import Positive, Section


class Generate(Section):
    phrasings_per_fact: Positive
    endpoint: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")] | None  # a key or password has no place in it
    model: Annotated[str, Field(min_length=1)] | None
    passage_length: Annotated[int, Field(ge=100)]
    questions_per_passage: Positive
    paraphrases: Annotated[int, Field(ge=0)]
    turns: Positive
    unanswerable: Annotated[float, Field(ge=0, le=1)]
    grounding: Annotated[float, Field(ge=0, le=1)]
    concurrency: Positive
    token_budget: Positive
    replay: Annotated[int, Field(ge=0)]
    replay_length: Positive
