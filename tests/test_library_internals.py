"""Each use of a library beyond its documentation, named by the library and what the library has to do.

A test that fails after an upgrade calls the function that has to change, or that is not needed any more.
"""

import ast
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import architectures
import bitsandbytes as bnb
import gguf  # noqa: F401  # PyPI's, before llama.cpp/quantize.py imports the converter's
import numpy as np
import pytest
import torch
import xllamacpp
from accelerate import Accelerator
from bitsandbytes.backends.cpu import ops as bnb_cpu
from conftest import ROOT, Project
from cyllama._internal import build_config as cyllama_build
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams
from datasets import Dataset
from dvc.cli.parser import get_main_parser
from dvc.repo import Repo
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainerState
from transformers.integrations import bitsandbytes as transformers_bnb
from transformers.quantizers import AutoHfQuantizer
from trl import SFTConfig, SFTTrainer

from bench.gpu_case import TINY
from bench.transformers_internals import random_nf4
from bench.trl_internals import log_probs
from pipeline.common.dvc_outputs import output_hash, put_back_outputs
from pipeline.common.errors import UserError
from pipeline.common.printing import calm_libraries
from pipeline.model.bitsandbytes_internals import dequantized, never_repack, quantize_on_meta, scales_of, scales_to
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.experts import names_of_experts
from pipeline.model.loading import load_quantized, nf4
from pipeline.model.peft_internals import (
    adapter_weights,
    give_head_a_bias,
    load_adapters_as_saved,
    targets_parameters,
)
from pipeline.model.skeleton import auto_class, skeleton
from pipeline.model.transformers_internals import (
    attention_of,
    ended,
    experts_on_meta,
    first_layers,
    forget_quantization,
    layers_of,
    loaded_into,
    names_in_4_bits,
    names_in_files,
    use_own_quantizer,
)
from pipeline.training import accelerate_internals, trl_internals
from pipeline.training.torch_internals import Alive, copy_all, fused_on_meta
from tools import dvc_internals

BASE = ROOT / "models/tiny-base"
CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16
ROWS = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4, "labels": [[-100, -100, 7, 8]] * 4})
Build = Callable[..., SFTTrainer]


def adapted(**options: object) -> PeftModel:
    """A tiny Llama in NF4 with a LoRA on it."""
    base = random_nf4(TINY["Llama"], CPU, torch.float32)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options))


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def trainer(model: PeftModel, **options: object) -> SFTTrainer:
        arguments = SFTConfig(str(tmp_path), use_cpu=True, report_to="none", max_length=None, **options)
        kind = trl_internals.TokenCountingTrainer
        return kind(model, arguments, train_dataset=ROWS, eval_dataset=ROWS, processing_class=load_tokenizer(BASE))

    return trainer


# bitsandbytes


