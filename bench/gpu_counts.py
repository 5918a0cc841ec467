"""Count what a training step does on a GPU, without a GPU: memory, kernels, waits and copies.

    python -m bench.gpu_counts [name=value ...] [--models MODEL ...] [--lengths TOKENS ...]
                               [--rows N] [--processes N] [--layers N]

The trainer is that of stages.train_qlora, the shape of the model is the true one, and the tensors have no bytes
(bench.fake_gpu). `name=value` sets a parameter, such as train.activation_offloading=false. With align.method=orpo, the
trainer is that of stages.align, and a row is a pair with a repeated row. --processes counts one process of several with
DDP, each with --rows rows. --layers makes a model with fewer layers. Each line is one JSON object, with bytes. Some
minutes a model.
"""

from bench.fake_gpu import DEVICE, FakeGpu, fake_gpu

# isort: split
import argparse
import copy
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

from datasets import Dataset
from transformers import PreTrainedConfig, TrainerCallback

from bench.caching_allocator import Event, OutOfMemory, reserved
from bench.fake_processes import first_of
from bench.gpu_case import MODELS, TINY, of_params_yaml, trainer_of
from bench.project import ROOT, name_and_value, set_parameters
from bench.transformers_internals import fake_nf4
from pipeline.common.parameters.schema import Parameters
from pipeline.evaluation.answers import greedy
from pipeline.model.loading import pick_dtype
from pipeline.training.memory import training
from pipeline.training.preferences import PreferenceTrainer, beside_rows, sequences_of

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of its own calls
GIB = 2**30
CUDA = 0.6 * GIB  # bytes of a GPU that CUDA and its libraries take
STEPS = 2  # the first makes the states of the optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("values", nargs="*", type=name_and_value, metavar="name=value")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *TINY], default=list(MODELS), metavar="MODEL")
    parser.add_argument("--lengths", nargs="+", type=positive, default=[512, 2048, 8192], metavar="TOKENS")
    parser.add_argument("--rows", type=positive, default=1)
    parser.add_argument("--processes", type=positive, default=1)
    parser.add_argument("--layers", type=positive)
    asked = parser.parse_args()
    for model in asked.models:
        shape = copy.deepcopy((MODELS | TINY)[model])
        if asked.layers:
            shape.num_hidden_layers, shape.layer_types = asked.layers, None
            shape = type(shape).from_dict(shape.to_dict())
        for length in asked.lengths:
            case = {"model": model, "tokens": length, "rows": asked.rows, "processes": asked.processes}
            print(json.dumps(case | counts(shape, length, asked.rows, asked.processes, dict(asked.values))), flush=True)


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def counts(shape: PreTrainedConfig, length: int, rows: int, processes: int, values: dict[str, Any]) -> dict[str, Any]:
    """Return what a process with `rows` rows of `length` tokens needs in its second step, and what is estimated.

    The reserved memory is that of training, of a pass over validation rows, and of answers.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "params.yaml", folder)
        set_parameters(folder, values)
        parameters = of_params_yaml(DEVICE, rows, folder / "params.yaml")
        shared = parameters.train.model_copy(update={"processes": processes, "gradient_accumulation": processes})
        parameters = parameters.model_copy(update={"train": shared})
        sequences = sequences_of(parameters.align) if parameters.align.method != "none" else 1
        step = Step()
        with first_of(processes), fake_gpu(padded=rows * sequences > 1) as gpu:
            train(shape, length, parameters, step, gpu, folder)
            dtype = pick_dtype(parameters.base.compute_dtype, DEVICE)
        shape.save_pretrained(folder)
        estimated = training(folder, parameters.lora, parameters.train, [], length, DEVICE, dtype, sequences=sequences)
    del estimated["process"]
    return {
        **step.counted,
        "estimated": sum(estimated.values()),
        "reserved": reserved(gpu.events, expandable=False),
        "expandable": reserved(gpu.events, expandable=True),
        "fits": {gib: [fits(gpu.events, gib, expandable) for expandable in (False, True)] for gib in (8, 12, 16, 24)},
    }


def train(
    shape: PreTrainedConfig, length: int, parameters: Parameters, step: "Step", gpu: FakeGpu, folder: Path
) -> None:
    dtype = pick_dtype(parameters.base.compute_dtype, DEVICE)
    model = fake_nf4(shape, DEVICE, dtype)
    row = list(range(2, length + 2))
    ids = [row] * parameters.train.batch_size * parameters.train.gradient_accumulation * STEPS
    rows, options = Dataset.from_dict({"input_ids": ids, "labels": ids}), dict[str, Any]()
    if parameters.align.method != "none":
        others = {"other_ids": ids, "other_labels": ids, "desirable": [True] * len(ids)}
        pairs = Dataset.from_dict({"input_ids": ids, "labels": ids} | others)
        rows = beside_rows(pairs, rows, parameters.seed) if parameters.align.repeat_weight else pairs
        options = {"kind": PreferenceTrainer, "align": parameters.align}
    step.gpu = gpu
    with patch.dict(vars(sys.modules[type(model).__module__])):  # of what Liger changes for all models
        trainer = trainer_of(model, parameters, rows, length, DEVICE, folder, **options)
        trainer.args.dataloader_pin_memory = False  # fake memory cannot be pinned
        trainer.add_callback(step)
        trainer.train()
        trainer.evaluate()
        list(greedy(trainer.model, [row[:9], row[1:17]], set(), max_new_tokens=2))


class Step(TrainerCallback):
    """Keeps what is counted in the last step."""

    gpu: FakeGpu

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.gpu.begin_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        gpu = self.gpu
        self.counted = {
            "allocated": gpu.peak,
            "launched": gpu.launched.total(),
            "waits": dict(gpu.waits),
            "moved": dict(gpu.moved),
            "most": dict(gpu.launched.most_common(12)),
        }


def fits(events: list[Event], gib: int, expandable: bool) -> bool:
    """Whether a GPU of `gib` GiB is large enough."""
    try:
        reserved(events, expandable, int(gib * GIB - CUDA))
    except OutOfMemory:
        return False
    return True


if __name__ == "__main__":
    main()
