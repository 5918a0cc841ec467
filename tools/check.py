"""Check params.yaml, the user's files, the base and this machine, without running a stage.

    python -m tools.check [--deep]

Prints what is missing, with examples, what the stages will train and make, and estimates of memory and disk. If a stage
would refuse something, or memory or disk is too small, the exit status is 1 and one line says what to change. The tool
changes no file of the repository. Of a base on the hub it downloads all files but the weights. With --deep, a small
random model of the base's architecture also goes through all stages.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common.errors import UserError
from pipeline.common.outputs import read_json
from pipeline.common.parameters.align import Align
from pipeline.common.parameters.params_yaml import check
from pipeline.common.parameters.schema import Parameters
from pipeline.common.parameters.tokenize import Tokenize
from pipeline.common.parameters.train import Train
from pipeline.common.paths import LENGTHS_METRICS, PAIR_TOKENS
from pipeline.common.rows import Tools
from tools.advice import advice
from tools.dvc_command import dvc
from tools.material import Material, material

if TYPE_CHECKING:
    import torch

GIB = 2**30


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--deep", action="store_true")
    deep = parser.parse_args(arguments).deep
    parameters = check(Path("params.yaml"))  # other imports take seconds, and a typo is reported at once
    found = list(material(parameters))
    lacking = print_material(found)
    kinds = {str(each.path): set(each.kinds) for each in found}
    if parameters.tokenize.thinking == "drop":
        kinds = {path: of_path - {"thinking"} for path, of_path in kinds.items()}
    examine(parameters, kinds, [json.loads(tool) for each in found for tool in each.tools], deep)
    if lacking:
        raise UserError(f"{', '.join(lacking)}: see TO DO above, then make check again")
    print("nothing is missing: make repro")


def print_material(found: list[Material]) -> list[str]:
    """Print which of the user's files are present and what is missing. Returns the paths where something is
    missing."""
    lacking = []
    for each in found:
        say(str(each.path), f"TO DO: {each.missing}" if each.missing else each.found or "nothing")
        for example in each.examples:
            say("", f"such as {example}")
        if each.missing:
            lacking.append(str(each.path))
    return lacking


def examine(parameters: Parameters, kinds: dict[str, set[str]], tools: Tools, deep: bool) -> None:
    """Print the table. `kinds` are the kinds of the rows of each path, `tools` those of all rows.

    Raises:
        UserError: at once for what is impossible, at the end for what does not fit.
    """
    import torch

    from pipeline.export.merging import merges_onto_nf4
    from pipeline.model.base import SMALL_FILES, fetched, has_weights
    from pipeline.model.chat_template import load_tokenizer
    from pipeline.model.free_memory import free_memory
    from pipeline.model.gguf_base import say_if_quantized, unpack_if_gguf
    from pipeline.model.gpus import multiplies_bfloat16, require_compiler
    from pipeline.model.loading import pick_device, pick_dtype
    from pipeline.model.quantized_base import unpack_if_quantized
    from pipeline.model.skeleton import skeleton
    from pipeline.model.trained_template import trained_template
    from pipeline.training.liger_internals import uses_liger
    from pipeline.training.memory import beside_gpus, evaluating_gguf, saved_dtype, training
    from pipeline.training.processes import require_gpus, share_of_step
    from tools import twin
    from tools.disk import disk_needed
    from tools.dry_run import dry_run
    from tools.row_kinds import rows_of_kinds

    base, lora, train, quantize = parameters.base, parameters.lora, parameters.train, parameters.gguf.quantize
    unpack_if_gguf(base.model, parameters.threads)
    merges_onto_nf4(parameters.merge_adapter.base, base.quantization)
    folder, _ = fetched(base.model, base.revision, SMALL_FILES)
    folder = unpack_if_quantized(folder)
    say_if_quantized(base.model)
    device = pick_device(base.device)
    require_gpus(min(train.processes, torch.cuda.device_count() or 1), device)  # the others are on other machines
    share_of_step(train.batch_size, train.gradient_accumulation, train.processes)
    dtype = pick_dtype(base.compute_dtype, device)
    model = skeleton(folder, dtype)
    size, saved = model.num_parameters(), saved_dtype(folder)
    say("base", f"{base.model}: {model.config.model_type}, {size / 1e6:.1f} M parameters")
    liger = uses_liger(train.kernels, model.config, device)
    if device.type == "cuda":
        require_compiler()
        say("train.kernels", "those of Liger" if liger else "plain layers (docs/running.md)")
        if base.compute_dtype == "float32" and multiplies_bfloat16():
            say("base.compute_dtype", "WARNING: float32 is slow on a GPU and takes twice the memory: set it to auto")
    for parameter, warning in advice(parameters, size):
        say(parameter, warning)
    template = trained_template(load_tokenizer(folder), base.thinking, parameters.tokenize.tool_format)
    tokenizer = load_tokenizer(folder, template)
    require_usable_template(folder, tokenizer)
    for name, found in rows_of_kinds(tokenizer, kinds, tools):
        say(name, found)
    tokens = special_tokens(folder, tokenizer, parameters)
    for name, found in dry_run(folder, base, lora, tokens):
        say(name, found)
    for name, found in twin.through_all_stages(folder, parameters) if deep else ():
        say(name, found)
    length = longest_row(parameters.tokenize)

    def needed(train: Train, length: int, sequences: int) -> dict[str, int]:
        return training(folder, lora, train, tokens, length, device, dtype, base.quantization, sequences)

    trainings = {"train_qlora": (train, length, 1)}
    if parameters.align.method != "none":
        trainings["align"] = of_align(parameters, length)
    say("files", f"adapter, merged model, GGUF as {', '.join(['f16', *quantize])}")

    memory = "GPU memory" if device.type == "cuda" else "memory"
    refusals = []
    try:
        estimates = {stage: needed(*values) for stage, values in trainings.items()}
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        # Code that needs the values of tensors, such as that of experts (MoE), fails without weights.
        say(f"{memory}: train_qlora", f"no estimate: {model.config.model_type} takes no step without weights ({error})")
        parts = {"adapter": 0, "optimizer": 0}
    else:
        parts = estimates["train_qlora"]
        trained = parts["adapter"] // getattr(torch, train.adapter_dtype).itemsize
        say("adapter", f"{trained:,} parameters, r {lora.r}")
        if train.processes > 1:
            say("processes", f"{train.processes}, {train.strategy}; the estimates are for one of them")
        room = free_memory(device) // (train.processes if device.type == "cpu" else 1)  # each GPU has one process
        for stage, (values, longest, sequences) in trainings.items():
            if not fits(f"{memory}: {stage}", estimates[stage], room):
                change = remedy(values, device, partial(needed, length=longest, sequences=sequences), room, stage)
                refusals.append(f"{stage} {short(estimates[stage], room, memory)}: {change}")
    for stage, (values, longest, sequences) in trainings.items():
        if beside := beside_gpus(model, values, longest, device, base.quantization, sequences):
            needs = {stage: beside}
            if not fits(f"memory: {stage}", needs, room := free_memory(torch.device("cpu"))):
                on_gpu = values.model_copy(update={"activation_offloading": False})
                offloads = beside_gpus(model, on_gpu, longest, device, base.quantization, sequences) < beside
                first = "set train.activation_offloading to false, or " if offloads else ""
                refusals.append(
                    f"{stage} {short(needs, room, 'memory')}: {first}spread train.processes over more machines"
                )
    needs = {"evaluate_gguf": evaluating_gguf(model, device, dtype)}
    if not fits("memory: evaluate_gguf", needs, room := free_memory(torch.device("cpu"))):
        refusals.append(f"evaluate_gguf {short(needs, room, 'memory')}: choose a smaller base.model")
    copies = 1 if {"hardlink", "symlink"} & cache_types() else 2
    files = disk_needed(
        size, saved.itemsize, parts["adapter"], parts["optimizer"], quantize, copies, "align" in trainings
    )
    if not fits("disk", files, room := shutil.disk_usage(".").free):
        refusals.append(f"a run {short(files, room, 'disk')}: free some, or remove files from gguf.quantize")
    if not has_weights(folder):
        download = {"weights": size * saved.itemsize}
        if not fits("disk: download", download, room := shutil.disk_usage(folder).free):
            refusals.append(f"the download {short(download, room, 'disk')}: free some, or set HF_HOME")
    if refusals:
        raise UserError("; ".join(refusals))


def say(name: str, text: str) -> None:
    print(f"{name:23} {text}", flush=True)


def fits(name: str, parts: dict[str, int], room: int) -> bool:
    """Print how much of `room` bytes the parts need, in GiB. Returns whether they fit."""
    needed = sum(parts.values())
    of = ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items()) if len(parts) > 1 else ""
    verdict = "fits" if needed <= room else "DOES NOT FIT"
    say(name, f"{needed / GIB:6.1f} of {room / GIB:6.1f} GiB  {verdict:14}{of}".rstrip())
    return needed <= room


def short(parts: dict[str, int], room: int, of: str) -> str:
    return f"needs {sum(parts.values()) / GIB:.1f} GiB of {of}, and {room / GIB:.1f} are free"


def require_usable_template(folder: Path, tokenizer: Any) -> None:
    """Raises UserError if no answer can be trained on with the base's chat template."""
    from pipeline.common.rows import question_and_answer
    from pipeline.model.chat_template import end_tokens, load_generation_config
    from pipeline.model.supervision import supervised

    ends = end_tokens(load_generation_config(folder))
    supervised(tokenizer, question_and_answer("Who wrote it?", "Ada Lovelace"), ends, "base.model")