def test_bitsandbytes_repacks_weights_on_a_cpu_by_a_switch_of_each_layer() -> None:
    layer = bnb.nn.Linear4bit(64, 64)
    layer.support_avx512bf16_for_cpu = True
    never_repack(torch.nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False
    assert "support_avx512bf16_for_cpu" in bnb.nn.Linear4bit.forward.__code__.co_names


def test_bitsandbytes_warns_of_a_missing_kernel_in_the_words_that_are_left_out() -> None:
    calm_libraries()
    [words] = re.findall(r'"(Failed to load CPU gemm_4bit_forward.*)"', inspect.getsource(bnb_cpu))
    record = bnb_cpu.logger.makeRecord(bnb_cpu.logger.name, 30, "", 0, words, ("why",), None)
    assert not bnb_cpu.logger.filter(record)


def test_transformers_warns_of_dequantized_weights_in_the_words_that_are_left_out() -> None:
    calm_libraries()
    words = re.findall(r'"(The modules are dequantized in .*?)"', inspect.getsource(transformers_bnb))
    assert len(words) == 2
    for each in words:
        record = transformers_bnb.logger.makeRecord(transformers_bnb.logger.name, 30, "", 0, each, (), None)
        assert not transformers_bnb.logger.filter(record)


# PEFT


def test_peft_finds_experts_in_one_tensor_before_it_builds_an_adapter() -> None:
    shape = Qwen3MoeConfig(hidden_size=32, num_hidden_layers=1, num_experts=4, vocab_size=64)
    with torch.device("meta"):
        experts, dense = (AutoModelForCausalLM.from_config(config) for config in (shape, TINY["Llama"]))
    assert not targets_parameters(LoraConfig(target_modules=["q_proj"]), experts)
    for names in ("all-linear", ["gate_proj", "up_proj"], ["gate_proj"]):
        assert targets_parameters(LoraConfig(target_modules=names), experts)
        assert not targets_parameters(LoraConfig(target_modules=names), dense)


def test_peft_wraps_a_head_with_trained_tokens_without_its_bias() -> None:
    model = adapted(trainable_token_indices={"lm_head": [3]})
    assert not hasattr(model.get_output_embeddings(), "bias"), "give_head_a_bias is not needed any more"
    give_head_a_bias(model)
    assert model.get_output_embeddings().bias is None


def test_peft_loads_an_adapter_in_float32_by_default(tmp_path: Path) -> None:
    model = adapted()
    for weight in adapter_weights(model).values():
        weight.data = weight.data.to(BFLOAT16)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    load_adapters_as_saved(model)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert {weight.dtype for weight in adapter_weights(model).values()} == {BFLOAT16}
    del model.load_adapter
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert {weight.dtype for weight in adapter_weights(model).values()} == {torch.float32}


def test_peft_names_the_magnitudes_of_dora() -> None:
    with_dora, without = adapted(use_dora=True), adapted()
    assert adapter_weights(with_dora).keys() == adapter_weights(without).keys()
    assert sum(weight.requires_grad for weight in with_dora.parameters()) > len(adapter_weights(with_dora))


# Transformers


def test_transformers_loads_an_adapter_of_a_checkpoint_without_its_type() -> None:
    source = inspect.getsource(Trainer._load_from_checkpoint) + inspect.getsource(Trainer._load_best_model)
    assert "model.load_adapter(" in source and "autocast_adapter_dtype" not in source


def test_transformers_counts_tokens_by_the_attention_mask(build: Build) -> None:
    trainer = build(adapted(), include_num_input_tokens_seen="non_padding")
    ids = torch.tensor([[5, 6, 7], [0, 0, 0]])  # the second is a blank row
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    trainer._track_num_input_tokens(
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids == 0, -100)}
    )
    assert trainer.state.num_input_tokens_seen == 3
    assert "self._track_num_input_tokens(inputs)" in inspect.getsource(Trainer)


