"""The files that llama.cpp and Ollama run.

    python -m stages.convert_gguf

models/base.json, outputs/aligned/, models/merged/, data/train_merged.jsonl, data/tokens/ -> models/gguf/: the adapter
as a GGUF LoRA (if the format can hold the adapter), the merged model as f16 and quantized, Modelfiles for Ollama,
SHA256SUMS
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipeline.common.dvc_outputs import output_hash
from pipeline.common.outputs import atomic_output, read_json, scratch, write_json
from pipeline.common.parameters.params_yaml import load
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import ALIGNED, GGUF, LICENSE, MERGED, TOKENS, TRAIN_ROWS
from pipeline.common.pinned import LLAMA_CPP, require_pinned
from pipeline.export.disk import gguf_bytes, room_for
from pipeline.export.importance import mean_squares, some_rows
from pipeline.export.llama_cpp import convert_adapter, no_gguf_lora, run_script
from pipeline.export.modelfile import adapter_modelfile, modelfile
from pipeline.model.base import file_hash, located, public_name, require_same_base
from pipeline.model.loading import load_merged, pick_device, pick_dtype, reproducible
from pipeline.model.tensor_files import parameter_count
from stages import run

LORA = "adapter-f16.gguf"


def main() -> None:
    parameters = load("convert_gguf")
    require_pinned(LLAMA_CPP)
    folder, base = located()
    require_same_base(ALIGNED, base)
    with (
        room_for(gguf_bytes(parameter_count(MERGED), parameters.gguf.quantize), GGUF),
        atomic_output(GGUF) as aside,
        scratch(GGUF) as temporary,
    ):
        aside.mkdir()
        card = temporary / "card.json"
        write_json(card, metadata(base))
        adapter_config = read_json(ALIGNED / "adapter_config.json")
        why_not = no_gguf_lora(adapter_config) or convert_lora(adapter_config, folder, card, aside / LORA)
        if why_not:
            print(f"{GGUF} gets no {LORA}: {why_not}; the merged GGUF files contain the complete adapter")
        convert_merged("f16", card, aside)
        importance = measured_importance(parameters, temporary) if parameters.gguf.imatrix else None
        for quantization in parameters.gguf.quantize:
            if quantization == "bf16":
                convert_merged("bf16", card, aside)
            else:
                quantize(aside, quantization, importance)
        served = parameters.gguf.quantize[0] if parameters.gguf.quantize else "f16"
        options = MERGED, parameters.gguf.num_ctx, parameters.gguf.temperature
        (aside / "Modelfile").write_text(modelfile(f"model-{served}.gguf", *options), encoding="utf-8")
        if (aside / LORA).exists():
            (aside / "Modelfile.adapter").write_text(adapter_modelfile(LORA, *options), encoding="utf-8")
        sums = [f"{file_hash(file)}  {file.name}\n" for file in sorted(aside.iterdir())]
        (aside / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def metadata(base: dict[str, Any]) -> dict[str, Any]:
    """The metadata of every GGUF file: by the names of a model card on the hub, and by own keys, which have a dot.

    The commit is not known yet. dvc.lock will hold the hash of the adapter: `git log -S HASH -- dvc.lock` finds the
    commit.
    """
    name = public_name(base)
    return {
        "model_name": f"{Path(name).name}-qlora",
        "base_model": name,
        **read_json(LICENSE),
        "qlora_dvc.base": base["fingerprint"],
        "qlora_dvc.adapter": output_hash(str(ALIGNED)),
        "qlora_dvc.data": file_hash(TRAIN_ROWS),
    }


def convert_lora(adapter_config: dict[str, Any], base: Path, card: Path, file: Path) -> str | None:
    """Convert the adapter to a GGUF LoRA. Returns why there is none, or None.

    llama.cpp scales every adapter by alpha / r, so the alpha of an rsLoRA adapter, which is scaled by alpha / sqrt(r),
    is multiplied by sqrt(r).
    """
    adapter = ALIGNED
    if adapter_config["use_rslora"]:
        adapter = card.with_name(ALIGNED.name)
        shutil.copytree(ALIGNED, adapter, copy_function=shutil.copyfile)  # without the mode: DVC may have linked it
        adapter_config["lora_alpha"] *= math.sqrt(adapter_config["r"])
        (adapter / "adapter_config.json").write_text(json.dumps(adapter_config), encoding="utf-8")
    return convert_adapter(adapter, base, file, "--card", card)


def convert_merged(outtype: str, card: Path, folder: Path) -> None:
    file = folder / f"model-{outtype}.gguf"
    run_script("convert.py", "hf", MERGED, "--card", card, "--outtype", outtype, "--outfile", file)


def measured_importance(parameters: Parameters, folder: Path) -> Path:
    """Write a file with the importance of each input of the merged model's weights, measured on training rows."""
    file = folder / "importance.safetensors"
    reproducible(0, parameters.threads)
    device = pick_device(parameters.base.device)
    model = load_merged(MERGED, device, pick_dtype(parameters.base.compute_dtype, device))
    save_file(mean_squares(model, some_rows(TOKENS / "train.arrow")), file)
    return file


def quantize(folder: Path, quantization: str, importance: Path | None) -> None:
    name = f"model-{quantization}.gguf"
    weighed: list[str | Path] = ["--importance", importance] if importance else []
    log = run_script("quantize.py", folder / "model-f16.gguf", folder / name, quantization, *weighed)
    for line in log.splitlines():
        if "without importance" in line:
            print(f"{name}: {line}")
    if replaced := log.count("falling back to"):
        print(f"{name}: {replaced} tensors get a larger type, because their row length is not a multiple of 256")


if __name__ == "__main__":
    run(main)