def special_tokens(folder: Path, tokenizer: Any, parameters: Parameters) -> list[int]:
    """The ids of the tokens that will be trained. The base's weights show which tokens the base was never trained
    on."""
    from pipeline.model.base import has_weights
    from pipeline.model.special_tokens import trainable_tokens

    wanted = parameters.lora.trainable_tokens
    if wanted == "auto" and not has_weights(folder):
        say("special tokens", "known after dvc repro prepare_base, which downloads the weights")
        return []
    tokens = trainable_tokens(wanted, folder, tokenizer)
    names = ", ".join(tokenizer.convert_ids_to_tokens(tokens))
    say("special tokens", f"trained: {names}" if tokens else "none trained: the base was trained on all of them")
    return tokens


def longest_row(tokenize: Tokenize) -> int:
    """Tokens of the longest row; tokenize.max_length if the data or the base changed since the tokenize stage ran.

    Raises:
        UserError: a row is longer than tokenize.max_length, and the tokenize stage would refuse it.
    """
    if changed("tokenize") or not LENGTHS_METRICS.exists():
        say(
            "longest row",
            f"up to {tokenize.max_length} tokens (tokenize.max_length): dvc repro tokenize counts the rows",
        )
        return tokenize.max_length
    lengths = read_json(LENGTHS_METRICS)
    longest = lengths["tokens"]["max"]
    if longest > tokenize.max_length and tokenize.on_overflow == "raise":
        raise UserError(
            f"the longest row has {longest} tokens, tokenize.max_length is {tokenize.max_length}: raise "
            "tokenize.max_length, or set tokenize.on_overflow to drop or truncate"
        )
    if lengths.get("corpus", {}).get("tokens"):
        say("longest row", f"{tokenize.max_length} tokens: raw text fills its rows (tokenize.max_length)")
        return tokenize.max_length
    say("longest row", f"{longest} tokens, of at most {tokenize.max_length}")
    return min(longest, tokenize.max_length)