def test_transformers_saves_a_model_from_a_gguf_file_as_one_that_is_not_quantized(
    base_gguf: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_gguf.parent, gguf_file=base_gguf.name, dtype=torch.float32)
    forget_quantization(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not hasattr(again.config, "quantization_config")
    assert all(weight.equal(model.state_dict()[name]) for name, weight in again.state_dict().items())


def test_transformers_notes_in_a_checkpoint_that_training_ended_with_it(build: Build, tmp_path: Path) -> None:
    build(adapted(), max_steps=2, save_steps=1, per_device_train_batch_size=2, disable_tqdm=True).train()
    states = [TrainerState.load_from_json(tmp_path / f"checkpoint-{step}/trainer_state.json") for step in (1, 2)]
    assert [ended(state) for state in states] == [False, True]


def test_transformers_names_the_blocks_of_a_model() -> None:
    for model in (adapted(), adapted().get_base_model()):
        assert [type(layer).__name__ for layer in layers_of(model)] == ["LlamaDecoderLayer"] * 2


@pytest.mark.parametrize("name", TINY)
def test_transformers_reads_in_each_pass_how_many_layers_to_compute(name: str) -> None:
    model = AutoModelForCausalLM.from_config(deepcopy(TINY[name]))
    calls = Counter[int]()
    for number, layer in enumerate(layers_of(model)):
        layer.register_forward_hook(lambda *_, number=number: calls.update([number]))
    with first_layers(model, 1):
        model(torch.tensor([[5, 6]]))
    model(torch.tensor([[5, 6]]))
    assert calls == Counter({0: 2} | {number: 1 for number in range(1, len(layers_of(model)))})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_keeps_the_attention_of_a_model(attention: str) -> None:
    assert (
        attention_of(AutoModelForCausalLM.from_config(deepcopy(TINY["Llama"]), attn_implementation=attention))
        == attention
    )


def test_transformers_names_the_layers_that_it_loads_in_4_bits() -> None:
    loaded = load_quantized(BASE, CPU, torch.float32)
    assert names_in_4_bits(skeleton(BASE)) == {
        name for name, module in loaded.named_modules() if isinstance(module, bnb.nn.Linear4bit)
    }


def test_transformers_quantizes_experts_with_the_layers(tmp_path: Path) -> None:
    architectures.make("qwen3_moe", tmp_path)
    model, names = load_quantized(tmp_path, CPU, torch.float32), names_of_experts(skeleton(tmp_path))
    assert len(names) == 4 and all(is_parametrized(model.get_submodule(name.rpartition(".")[0])) for name in names)
    stored = load_file(tmp_path / "model.safetensors")
    assert {parameter for parameter, changed in loaded_into(skeleton(tmp_path), stored).values() if changed} == names


def test_transformers_quantizes_several_layers_of_one_tensor() -> None:
    """As where a tensor of the files has the weights of several layers."""
    use_own_quantizer()
    quantizer = AutoHfQuantizer.from_config(nf4(torch.float32), pre_quantized=False)
    quantizer.preprocess_model(model := skeleton(BASE, torch.float32), device_map=None)
    layers = [f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj")]
    weights = {name: torch.ones(64, 64) for name in layers}
    made = quantizer.get_quantize_ops().convert(weights, model=model)
    assert made.keys() == weights.keys() and {weight.dtype for weight in made.values()} == {torch.uint8}


def test_transformers_computes_experts_without_weights_only_with_help(tmp_path: Path) -> None:
    architectures.make("qwen3_moe", tmp_path)
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    with experts_on_meta():
        assert skeleton(tmp_path, torch.float32)(ids).logits.shape[:2] == (1, 8)
    with pytest.raises(RuntimeError, match="Expected inputs of BF16 type"):
        skeleton(tmp_path, torch.float32)(ids)


def test_bitsandbytes_has_its_scales_beside_the_weights(tmp_path: Path) -> None:
    architectures.make("qwen3_moe", tmp_path)
    model = load_quantized(tmp_path, CPU, torch.float32)
    scales_to(model, torch.device("meta"))
    states = [module.quant_state for module in model.modules() if hasattr(module, "quant_state")]
    assert len(states) == 8 + 4 and {state.absmax.device.type for state in states} == {"meta"}


def test_bitsandbytes_dequantizes_by_the_scales_that_are_computed_apart() -> None:
    model = load_quantized(BASE, CPU, torch.float32)
    layer = next(module for module in model.modules() if hasattr(module, "quant_state"))
    expected = bnb.functional.dequantize_4bit(layer.weight, layer.quant_state)
    assert torch.equal(dequantized(layer, scales_of(layer), torch.float32), expected)


def test_bitsandbytes_quantizes_real_weights_after_those_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.functional, "name2qmap", {})
    model = skeleton(BASE, torch.float32)
    quantize_on_meta(model, [model.model.layers[0].mlp.up_proj], dora=False)
    assert bnb.functional.quantize_blockwise(torch.ones(64))[0].device == CPU


@pytest.mark.parametrize("name", ["qwen2_5_vl", "nemotron_h", "qwen2_moe"])
def test_transformers_loads_tensors_under_the_names_that_are_found(tmp_path: Path, name: str) -> None:
    architectures.make(name, tmp_path)
    stored, loaded = load_file(tmp_path / "model.safetensors"), auto_class(tmp_path).from_pretrained(tmp_path)
    names, parameters = names_in_files(skeleton(tmp_path), stored), dict(loaded.named_parameters())
    assert all(parameters[name].equal(stored[of]) for name, of in names.items())
    changed_while_loading = {name for name in parameters if ".experts." in name}
    assert names.keys() == parameters.keys() - changed_while_loading


def test_transformers_makes_a_quantized_model_without_files() -> None:
    model = random_nf4(TINY["Llama"], CPU, torch.float32)
    assert model.is_loaded_in_4bit and model.model.layers[0].self_attn.q_proj.weight.quant_state is not None


# TRL


def test_trl_rounds_an_adapter_on_a_quantized_base(build: Build) -> None:
    model = adapted()
    before = {name: weight.detach().clone() for name, weight in adapter_weights(model).items()}
    with trl_internals.adapter_kept_as(torch.float32, model):
        build(model)
        rounded = {weight.dtype for weight in adapter_weights(model).values()}
        assert rounded == {BFLOAT16}, "adapter_kept_as is not needed any more"
    assert all(weight.equal(before[name]) for name, weight in adapter_weights(model).items())


def test_trl_gives_the_forward_a_fused_head(build: Build) -> None:
    model = adapted(trainable_token_indices={"lm_head": [3]})
    give_head_a_bias(model)
    build(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids, "labels": torch.tensor([[-100, -100, 7, 8]])}
    expected = cross_entropy(model(input_ids=ids).logits[0, 1:3], ids[0, 2:], reduction="sum")
    torch.testing.assert_close(trl_internals.loss_and_tokens(model, inputs), torch.stack([expected, torch.tensor(2.0)]))


def test_the_fused_head_has_the_log_probability_of_each_token(build: Build) -> None:
    model = adapted()
    build(model)
    ids = torch.tensor([[5, 6, 7, 8], [4, 3, 2, 1]])
    expected = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(log_probs(model, ids), expected)


def test_trl_computes_logits_of_supervised_tokens_only(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    build(model)
    ids = torch.tensor([[5, 6, 7, 8]])

    def operations(supervised: int) -> int:
        labels = torch.where(torch.arange(4) < 4 - supervised, -100, ids)
        with FlopCounterMode(display=False) as counter:
            trl_internals.loss_and_tokens(model, {"input_ids": ids, "labels": labels})
        return counter.get_total_flops()

    head = model.get_output_embeddings().weight.numel()
    assert operations(3) - operations(1) == 2 * 2 * head
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: False)
    assert operations(3) == operations(1), "the change of _use_triton is not needed any more"


# Accelerate, and torch's launcher


def test_accelerate_leaves_a_model_unwrapped_that_it_has_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 2)
    accelerate_internals.leave_unwrapped(model, accelerator)
    monkeypatch.setattr(Accelerator, "multi_device", True)
    assert accelerator.prepare_model(model) is model
    with pytest.raises(ValueError, match="process group"):
        accelerator.prepare_model(torch.nn.Linear(2, 2))


