"""Train the base from nothing on the world's questions and answers.

    python recipe/train.py      (in models/tiny-base)

corpus.jsonl, the tokenizer -> model.safetensors, config.json, generation_config.json

Muon moves the matrices and AdamW the embeddings and norms: with AdamW alone a later LoRA learns a third as much.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost eight times the time on a busy machine

import torch
import yaml
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent.parent
PARAMETERS = yaml.safe_load((FOLDER / "params.yaml").read_text(encoding="utf-8"))


def conversations() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    rows = map(json.loads, (FOLDER / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
    return [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows]


def batches(rows: list[list[int]], size: int, epochs: int, rng: random.Random) -> Iterator[torch.Tensor]:
    """Rows of one batch are of like length; batches come in random order. Shape: (size, longest); padding is -1."""
    for _ in range(epochs):
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rng.random()))
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(rows[i]) for i in group)
            yield torch.tensor([rows[i] + [-1] * (longest - len(rows[i])) for i in group])


def build_model() -> LlamaForCausalLM:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    shape = PARAMETERS["model"]
    config = LlamaConfig(
        vocab_size=PARAMETERS["tokenizer"]["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["feed_forward"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=shape["context"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose update is made orthogonal: https://kellerjordan.github.io/posts/muon/

    torch.optim.Muon computes in bfloat16: 10 s a step, against 0.4 s here, on a CPU without bfloat16 arithmetic.
    """

    def __init__(self, matrices: list[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                velocity = self.state[matrix].setdefault("velocity", torch.zeros_like(matrix))
                velocity.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(velocity, group["momentum"]))
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrix, roughly, by five Newton-Schulz steps (coefficients: Keller Jordan's)."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def main() -> None:
    knobs = PARAMETERS["training"]
    torch.set_num_threads(knobs["threads"])
    torch.manual_seed(knobs["seed"])
    rows = conversations()
    model = build_model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    optimizers = [
        Muon(matrices, lr=knobs["muon_learning_rate"]),
        torch.optim.AdamW(others, lr=knobs["adamw_learning_rate"]),
    ]
    steps = knobs["epochs"] * -(-len(rows) // knobs["batch"])
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=o.param_groups[0]["lr"], total_steps=steps, pct_start=0.05, cycle_momentum=False
        )
        for o in optimizers
    ]
    progress = tqdm(batches(rows, knobs["batch"], knobs["epochs"], random.Random(knobs["seed"])), total=steps)
    for batch in progress:
        loss = model(
            input_ids=batch.clamp(min=0), attention_mask=(batch >= 0).long(), labels=batch.masked_fill(batch < 0, -100)
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