def of_align(parameters: Parameters, longest: int) -> tuple[Train, int, int]:
    """The values of `train` with which align trains, the tokens of its longest sequence, and the sequences of a row.
    `longest`: tokens of the longest row of train_qlora.

    Raises:
        UserError: the processes cannot share a step.
    """
    from datasets import Dataset

    from pipeline.training.alignment import training_of
    from pipeline.training.preferences import OTHER, OWN, sequences_of
    from pipeline.training.processes import share_of_step
    from pipeline.training.trainer import lengths

    align, train = parameters.align, training_of(parameters)
    share_of_step(train.batch_size, train.gradient_accumulation, train.processes, of="align")
    if not PAIR_TOKENS.exists() or changed("tokenize_pairs"):
        length = parameters.tokenize.max_length
        say("longest pair", f"up to {length} tokens (tokenize.max_length): dvc repro tokenize_pairs counts the pairs")
    else:
        pairs = [Dataset.from_file(str(PAIR_TOKENS / f"{side}.arrow")) for side in ("train", "valid")]
        length = max(int(lengths(of_side, ids).max()) for of_side in pairs for ids, _ in (OWN, OTHER))
        say("longest pair", f"{length} tokens, of at most {parameters.tokenize.max_length}")
    return train, max(length, longest) if align.repeat_weight else length, sequences_of(align)