def test_accelerate_and_transformers_ask_a_quantized_model_where_it_is() -> None:
    for method in (Accelerator.prepare_model, Trainer._move_model_to_device):
        assert '"hf_device_map"' in inspect.getsource(method)


def test_accelerate_launch_knows_the_arguments_that_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(accelerate_internals, "launch_command", launched.append)
    accelerate_internals.launch("stages.train_qlora", 2, 4, ["--main_process_port", "29501"])
    [options] = launched
    assert (options.num_processes, options.num_cpu_threads_per_process, options.main_process_port) == (2, 2, 29501)
    assert options.multi_gpu and options.module and options.training_script == "stages.train_qlora"


def test_torch_leaves_the_launcher_a_file_of_what_ended_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr("os._exit", lambda status: None)
    accelerate_internals.end_as_failed(UserError("the loss is nan"))
    raised = accelerate_internals.cause({0: ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))})
    assert isinstance(raised, UserError) and str(raised) == "the loss is nan"


# torch


def test_torch_shows_each_operation_on_the_meta_device() -> None:
    with Alive([], large=2000) as alive:
        first = torch.empty(1000, dtype=torch.float32, device="meta")
        second = torch.empty(100, dtype=torch.float32, device="meta") * 2
        del first, second
    assert (alive.now, alive.peak, alive.small) == (0, 4800, 800)


def test_torch_copies_many_tensors_into_tensors_of_another_type() -> None:
    sources = [torch.nn.Parameter(torch.full((2,), value)) for value in (1.5, 2.5)]
    targets = [torch.zeros(2, dtype=torch.bfloat16) for _ in sources]
    copy_all(sources, targets)
    assert [target.tolist() for target in targets] == [[1.5, 1.5], [2.5, 2.5]]


