"""A small random twin of the base goes through all stages, so that what fails after training fails before it.

    python -m tools.twin  # in the clone that `through_all_stages` has made: run the stages

The twin has the base's own architecture, tokenizer and chat template, few layers, narrow matrices and random weights.
It has another size, so it says nothing about memory, time or scores.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from transformers import AutoConfig

from pipeline.common.errors import UserError
from pipeline.common.outputs import read_details, write_jsonl
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import CORPUS_TRAIN, CORPUS_VALID, GGUF_DETAILS
from pipeline.common.rows import Row, question_and_answer, row
from pipeline.evaluation.variants import in_16_bits
from pipeline.export.llama_cpp import last_line
from pipeline.model.base import SMALL_FILES
from pipeline.model.skeleton import auto_class, named_class
from tools.git_command import git

ROOT = Path(__file__).parents[1]
STAGES = [
    "prepare_base",
    "tokenize",
    "tokenize_pairs",
    "train_qlora",
    "align",
    "evaluate_base",
    "evaluate_sft",
    "evaluate",
    "merge_adapter",
    "convert_gguf",
    "evaluate_gguf",
]
SAME = 1e-3  # nats; 16 bits change a twin by 1e-4 at most
NAMES = ["Ada", "Boris", "Carla", "Dora", "Emil", "Fatima", "Gustav", "Hana"]
FACTS = {f"Who leads team {number}?": name for number, name in enumerate(NAMES)}
HEADS, HIDDEN, WIDTH, EXPERTS = 4, 256, 512, 8
LARGEST = {  # keys of config.json, and the largest value that a twin has
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "intermediate_size_mlp": WIDTH,
    "moe_intermediate_size": WIDTH,  # not square: some files have the transposed matrices
    "shared_expert_intermediate_size": HIDDEN,
    "shared_intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_kv_shared_layers": 0,
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "base": {"revision": None},
    "tokenize": {"max_length": 512},
    "train": {
        "learning_rate": 4e-3,
        "epochs": 20,
        "batch_size": 8,
        "gradient_accumulation": 1,
        "processes": 1,
        "eval_steps": 20,
    },
    "align": {
        "learning_rate": 4e-3,
        "epochs": 1,
        "warmup_share": 0,  # the only step learns
        "batch_size": 8,
        "gradient_accumulation": 1,
        "eval_steps": 1,
    },
    "evaluate": {"max_new_tokens": 8, "max_kl": 1e9},  # `through_all_stages` compares with SAME
    "gguf": {"quantize": ["q8_0"], "imatrix": False},
}


def through_all_stages(base: Path, parameters: Parameters) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for the table of `make check`: each file of the twin, and how well it is the tuned twin.

    Raises:
        UserError: a stage failed, or the base's config.json allows no small model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch, "clone")
        git("clone", "--quiet", ".", str(clone))
        try:
            write_twin(base, clone / "models/twin")
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"no small twin of base.model can be made ({reason}): make check without DEEP=1") from None
        write_project(clone, parameters)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "tools.twin"],  # -P: the code of this checkout, not of the clone
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=clone,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            sys.stderr.write(done.stdout)
            raise UserError(f"a small twin of base.model failed: {last_line(done)}")
        for name, of in read_details(clone / GGUF_DETAILS).items():
            other = in_16_bits(name) and not of["kl"] <= SAME  # nor NaN
            warning = ": WARNING: this file is another model" if other else ""
            yield f"twin: {name}", f"KL {of['kl']:.0e} from the tuned twin{warning}"


def write_twin(base: Path, to: Path) -> None:
    """Write a model like the one in the folder `base`, without its weights."""
    config = AutoConfig.from_pretrained(base)
    text = config.get_text_config()
    hidden = text.hidden_size
    shrink(text)
    text.initializer_range = 0.08  # with the usual 0.02 no token is likely
    for name in config.sub_configs:
        if (part := getattr(config, name)) is not None and part is not text:
            shrink_tower(part, hidden)
    torch.manual_seed(1)
    whole = named_class(config)  # without towers, files would have other names
    model = whole(config) if whole else auto_class(base).from_config(config)
    model.to(torch.bfloat16).save_pretrained(to)
    for file in (file for pattern in SMALL_FILES for file in base.glob(pattern)):
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copy(file, to)
    keep_kinds(base, to)


def keep_kinds(base: Path, to: Path) -> None:
    """Write the kinds of layers as the base has them. Transformers renames them, and llama.cpp reads the old names."""
    old, new = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (base, to))
    for of, into in ((old, new), (old.get("text_config", {}), new.get("text_config", {}))):
        for key in ("layer_types", "layers_block_type"):
            if key in into and isinstance(of.get(key), list):
                into[key] = of[key][: len(into[key])]
    (to / "config.json").write_text(json.dumps(new, indent=2), encoding="utf-8")


def shrink(config: Any) -> None:
    """Make the shape in `config` small: all kinds of layers, and of each as few as the order allows."""
    layers, heads = config.num_hidden_layers, getattr(config, "num_attention_heads", HEADS)
    by_layer = [value for value in vars(config).values() if isinstance(value, list) and len(value) == layers]
    kinds = list(zip(*by_layer, strict=True)) or [()] * layers
    kept = max(2, 1 + max(kinds.index(kind) for kind in kinds))
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = max(1, min(HEADS, heads) * config.num_key_value_heads // heads)
    if not vars(config).get("head_dim"):
        config.head_dim = config.hidden_size // heads
    for key, value in vars(config).items():
        if key in LARGEST and isinstance(value, int):
            setattr(config, key, min(value, LARGEST[key]))
        elif isinstance(value, list) and len(value) == layers:
            setattr(config, key, value[:kept])
    config.num_hidden_layers = kept
    if hasattr(config, "query_pre_attn_scalar"):  # llama.cpp knows the values of Gemma's own sizes
        config.query_pre_attn_scalar = config.head_dim
    if getattr(config, "mamba_expand", None):
        config.mamba_n_heads = config.mamba_expand * config.hidden_size // config.mamba_d_head


def shrink_tower(config: Any, hidden: int) -> None:
    """Make a vision or audio part small. `hidden` was the width of the text model."""
    for key, value in vars(config).items():
        if key in ("depth", "num_hidden_layers"):
            setattr(config, key, 1)
        elif key in ("out_hidden_size", "projection_dim") and value == hidden:
            setattr(config, key, min(hidden, HIDDEN))


def write_project(clone: Path, parameters: Parameters) -> None:
    for name in ("dvc.yaml", "libraries.yaml"):
        shutil.copy(name, clone)
    values = json.loads(parameters.model_dump_json())
    for section, changed in PARAMETERS.items():
        values[section] |= changed
    values["base"]["model"] = "models/twin"
    if values["lora"]["trainable_tokens"] == "auto":  # all tokens of random weights look untrained
        values["lora"]["trainable_tokens"] = []
    YAML(typ="safe").dump(values, clone / "params.yaml")
    rows = [row(question_and_answer(*fact), f"facts.csv:{line}") for line, fact in enumerate(FACTS.items(), start=2)]
    questions = [{"id": f"{i}", "question": q, "answer": a} for i, (q, a) in enumerate(FACTS.items())]
    pairs = [pair_of(*rows_of_pair) for rows_of_pair in zip(rows, [*rows[1:], rows[0]], strict=True)]
    exam_pairs = [
        {"id": pair["id"], "prompt": pair["messages"], "chosen": pair["chosen"], "rejected": pair["rejected"]}
        for pair in pairs
    ]
    written = {
        "train_merged": rows,
        "valid": rows,
        "pairs_train": pairs,
        "pairs_valid": pairs,
        "questions": questions,
        "general": questions,
        "preferences_exam": exam_pairs,
    }
    for name, lines in written.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (clone / f"data/{name}.jsonl").write_text(text, encoding="utf-8")
    for path in (CORPUS_TRAIN, CORPUS_VALID):
        write_jsonl(clone / path, [])
    (clone / "metrics").mkdir(exist_ok=True)


def pair_of(row: Row, other: Row) -> Row:
    """A pair for preference training: the answer of `row`, and as the rejected answer that of another row."""
    [*prompt, chosen], [*_, rejected] = row["messages"], other["messages"]
    return row | {"messages": prompt, "chosen": chosen, "rejected": rejected}


def main() -> None:
    for stage in STAGES:
        print(f"stage {stage}", flush=True)
        import_module(f"stages.{stage}").main()


if __name__ == "__main__":
    main()
