"""params.yaml, `gguf`: the GGUF files."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.common.parameters.section import Positive, Section

Quantization = Literal[
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q4_k_m",
    "q4_k_s",
    "q4_0",
    "iq4_nl",
    "iq4_xs",
    "q3_k_l",
    "q3_k_m",
    "iq3_m",
    "q3_k_s",
    "q2_k",
]


def in_lower_case(name: Any) -> Any:
    """Many write Q4_K_M, as llama.cpp does."""
    return name.lower() if isinstance(name, str) else name


class Gguf(Section):
    quantize: list[Annotated[Quantization, BeforeValidator(in_lower_case)]]
    imatrix: bool
    num_ctx: Positive
    temperature: Annotated[float, Field(ge=0)]
