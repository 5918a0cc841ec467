"""A plain training loop with PEFT, as people write one: the yardstick for bench/train.py.

    python -m bench.plain_loop float32|bfloat16    # in the folder of a project that bench/train.py made

The base is not quantized. Batches have the rows of a step in a random order, padded to the longest row. In bfloat16,
the adapter is in float32 under autocast. Prints the seconds of training, and saves the adapter to trl/.
"""

import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from pipeline.common.parameters.params_yaml import check


def main(dtype: torch.dtype) -> None:
    parameters = check(Path("params.yaml"))
    train, lora = parameters.train, parameters.lora
    torch.set_num_threads(parameters.threads)
    torch.manual_seed(parameters.seed)
    base = AutoModelForCausalLM.from_pretrained("base", dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules="all-linear"))
    adapter = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in adapter:
        weight.data = weight.data.float()
    rows = Dataset.from_file("data/tokens/train.arrow").with_format("torch")
    steps = int(train.epochs * -(-len(rows) // train.batch_size))
    optimizer = torch.optim.AdamW(adapter, train.learning_rate, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(train.warmup_share * steps), steps)
    model.train()
    started = time.monotonic()
    for step in range(steps):
        if step % -(-len(rows) // train.batch_size) == 0:
            order = torch.randperm(len(rows))
        at = step % -(-len(rows) // train.batch_size) * train.batch_size
        batch = [rows[int(i)] for i in order[at : at + train.batch_size]]
        ids = pad_sequence([row["input_ids"] for row in batch], batch_first=True)
        labels = pad_sequence([row["labels"] for row in batch], batch_first=True, padding_value=-100)
        mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in batch], batch_first=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"'train_runtime': '{time.monotonic() - started:.1f}'")
    model.save_pretrained("trl")


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
