"""params.yaml, `base`: the base model."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.common.parameters.section import Section


class Base(Section):
    model: Annotated[str, Field(min_length=1)]
    revision: str | None
    quantization: Literal["nf4", "none"]
    device: Literal["auto", "cpu", "cuda"]
    compute_dtype: Literal["auto", "float32", "bfloat16"]
    thinking: Literal["auto", "on", "off"]
