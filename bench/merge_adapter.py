"""Compare the time and memory of `merge_adapter` with PEFT's `merge_and_unload` and with a plain copy.

    python -m bench.merge_adapter [SHAPE ...]    # 0.1B 0.5B 1.5B by default: ten minutes, 10 GiB of disk

bench/README.md has the results.

The bases have random weights in bfloat16, in files of 1 GB, and a LoRA of rank 16 on all linear layers. Each case runs
twice, in its own process; the faster run counts. `working` is the time without imports. Resident memory includes pages
of mapped files, which the system can take back; private memory does not.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.model.tensor_files import stored_tensors

ROOT = Path(__file__).parent.parent
RUNS = 2
OURS = "this pipeline"
SHAPES = {  # hidden, MLP, layers, heads, key and value heads, words
    "0.1B": (768, 2048, 12, 12, 12, 32_000),
    "0.5B": (1024, 4096, 24, 16, 8, 64_000),
    "1.5B": (2048, 5632, 28, 32, 8, 64_000),
}

# (imports, work) of the processes
COPY = (
    "import shutil",
    "for file in base.glob('*.safetensors'): shutil.copyfile(file, to / file.name)",
)
ARITHMETIC = (
    """
import json
import torch
from pipeline.export.merging import change_of, parts_by_weight
from pipeline.model.tensor_files import weights_by_file
weights = {name: weight for tensors in weights_by_file(base).values() for name, weight in tensors.items()}
config = json.loads((adapter / "adapter_config.json").read_text())
parts = parts_by_weight(adapter, config, weights)
""",
    """
for name in parts:
    change, weight = change_of(name, parts[name], config), weights[name]
    rows = weight.rows(*next(weight.blocks()))
    for first, last in weight.blocks():
        change(rows[: last - first].float(), first).to(weight.dtype).sum(dtype=torch.float32).isfinite()
""",
)
MERGE = "from pipeline.export.merging import merge"
PEFT = (
    """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
""",
    """
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
merged.to(torch.bfloat16).save_pretrained(to, max_shard_size="1GB")
""",
)
CASES = {
    "a copy of the files": COPY,
    "the arithmetic alone": ARITHMETIC,
    OURS: (MERGE, "merge(base, adapter, to, on_nf4=False)"),
    "  onto dequantized NF4": (MERGE, "merge(base, adapter, to, on_nf4=True)"),
    "PEFT, in bfloat16": (PEFT[0], PEFT[1].format(dtype="bfloat16")),
    "PEFT, in float32": (PEFT[0], PEFT[1].format(dtype="float32")),
}
TIMED = """
import sys, time
from pathlib import Path
base, adapter, to = map(Path, sys.argv[1:])
{}
started = time.monotonic()
{}
seconds = time.monotonic() - started
# Not the ru_maxrss of getrusage, which begins with that of the process that started this one.
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(seconds, int(peak) / 1024)
"""


def main() -> None:
    for shape in sys.argv[1:] or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            base, adapter = Path(folder, "base"), Path(folder, "adapter")
            make(shape, base, adapter)
            size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
            print(f"{f'{shape}, {size / 2**20:.0f} MiB':24}  seconds  working  resident MiB  private MiB", flush=True)
            for case in CASES:
                to = Path(folder, case.strip())
                to.mkdir()
                seconds, working, resident, private = min(measured(case, base, adapter, to) for _ in range(RUNS))
                print(f"{case:24}{seconds:9.1f}{working:9.1f}{resident:14.0f}{private:13.0f}", flush=True)
                if "PEFT" in case:
                    print(f"  {difference(Path(folder, OURS), to)}", flush=True)
                if case != OURS:
                    shutil.rmtree(to)


def make(shape: str, base: Path, adapter: Path) -> None:
    hidden, mlp, layers, heads, kv_heads, words = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="1GB")
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    tuned.save_pretrained(adapter, save_embedding_layers=False)


def measured(case: str, base: Path, adapter: Path, to: Path) -> tuple[float, float, float, float]:
    """Return the seconds of the process and of its work, and its peak resident and private memory in MiB."""
    command = [sys.executable, "-c", TIMED.format(*CASES[case]), str(base), str(adapter), str(to)]
    started, private = time.monotonic(), 0
    with psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            memory = process.memory_info()
            private = max(private, memory.rss - memory.shared)
            time.sleep(0.005)
        seconds, printed = time.monotonic() - started, process.stdout.read()
        assert process.returncode == 0, process.stderr.read()
    working, resident = map(float, printed.splitlines()[-1].split())
    return seconds, working, resident, private / 2**20


def difference(merged: Path, other: Path) -> str:
    """Return a text: how many weights of two bfloat16 models differ, and the largest difference."""
    ours, theirs = (
        {name: weight for file in folder.glob("*.safetensors") for name, weight in stored_tensors(file).items()}
        for folder in (merged, other)
    )
    weights = same = 0
    farthest = 0.0
    for name, weight in ours.items():
        for at in weight.blocks():
            rows, others = weight.rows(*at).float(), theirs[name].rows(*at).float()
            weights, same = weights + rows.numel(), same + int((rows == others).sum())
            farthest = max(farthest, float((rows - others).abs().max()))
    return f"{weights - same:,} of {weights:,} weights differ from this pipeline's, by {farthest:.1e} at most"


if __name__ == "__main__":
    main()
