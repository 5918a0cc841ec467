"""Print the GPU memory that `pipeline.training.memory` estimates for the recipes: the table in recipes/README.md.

    python -m bench.recipes [RECIPE ...]    # all by default; a minute per recipe

Nothing is downloaded: bench/shapes.py has the shape of each model.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

from bench.gpu_qlora import flops_of_a_token
from bench.shapes import SHAPES
from pipeline.common.parameters.params_yaml import check, read_yaml
from pipeline.common.parameters.train import Train
from pipeline.training.memory import training

ROOT = Path(__file__).parent.parent
GIB = 2**30
CARDS = [8, 12, 16, 24]  # GB, as they are sold: GiB of memory
SPARE = 0.1  # of a card, for what the prediction misses and for a desktop
FLOP_PER_SECOND = 50e12  # what training is assumed to get: 30 % of the 165e12 in bfloat16 of an RTX 4090
BATCHES = [1, 2, 4, 8, 16]
LENGTHS = [1024, 2048, 4096, 8192]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(SHAPES))
    asked = parser.parse_args()
    if unknown := set(asked.recipes) - set(SHAPES):
        parser.error(f"no such recipe: {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    print(f"| recipe | GiB | tokens/s | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print(f"| --- | ---: | ---: |{' --- |' * len(CARDS)}")
    for name in asked.recipes or SHAPES:
        train = train_of(name)
        rows = train.batch_size * train.gradient_accumulation
        longest = read_yaml(ROOT / f"recipes/{name}.yaml")["tokenize"]["max_length"]
        least = train.model_copy(update={"activation_offloading": True})
        batches = {size: needed(name, of_batches(least, size, rows), longest) for size in BATCHES}
        lengths = {length: needed(name, of_batches(least, 1, rows), length) for length in LENGTHS}
        cells = []
        for card in CARDS:
            batch, length = largest(batches, card), largest(lengths, card)
            cells.append(f"{batch} × {rows // batch}, {length}" if batch else "-")
        smallest = next((card for card in CARDS if largest(batches, card) >= train.batch_size), CARDS[-1])
        with patch("pipeline.training.gradient_checkpointing.gpu_memory", return_value=smallest * GIB):
            gib = needed(name, train, longest) / GIB
        speed = round(FLOP_PER_SECOND / flops_of_a_token(SHAPES[name], longest), -2)
        print(f"| `{name}` | {gib:.1f} | {speed:,.0f} | {' | '.join(cells)} |", flush=True)


def train_of(name: str) -> Train:
    return check(ROOT / "params.yaml").train.model_copy(update=read_yaml(ROOT / f"recipes/{name}.yaml")["train"])


def of_batches(train: Train, size: int, rows: int) -> Train:
    return train.model_copy(update={"batch_size": size, "gradient_accumulation": rows // size})


def needed(name: str, train: Train, length: int) -> int:
    """Return the bytes on a GPU that training needs with rows of `length` tokens."""
    with TemporaryDirectory() as folder:
        SHAPES[name].save_pretrained(folder)
        lora = check(ROOT / "params.yaml").lora
        quantization = read_yaml(ROOT / f"recipes/{name}.yaml")["base"]["quantization"]
        gpu = torch.device("cuda")
        parts = training(Path(folder), lora, train, [], length, gpu, torch.bfloat16, quantization)
    return sum(parts.values())


def largest(sizes: dict[int, int], card: int) -> int:
    """Return the largest key whose size fits on the card; 0 if none fits."""
    return max((key for key, size in sizes.items() if size <= (1 - SPARE) * card * GIB), default=0)


if __name__ == "__main__":
    main()