def cache_types() -> set[str]:
    """How DVC may put files from its cache into the working directory."""
    try:
        return set(dvc("config", "cache.type").strip().split(","))
    except UserError:  # DVC's defaults
        return {"reflink", "copy"}


def changed(tokenizing: str) -> bool:
    """Whether the rows may have other lengths than when the stage `tokenizing` ran. Outputs that were never made do not
    count."""
    try:
        status = json.loads(dvc("status", "--json", "--with-deps", tokenizing))
    except UserError as error:
        if "Unable to acquire lock" in str(error):  # a running dvc repro may change the rows
            return True
        if "not a git repository" in str(error) or "not inside of a DVC repository" in str(error):
            raise UserError(
                f"{error}: DVC needs the git repository: git clone, or git init and a first commit"
            ) from None
        raise
    for stage, changes in status.items():
        for change in changes:
            for paths in change.values() if isinstance(change, dict) else []:
                for path, state in paths.items():
                    cut = stage == "tokenize" and path == "params.yaml"  # lengths are counted before truncation
                    if (
                        state not in ("deleted", "not in cache")
                        and not cut
                        and not path.endswith((".py", "libraries.yaml"))
                    ):
                        return True
    return False


def remedy(train: Train, device: "torch.device", needed: Any, room: int, stage: str) -> str:
    """The first of the `savings` with which the stage fits in `room` bytes."""
    own = Align.model_fields if stage == "align" else ()
    for change in savings(train, device):
        if sum(needed(train.model_copy(update=change)).values()) <= room:
            return "set " + ", ".join(
                f"{'align' if key in own else 'train'}.{key} to {str(value).lower()}" for key, value in change.items()
            )
    share_ram = "train.processes, " if device.type == "cpu" and train.processes > 1 else ""
    return (
        f"lower {share_ram}lora.r, or tokenize.max_length after dvc repro tokenize has counted the rows, or choose a "
        "smaller base"
    )


def savings(train: Train, device: "torch.device") -> Iterator[dict[str, object]]:
    """Changes of train.* that save memory, each with all before. Every change keeps the rows of a step, and steps that
    the processes can share."""
    from pipeline.model.loading import pick_optimizer
    from pipeline.training.gradient_checkpointing import pick_checkpointing

    change: dict[str, object] = {}
    if not pick_checkpointing(train.gradient_checkpointing, device):
        yield (change := change | {"gradient_checkpointing": True})
    batch_size, rows = train.batch_size, train.batch_size * train.gradient_accumulation
    while batch_size > 1:
        batch_size //= 2
        batches = -(-rows // batch_size)
        if batch_size * batches % train.processes == 0:
            yield (change := change | {"batch_size": batch_size, "gradient_accumulation": batches})
    if pick_optimizer(train.optimizer, device) != "paged_adamw_8bit":
        yield (change := change | {"optimizer": "paged_adamw_8bit"})
    if device.type == "cuda" and train.activation_offloading is not True:
        yield (change := change | {"activation_offloading": True})
    if train.processes > 1 and train.strategy == "ddp":
        yield change | {"strategy": "fsdp"}


if __name__ == "__main__":
    main(*sys.argv[1:])
