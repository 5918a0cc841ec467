"""Add the adapter to the base's 16-bit weights.

    python -m stages.merge_adapter

models/base.json, outputs/adapter/ -> models/merged/
"""

from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.base import copy_tokenizer, located, require_same_base
from pipeline.outputs import whole
from pipeline.refusal import run

ADAPTER = Path("outputs/adapter")


def main() -> None:
    folder, base = located()
    require_same_base(ADAPTER, base)
    # Not the NF4 weights: merging into those would quantize the sum again.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    merged = PeftModel.from_pretrained(model, ADAPTER).merge_and_unload(safe_merge=True)
    with whole("models/merged") as aside:
        merged.save_pretrained(aside)
        copy_tokenizer(folder, aside)


if __name__ == "__main__":
    run(main)