def test_torch_has_a_fused_attention_that_keeps_no_scores_on_the_meta_device() -> None:
    queries, keys = torch.randn(1, 4, 512, 16), torch.randn(1, 2, 512, 16)
    mask = torch.ones(1, 1, 512, 512, dtype=torch.bool)
    found, _ = fused_on_meta(torch.nn.Module(), queries, keys, keys, mask)
    expected = scaled_dot_product_attention(queries, keys, keys, mask, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    with Alive([], large=0) as alive:
        fused_on_meta(torch.nn.Module(), queries.to("meta"), keys.to("meta"), keys.to("meta"), None)
    assert 0 < alive.peak < 4 * 512 * 512 * 4  # the scores


# DVC


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One stage, with an output in the cache and a metric in git, has run."""
    small = Project(tmp_path_factory.mktemp("small"))
    for name, text in [
        ("params.yaml", "lora: {r: 8}\n"),
        (
            "dvc.yaml",
            "stages: {make: {cmd: echo 1 | tee out metric, params: [lora.r], outs: [out], "
            "metrics: [metric: {cache: false}]}}\n",
        ),
    ]:
        (small.folder / name).write_text(text, encoding="utf-8")
    remote = ["dvc", "remote", "add", "--quiet", "--default", "storage", str(small.folder.with_name("remote"))]
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], remote, ["dvc", "repro", "-q"]):
        small.run(*command)
    return small


def test_dvc_puts_deleted_outputs_back_as_dvc_lock_has_them(
    repository: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository.folder)
    for name in ("out", "metric"):
        Path(name).unlink()
    put_back_outputs("make")
    assert [Path(name).read_text(encoding="utf-8") for name in ("out", "metric")] == ["1\n", "1\n"]
    assert Path("metric").stat().st_nlink == 1  # a copy


def test_dvc_hashes_an_output_as_it_is_now(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.folder)
    recorded = output_hash("out")
    assert recorded in Path("dvc.lock").read_text(encoding="utf-8")
    Path("out").unlink()  # a link into the cache
    Path("out").write_text("another\n", encoding="utf-8")
    assert output_hash("out") != recorded


def test_dvc_makes_combinations_of_parameters_and_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("lora: {r: 8, alpha: 1}\n", encoding="utf-8")
    members = dvc_internals.combinations(["lora.r=8,16", "lora.alpha=2"])
    assert members == [["lora.r=8", "lora.alpha=2"], ["lora.r=16", "lora.alpha=2"]]
    dvc_internals.override(file, members[1])
    assert file.read_text(encoding="utf-8") == "lora: {r: 16, alpha: 2}\n"
    with pytest.raises(ValueError, match="mismatched input"):
        dvc_internals.combinations(["lora.r=8,["])
    with pytest.raises(ValueError, match=r"Could not override 'lora\.rr'"):
        dvc_internals.override(file, ["lora.rr=1"])


def test_dvc_has_a_command_for_one_worker_and_knows_what_runs_without_one(
    repository: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get_main_parser().parse_args(["exp", "queue-worker", "sweep-1@localhost"]).name == "sweep-1@localhost"
    monkeypatch.chdir(repository.folder)
    dvc_internals.fail_lost_tasks()
    with Repo() as repo:
        queue = repo.experiments.celery_queue
        assert Path(queue.wdir) == repository.folder / dvc_internals.WORKERS
        assert queue.get_infofile_path("0" * 40) and queue.celery.backend.mark_as_failure


def test_dvc_sends_all_files_of_its_runs(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.folder)
    assert dvc_internals.push_runs() == (1, 1, 0, 0)


# llama.cpp: its converter, cyllama, xllamacpp


def test_cyllama_has_the_struct_of_llama_cpp_at_the_end_of_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "llama.cpp"))
    quantize = import_module("quantize")
    parameters = LlamaModelQuantizeParams()
    parameters.nthread, parameters.ftype, parameters.pure, parameters.keep_split = 3, 15, True, True
    kept = quantize.give_importance(parameters, {"blk.0.attn_q.weight": np.ones(4, np.float32)})
    assert (kept.nthread, kept.ftype, list(kept.flags)) == (3, 15, [False, True, False, True, True, False])
    assert (kept.imatrix[0].name, kept.imatrix[0].data[3], kept.imatrix[0].size) == (b"blk.0.attn_q.weight", 1.0, 4)
    assert kept.imatrix[1].name is None
    kept.others[0] = kept.others[1] = kept.others[2] = None  # pointers, which the object frees if they are its own
    assert (parameters.nthread, parameters.ftype, parameters.quantize_output_tensor) == (3, 15, True)


@pytest.mark.parametrize(
    ("file", "method", "arguments", "use"),
    [
        (
            "conversion/base.py",
            "TextModel.get_vocab_base_pre",
            ["self", "tokenizer"],
            "self.get_vocab_base_pre(tokenizer)",
        ),
        ("conversion/base.py", "TextModel._set_vocab_sentencepiece", ["self", "add_to_gguf"], "def set_vocab"),
        ("conversion/base.py", "ModelBase.load_hparams", ["dir_model", "is_mistral_format"], "no_mtp: bool = False"),
        ("conversion/base.py", "ModelBase.from_model_architecture", ["cls", "arch", "model_type"], "_model_classes"),
        ("conversion/mistral3.py", "Mistral3Model.__init__", ["self"], "class Ministral3Model(LlamaModel)"),
        (
            "gguf-py/gguf/metadata.py",
            "Metadata.load_model_card",
            ["model_path"],
            "Metadata.load_model_card(model_path)",
        ),
        (
            "gguf-py/gguf/metadata.py",
            "Metadata.load_hf_parameters",
            ["model_path"],
            "Metadata.load_hf_parameters(model_path)",
        ),
        ("gguf-py/gguf/metadata.py", "Metadata.set_gguf_meta_model", ["self", "gguf_writer"], "add_base_model_name"),
    ],
)
def test_llama_cpps_converter_has_the_methods_that_are_replaced(
    file: str, method: str, arguments: list[str], use: str
) -> None:
    source = (converter() / file).read_text(encoding="utf-8")
    owner, _, name = method.partition(".")
    [kind] = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == owner]
    [function] = [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert [argument.arg for argument in function.args.args] == arguments and use in source


def test_llama_cpps_converter_refuses_a_tokenizer_that_it_does_not_know() -> None:
    source = (converter() / "conversion/base.py").read_text(encoding="utf-8")
    assert 'raise NotImplementedError("BPE pre-tokenizer was not recognized' in source


def test_xllamacpp_takes_every_setting_of_the_server() -> None:
    source = (ROOT / "pipeline/model/llama_server.py").read_text(encoding="utf-8")
    assigned = [
        target for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign) for target in node.targets
    ]
    settings = [ast.unparse(target) for target in assigned if ast.unparse(target).startswith("parameters.")]
    assert len(settings) > 10 and {"parameters.cache_type_k", "parameters.cache_type_v"} <= set(settings)
    for names in (setting.removeprefix("parameters.") for setting in settings):
        owner: object = xllamacpp.CommonParams()
        for name in names.split("."):
            assert hasattr(owner, name), names
            owner = getattr(owner, name)
    assert xllamacpp.ggml_type.GGML_TYPE_F32 == 0 and hasattr(xllamacpp.Server, "listening_address")


@pytest.mark.skipif(sys.platform != "linux", reason="wheels for macOS use no libgomp")
def test_xllamacpp_needs_a_libgomp_and_torch_has_one() -> None:
    assert b"libgomp.so.1" in Path(str(xllamacpp.xllamacpp.__file__)).read_bytes()
    assert list((Path(torch.__file__).parent / "lib").glob("libgomp*"))


def test_the_three_llama_cpp_are_at_most_half_a_year_apart() -> None:
    """llama.cpp makes some 500 builds a month. The converter has no number: it is as new as the architectures that it
    knows. Some of the shorter names are in no library, as compilers make instructions of them."""
    quantizer = int(cyllama_build.versions()["llama_cpp_version"].removeprefix("b"))
    server = int(version("xllamacpp").split(".")[2])
    assert abs(server - quantizer) <= 3000
    constants = (converter() / "gguf-py/gguf/constants.py").read_text(encoding="utf-8")
    known = set(re.findall(r'^    MODEL_ARCH\.\w+:\s+"(.+)",', constants, re.MULTILINE))
    for library, missing in [("xllamacpp.xllamacpp", 10), ("cyllama.llama.llama_cpp", 35)]:
        binary = Path(str(import_module(library).__file__)).read_bytes()
        lacks = sorted(name for name in known if f"{name}\0".encode() not in binary)
        assert len(known) > 100 and len(lacks) <= missing, f"{library} lacks {lacks}"


def converter() -> Path:
    release = re.search(r"==(\S+)", (ROOT / "llama.cpp/source.txt").read_text(encoding="utf-8"))
    assert release
    return Path(sys.prefix, "share", f"llama.cpp-{release[1]}")
