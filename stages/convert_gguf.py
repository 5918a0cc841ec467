"""Make the files that llama.cpp and Ollama run.

    python -m stages.convert_gguf

models/base.json, outputs/adapter/, models/merged/ -> models/gguf/: the adapter as a GGUF LoRA, the merged model as f16
and quantized, and an Ollama Modelfile
"""

from pathlib import Path

from pipeline.base import located, require_same_base
from pipeline.llama_cpp import run_script
from pipeline.modelfile import modelfile
from pipeline.outputs import whole
from pipeline.parameters import load
from pipeline.refusal import run

ADAPTER = Path("outputs/adapter")
MERGED = Path("models/merged")


def main() -> None:
    parameters = load("convert_gguf")
    folder, base = located()
    require_same_base(ADAPTER, base)
    with whole("models/gguf") as aside:
        aside.mkdir()
        run_script("convert.py", "lora", ADAPTER, "--base", folder, *as_f16(aside / "adapter-f16.gguf"))
        run_script("convert.py", "hf", MERGED, *as_f16(aside / "model-f16.gguf"))
        for quantization in parameters.gguf.quantize:
            run_script("quantize.py", aside / "model-f16.gguf", aside / f"model-{quantization}.gguf", quantization)
        served = parameters.gguf.quantize[0] if parameters.gguf.quantize else "f16"
        text = modelfile(f"model-{served}.gguf", MERGED, parameters.gguf.num_ctx, parameters.gguf.temperature)
        (aside / "Modelfile").write_text(text, encoding="utf-8")


def as_f16(file: Path) -> list[str | Path]:
    return ["--outtype", "f16", "--outfile", file]


if __name__ == "__main__":
    run(main)
