"""The base as a GGUF file, for the GGUF LoRA."""

from pathlib import Path

import torch

from pipeline.common.outputs import scratch
from pipeline.export.llama_cpp import run_script
from pipeline.export.merging import merge


def convert_base(base: Path, quantization: str, dtype: torch.dtype, file: Path) -> None:
    """Write `base` to `file` in float16, with the weights that training had: with NF4, rounded to `dtype` and NF4."""
    with scratch(file) as rounded:
        if quantization == "nf4":
            merge(base, None, rounded, on_nf4=True, dtype=dtype)
            base = rounded
        run_script("convert.py", "hf", base, "--outtype", "f16", "--outfile", file)
