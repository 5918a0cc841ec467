"""Run one case of `bench.gpu_qlora` in its own process, and print the measurements as one line of JSON.

python -m bench.gpu_case RECIPE MODEL --length TOKENS [--steps N] [--cap GIB] [--saved FOLDER]
python -m bench.gpu_case save MODEL --saved FOLDER      # the random model, for a recipe that loads a folder
"""

import sys

if sys.argv[1:2] == ["Unsloth"]:
    import unsloth  # first of all: it patches what is imported after it

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from bench.transformers_internals import random_nf4
from pipeline.common.parameters.params_yaml import check
from pipeline.common.parameters.schema import Parameters
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.base import copy_tokenizer
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import pick_device, pick_dtype, reproducible
from pipeline.training.liger_internals import use_liger, uses_liger
from pipeline.training.runs import place
from pipeline.training.trainer import Trainer, build_trainer, training_arguments

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "models/tiny-base"
OUT_OF_MEMORY = "out of memory"
WARM = 3  # steps before the clock starts: kernels are compiled and memory is reserved in them
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(
    kind: type[PreTrainedConfig],
    vocabulary: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    **more: Any,
) -> PreTrainedConfig:
    return kind(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=131_072,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        **more,
    )


# The shapes in the config.json of each on the hub.
MODELS = {
    "Llama 3.1 8B": config(LlamaConfig, 128_256, 4096, 14_336, 32, 32, 8, tie_word_embeddings=False),
    "Qwen2.5 7B": config(Qwen2Config, 152_064, 3584, 18_944, 28, 28, 4, tie_word_embeddings=False),
    "Qwen2.5 0.5B": config(Qwen2Config, 151_936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "Gemma 2 9B": config(Gemma2Config, 256_000, 3584, 14_336, 42, 16, 8, head_dim=256, query_pre_attn_scalar=256),
}
TINY = {
    "Llama": config(LlamaConfig, 2048, 64, 128, 2, 4, 2, tie_word_embeddings=False),
    "Qwen": config(Qwen2Config, 2048, 64, 128, 2, 4, 2, tie_word_embeddings=True),
    "Gemma": config(Gemma2Config, 2048, 64, 128, 2, 4, 2, head_dim=16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=[*RECIPES, "save"])
    parser.add_argument("model", choices=[*MODELS, *TINY])
    parser.add_argument("--length", type=int, metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=WARM + 5)
    parser.add_argument("--cap", type=float, metavar="GIB")
    parser.add_argument("--saved", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    device = pick_device("cpu" if asked.model in TINY else "cuda")
    if asked.recipe == "save":
        save(asked.saved, (MODELS | TINY)[asked.model], device)
        print("{}")
        return
    if asked.cap:
        cap_memory(asked.cap)
    try:
        print(json.dumps(measured(asked, device)))
    except RuntimeError as error:  # torch's OutOfMemoryError, or that of a library beside it
        if not any(sign in str(error).lower() for sign in ("out of memory", "alloc_failed")):
            raise
        print(json.dumps({"failed": OUT_OF_MEMORY}))


def measured(asked: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the measurements of one training.

    - Tokens per second, after the first steps.
    - Peak bytes that torch allocated and reserved. `outside`: all other bytes of the process on the card (CUDA context,
      libraries, pages of a paged optimizer).
    - The name of the card, and its measured peak in floating point operations per second.
    """
    with tempfile.TemporaryDirectory() as folder:
        cost = trained(RECIPES[asked.recipe](asked, device, Path(folder)), device)
    return cost | {
        "tokens_per_second": asked.length * cost["steps_per_second"],
        "card": torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
        "peak": matmul_peak(device) if not asked.cap else 0,
    }


def trained(trainer: SFTTrainer, device: torch.device) -> dict[str, Any]:
    """Train, and return the mean loss, the speed, and the bytes that `measured` explains; on a CPU, 0 bytes."""
    on_gpu = device.type == "cuda"
    clock = Clock(device)
    trainer.add_callback(clock)
    loss = trainer.train().training_loss
    free, total = torch.cuda.mem_get_info() if on_gpu else (0, 0)
    return {
        "loss": loss,
        "steps_per_second": clock.steps_per_second(),
        "allocated": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "outside": total - free - torch.cuda.memory_reserved() if on_gpu else 0,
    }


def this_pipeline(asked: argparse.Namespace, device: torch.device, folder: Path) -> SFTTrainer:
    """Return a trainer like that of stages.train_qlora, with one row per step and a learning rate for large models."""
    parameters = of_params_yaml(device)
    reproducible(parameters.seed, parameters.threads)
    model = random_nf4((MODELS | TINY)[asked.model], device, pick_dtype(parameters.base.compute_dtype, device))
    return trainer_of(model, parameters, rows(asked), asked.length, device, folder)


def trainer_of(
    model: PreTrainedModel,
    parameters: Parameters,
    rows: Dataset,
    length: int,
    device: torch.device,
    folder: Path,
    kind: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    if uses_liger(parameters.train.kernels, model.config, device):
        use_liger(model)
    tuned = with_adapter(model, lora_config(parameters.lora, []))
    place(tuned, parameters.train, device)
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    train, seed = parameters.train, parameters.seed
    arguments = training_arguments(train, seed, device, dtype, folder, tuned.config, length)
    trainer = build_trainer(kind, arguments, train, tuned, load_tokenizer(TOKENIZER), rows, rows, **options)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    return trainer


def of_params_yaml(device: torch.device, rows: int = 1, path: Path = ROOT / "params.yaml") -> Parameters:
    """The parameters of a file, with `rows` rows a step in one process, and a learning rate for large models.

    Checkpoints are offloaded, unless the file says false: "auto" would depend on the GPU.
    """
    parameters = check(path)
    offloading = {"activation_offloading": parameters.train.activation_offloading is not False}
    steps = {"batch_size": rows, "gradient_accumulation": 1, "epochs": 1.0, "learning_rate": 2.0e-4}
    alone = {"processes": 1, "early_stopping_patience": None, "load_best_model_at_end": False}
    return parameters.model_copy(
        update={
            "base": parameters.base.model_copy(update={"device": device.type, "compute_dtype": "auto"}),
            "train": parameters.train.model_copy(update=steps | alone | offloading),
        }
    )


def trl_defaults(asked: argparse.Namespace, device: torch.device, folder: Path) -> SFTTrainer:
    """Return a trainer with the same model and LoRA, and SFTTrainer's defaults except the batch and the full length."""
    lora = check(ROOT / "params.yaml").lora
    return SFTTrainer(
        model=random_nf4((MODELS | TINY)[asked.model], device, pick_dtype("auto", device)),
        args=SFTConfig(**common(folder), max_length=None, bf16=device.type == "cuda", use_cpu=device.type == "cpu"),
        train_dataset=rows(asked),
        processing_class=load_tokenizer(TOKENIZER),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, target_modules="all-linear"),
    )


def unsloth_recipe(asked: argparse.Namespace, device: torch.device, folder: Path) -> SFTTrainer:
    """Return a trainer as Unsloth documents it (https://docs.unsloth.ai), from the folder that the case `save` made."""
    lora = check(ROOT / "params.yaml").lora
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(asked.saved), max_seq_length=asked.length, load_in_4bit=True
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0,
        bias="none",
        target_modules=PROJECTIONS,
        use_gradient_checkpointing="unsloth",
    )
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            **common(folder),
            max_length=asked.length,
            optim="adamw_8bit",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=rows(asked),
        processing_class=tokenizer,
    )


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


RECIPES = {"this pipeline": this_pipeline, "TRL's defaults": trl_defaults, "Unsloth": unsloth_recipe}


def rows(asked: argparse.Namespace) -> Dataset:
    """Return rows of random tokens, one row per step; all tokens are supervised."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = (MODELS | TINY)[asked.model].vocab_size
    ids = torch.randint(vocabulary, (asked.steps, asked.length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


class Clock(TrainerCallback):
    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, list[float]()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of what only building the model took
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())

    def steps_per_second(self) -> float:
        timed = self.ends[WARM - 1 :] if len(self.ends) > WARM else self.ends
        return (len(timed) - 1) / (timed[-1] - timed[0])


def save(folder: Path, shape: PreTrainedConfig, device: torch.device) -> None:
    random_nf4(shape, device, pick_dtype("auto", device)).save_pretrained(folder)
    copy_tokenizer(TOKENIZER, folder)


def cap_memory(gib: float) -> None:
    """Limit torch to the memory that a card of `gib` GiB has without the CUDA context.

    The context is the memory in use on an idle card after one matrix product, minus the memory that torch reserved. The
    cap does not include what libraries load later, nor a paged optimizer's states. CUDA moves these to RAM when the
    card is full. `outside` counts both.
    """
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    torch.mm(ones, ones)
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * 2**30 - context) / total))


def matmul_peak(device: torch.device) -> float:
    """Return the floating point operations per second of a large bf16 matrix product, the fastest of ten."""
    size = 8192 if device.type == "cuda" else 256
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = []
    for _ in range(12):
        started = time.monotonic()
        for _ in range(10):
            torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.monotonic() - started) / 10)
    return 2 * size**3 / min(seconds[2:])


if __name__ == "__main__":
    main()
