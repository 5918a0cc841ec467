"""The base as a GGUF file, for the GGUF LoRA."""

from pathlib import Path

from pipeline.common.outputs import scratch
from pipeline.export.llama_cpp import run_script
from pipeline.export.merging import merge


def convert_base(base: Path, quantization: str, file: Path) -> None:
    """Write `base` to `file` in float16, with the weights on which training had the adapter: in NF4, rounded to it."""
    with scratch(file) as rounded:
        if quantization == "nf4":
            merge(base, None, rounded, on_nf4=True)
        run_script(
            "convert.py", "hf", rounded if quantization == "nf4" else base, "--outtype", "f16", "--outfile", file
        )
