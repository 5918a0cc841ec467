"""Make the files that llama.cpp and Ollama run.

    python -m stages.convert_gguf

models/base.json, outputs/trained/, models/merged/ -> models/gguf/: the adapter as a GGUF LoRA, if it can be one, the
merged model as f16 and quantized, and Ollama's Modelfiles
"""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pipeline.base import located, require_same_base
from pipeline.llama_cpp import no_gguf_lora, run_script
from pipeline.modelfile import adapter_modelfile, modelfile
from pipeline.outputs import whole
from pipeline.parameters import load
from pipeline.refusal import run

TRAINED = Path("outputs/trained")
MERGED = Path("models/merged")
LORA = "adapter-f16.gguf"


def main() -> None:
    parameters = load("convert_gguf")
    folder, base = located()
    require_same_base(TRAINED, base)
    with whole("models/gguf") as aside:
        aside.mkdir()
        adapter_config = json.loads((TRAINED / "adapter_config.json").read_text(encoding="utf-8"))
        if why_not := no_gguf_lora(adapter_config):
            print(f"models/gguf gets no {LORA}: {why_not}; the merged model holds it all")
        else:
            convert_lora(adapter_config, folder, aside / LORA)
        run_script("convert.py", "hf", MERGED, *as_f16(aside / "model-f16.gguf"))
        for quantization in parameters.gguf.quantize:
            run_script("quantize.py", aside / "model-f16.gguf", aside / f"model-{quantization}.gguf", quantization)
        served = parameters.gguf.quantize[0] if parameters.gguf.quantize else "f16"
        options = MERGED, parameters.gguf.num_ctx, parameters.gguf.temperature
        (aside / "Modelfile").write_text(modelfile(f"model-{served}.gguf", *options), encoding="utf-8")
        if (aside / LORA).exists():
            (aside / "Modelfile.adapter").write_text(adapter_modelfile(LORA, *options), encoding="utf-8")


def convert_lora(adapter_config: dict[str, Any], base: Path, file: Path) -> None:
    """The adapter as a GGUF LoRA. llama.cpp scales every adapter by alpha / r, so rsLoRA's alpha / sqrt(r) goes into
    alpha."""
    if not adapter_config["use_rslora"]:
        return run_script("convert.py", "lora", TRAINED, "--base", base, *as_f16(file))
    adapter_config["lora_alpha"] *= math.sqrt(adapter_config["r"])
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        adapter = Path(scratch, TRAINED.name)  # the converter writes the folder's name into the file
        shutil.copytree(TRAINED, adapter)
        (adapter / "adapter_config.json").write_text(json.dumps(adapter_config), encoding="utf-8")
        run_script("convert.py", "lora", adapter, "--base", base, *as_f16(file))


def as_f16(file: Path) -> list[str | Path]:
    return ["--outtype", "f16", "--outfile", file]


if __name__ == "__main__":
    run(main)
