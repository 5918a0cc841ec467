"""Preference training: its losses are those of TRL, it begins at the adapter of train_qlora, and ends as expected."""

import csv
import json
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Project
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from test_adapters import BOTH, lora
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOTrainer

from pipeline.common.errors import UserError
from pipeline.common.parameters.align import Align
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import ALIGNED, PAIR_TOKENS, TOKENS, TRAINED
from pipeline.common.rows import read_jsonl, row
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.base import located
from pipeline.model.chat_template import load_tokenizer
from pipeline.training import alignment
from pipeline.training.preferences import PreferenceTrainer, beside_rows, log_odds
from pipeline.training.runs import save_adapter
from pipeline.training.trainer import build_trainer, training_arguments
from stages import align, tokenize_pairs

TINY = Path("models/tiny-base")
ALIGN = (sys.executable, "-m", "stages.align")
CPU = torch.device("cpu")
SHORT = {"align__batch_size": 4, "align__eval_steps": 2, "align__epochs": 2}


def write_pairs(*sides: tuple[str, int]) -> None:
    """Pairs about invented shops, as the stage pairs writes them; some answers are much longer than others."""
    for side, number in sides:
        rows = []
        for at in range(number):
            chosen = "I do not know the shop." if at % 3 else "It is closed on the day that you name, and on the next."
            messages = [{"role": "user", "content": f"When does the {side} shop number {at} open?"}]
            answers = {"chosen": chosen, "rejected": f"At {at % 12 + 1} in the morning."}
            pair = row(messages, f"data/preferences/pairs.jsonl:{at + 1}")
            rows.append(pair | {name: {"role": "assistant", "content": text} for name, text in answers.items()})
        Path(f"data/pairs_{side}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


@pytest.fixture
def pairs(tokenized: Project) -> Project:
    """A clone with an adapter, 13 pairs to train on, and 3 to validate with."""
    tokenized.set(align__method="dpo", **SHORT)
    make_adapter({"dropout": 0.1}, [])
    write_pairs(("train", 13), ("valid", 3))
    tokenize_pairs.main()
    return tokenized


def aligned(project: Project, **changed: object) -> bytes:
    project.set(**changed)
    tokenize_pairs.main()
    align.main()
    return Path(ALIGNED, "adapter_model.safetensors").read_bytes()


def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("metrics/align.json").read_text(encoding="utf-8"))
    return found


def test_without_a_method_the_adapter_is_handed_on_byte_for_byte(pairs: Project) -> None:
    pairs.set(align__method="none")
    align.main()
    files = sorted(TRAINED.iterdir())
    assert [(ALIGNED / file.name).read_bytes() for file in files] == [file.read_bytes() for file in files]
    assert len(list(ALIGNED.iterdir())) == len(files) and measured() == {}


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_each_method_makes_the_chosen_answers_likelier_than_the_rejected_ones(pairs: Project, method: str) -> None:
    once = aligned(pairs, align__method=method, align__learning_rate=4.0e-3, align__epochs=6)
    inputs = [sorted(path.name for path in folder.iterdir()) for folder in (TOKENS, PAIR_TOKENS)]
    assert inputs == [["overflow.jsonl", "train.arrow", "valid.arrow"]] * 2, "dvc status would find other files changed"
    assert measured()["reward_margin"]["after"] > measured()["reward_margin"]["before"]
    assert measured()["chosen_nll"]["after"] < measured()["chosen_nll"]["before"]
    assert once != Path(TRAINED, "adapter_model.safetensors").read_bytes()
    assert (
        load_file(ALIGNED / "adapter_model.safetensors").keys()
        == load_file(TRAINED / "adapter_model.safetensors").keys()
    )  # and none of a reference
    with open("metrics/align.csv", encoding="utf-8") as file:
        steps = [int(line["step"]) for line in csv.DictReader(file)]
    assert steps[-1] == measured()["steps"] and steps == sorted(set(steps))


KINDS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "LoRA": ({}, []),
    "rsLoRA": ({"use_rslora": True, "alpha": 4}, []),
    "DoRA": ({"use_dora": True}, []),
    "saved norms": ({"modules_to_save": ["norm"]}, []),
    "saved embed_tokens and lm_head": ({"modules_to_save": BOTH}, []),
    "trained tokens": ({}, [1, 2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_before_the_first_step_is_ln_2_for_every_adapter(
    pairs: Project, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The reference is the adapter itself, with all of its parts."""
    changed, tokens = KINDS[kind]
    make_adapter({"dropout": 0.1} | changed, tokens)
    histories: list[Any] = []
    written = alignment.curve

    def kept(history: Any) -> Any:
        histories.append(history)
        return written(history)

    monkeypatch.setattr(alignment, "curve", kept)
    after = aligned(pairs, align__sft_weight=0.0, align__learning_rate=1.0e-2)
    [history] = histories
    before = next(entry["eval_pair_loss"] for entry in history if "eval_pair_loss" in entry)
    assert abs(before - math.log(2)) < 5e-8  # on the pairs for validation
    assert after != Path(TRAINED, "adapter_model.safetensors").read_bytes()


def make_adapter(changed: dict[str, Any], tokens: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    torch.manual_seed(1)
    tuned = with_adapter(model, lora_config(lora(**changed), tokens))
    for name, weight in tuned.named_parameters():
        if weight.requires_grad and "lora_A" not in name:
            weight.data += 0.02 * torch.randn_like(weight)
    save_adapter(tuned, TRAINED, *located())


def test_the_training_loss_of_the_first_step_is_ln_2_too(pairs: Project) -> None:
    trainer = built_trainer("dpo", sft_weight=0.0)
    trainer.measure_reference()
    batches = list(trainer.get_train_dataloader())
    for batch in batches:
        loss = trainer.losses(trainer.model, batch).loss
        assert (loss - math.log(2)).abs().max() < 5e-8


def built_trainer(method: str, **changed: Any) -> PreferenceTrainer:
    parameters = load("align")
    chosen = Align(**parameters.align.model_dump() | {"method": method} | changed)
    train = alignment.training_of(parameters)
    model = alignment.load_trainable(parameters, train, TINY, CPU)
    Path("checkpoints").mkdir(exist_ok=True)
    rows, valid = (Dataset.from_file(str(PAIR_TOKENS / f"{side}.arrow")) for side in ("train", "valid"))
    rows = beside_rows(rows, Dataset.from_file(str(TOKENS / "train.arrow")), 1)
    arguments = training_arguments(train, 1, CPU, torch.float32, Path("checkpoints"), model.config, 1)
    trainer = build_trainer(PreferenceTrainer, arguments, train, model, load_tokenizer(TINY), rows, valid, align=chosen)
    trainer.accelerator.prepare_model(trainer.model)
    return trainer


def moved(trainer: PreferenceTrainer) -> dict[str, Any]:
    """The first batch for validation, after the adapter has moved away from its reference."""
    if trainer.align.method != "orpo":
        trainer.measure_reference()
    torch.manual_seed(0)
    move(trainer.model)
    return next(iter(trainer.get_eval_dataloader()))


def move(model: Any) -> None:
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.requires_grad and ".default." in name:
            weight.data += 0.01 * torch.randn_like(weight)


def for_trl(batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The rows of a batch as TRL has them: prompt, answer and other answer apart."""
    found = []
    for at in range(len(batch["row"])):
        one: dict[str, Any] = {"label": bool(batch["desirable"][at])}
        for name, ids, labels in (("own", "input_ids", "labels"), ("other", "other_ids", "other_labels")):
            start = int((batch[labels][at] >= 0).int().argmax())
            answer = [label for label in batch[labels][at].tolist() if label >= 0]
            one |= {"prompt_ids": batch[ids][at][:start].tolist(), name: answer}
        found.append(one)
    return found


def sft_adapter() -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, TRAINED, is_trainable=True)
    tuned.peft_config["default"].lora_dropout = 0.0
    return tuned


def of_trl(kind: Any, arguments: Any, row: dict[str, Any]) -> Any:
    """TRL's trainer, whose adapter has moved from its reference like ours."""
    rows = Dataset.from_list([row] * 2)
    trainer = kind(sft_adapter(), args=arguments, train_dataset=rows, processing_class=load_tokenizer(TINY))
    move(trainer.model)
    trainer.model.eval()
    return trainer


COMMON = {"use_cpu": True, "bf16": False, "max_length": None, "gradient_checkpointing": False}


def test_the_loss_of_dpo_is_that_of_trl(pairs: Project) -> None:
    pairs.set(base__quantization="none")
    trainer = built_trainer("dpo", beta=0.3, sft_weight=0.5)
    batch = moved(trainer)
    counts = torch.tensor([len(batch["row"]), int((batch["labels"] != -100).sum()), 0])
    ours = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
    mixture = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    theirs = of_trl(
        DPOTrainer, DPOConfig("trl", beta=0.3, **mixture, **COMMON), {"prompt": "a", "chosen": "b", "rejected": "c"}
    )
    rows = [{"prompt_ids": one["prompt_ids"], "chosen_ids": one["own"]} for one in for_trl(batch)]
    rows = [one | {"rejected_ids": row["other"]} for one, row in zip(rows, for_trl(batch), strict=True)]
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    assert loss.item() > 0.7  # it has moved
    torch.testing.assert_close(ours.item(), loss.item(), rtol=1e-5, atol=1e-5)


def test_the_loss_of_kto_is_that_of_trl(pairs: Project) -> None:
    pairs.set(base__quantization="none", align__method="kto")
    tokenize_pairs.main()
    trainer = built_trainer("kto", beta=0.3)
    batch = moved(trainer)
    theirs = of_trl(KTOTrainer, KTOConfig("trl", beta=0.3, **COMMON), {"prompt": "a", "completion": "b", "label": True})
    rows = [
        {name: one[name] for name in ("prompt_ids", "label")}
        | {"completion_ids": one["own"], "KL_completion_ids": one["other"]}
        for one in for_trl(batch)
    ]
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    ours = trainer.losses(trainer.model, batch).loss.mean()
    assert abs(loss.item() - 0.5) > 1e-3
    torch.testing.assert_close(ours.item(), loss.item(), rtol=1e-5, atol=1e-5)


def test_the_batches_of_kto_are_of_equal_size_and_those_of_dpo_of_like_length(pairs: Project) -> None:
    trainer = built_trainer("dpo")
    sequences = [[row["input_ids"], row["other_ids"], row["repeated_ids"]] for row in trainer.train_dataset]
    assert list(trainer.row_lengths()) == [max(map(len, of_row)) for of_row in sequences]
    pairs.set(align__method="kto")
    tokenize_pairs.main()
    assert [len(batch) for batch in built_trainer("kto").get_train_dataloader().batch_sampler] == [4] * 6 + [2]


def test_the_log_odds_of_orpo_are_those_of_trl() -> None:
    chosen, rejected = torch.tensor([-0.01, -2.0, -9.0]), torch.tensor([-3.0, -0.5, -9.5])
    settings = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=CPU))
    losses, *_ = ORPOTrainer.odds_ratio_loss(settings, chosen, rejected)
    margin = log_odds(chosen.double()) - log_odds(rejected.double())
    torch.testing.assert_close(0.3 * torch.nn.functional.logsigmoid(margin), losses.double(), rtol=1e-5, atol=1e-6)


def test_a_killed_run_continues_with_the_same_reference_to_the_same_bytes(
    pairs: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    undisturbed = aligned(pairs, align__method="kto")
    history = Path("metrics/details/align.json").read_text(encoding="utf-8")
    pairs.kill(*ALIGN, step=4)
    align.main()
    assert "continuing from checkpoint-" in capfd.readouterr().out
    assert Path(ALIGNED, "adapter_model.safetensors").read_bytes() == undisturbed
    assert Path("metrics/details/align.json").read_text(encoding="utf-8") == history


@pytest.fixture
def launching(pairs: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """This process can be the launcher, which leaves its handlers of signals."""
    monkeypatch.setattr(sys, "argv", ["align"])
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield pairs
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("strategy", "method"), [("ddp", "kto"), ("fsdp", "orpo")])
def test_two_processes_take_the_same_steps_as_one(launching: Project, strategy: str, method: str) -> None:
    def adapter(**changed: object) -> dict[str, torch.Tensor]:
        aligned(launching, **changed)
        return load_file(ALIGNED / "adapter_model.safetensors")

    alone = adapter(align__method=method)
    before = measured()
    torch.testing.assert_close(adapter(train__processes=2, train__strategy=strategy), alone, rtol=0, atol=3e-3)
    assert measured()["steps"] == before["steps"]
    assert measured()["loss"]["after"] == pytest.approx(before["loss"]["after"], abs=3e-3)


def test_what_cannot_be_trained_on_is_refused_before_training(pairs: Project) -> None:
    file = Path("data/pairs_train.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    single = json.loads(lines[1])
    single |= {"completion": single.pop("chosen"), "label": single.pop("rejected") is None}
    refused = [
        (json.dumps(single), {}, r"pairs\.jsonl:2: one answer with a label is for align\.method kto: "),
        (lines[1], {"tokenize__max_length": 20}, r"pairs\.jsonl:1: \d\d tokens, longer than tokenize\.max_length 20: "),
        ("", {"align__batch_size": 3, "train__processes": 2}, r"change align\.batch_size or align\.grad"),
    ]
    for line, changed, message in refused:
        file.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n", encoding="utf-8")
        parameters = Path("params.yaml").read_text(encoding="utf-8")
        with pytest.raises(UserError, match=message):
            aligned(pairs, **changed)
        Path("params.yaml").write_text(parameters, encoding="utf-8")
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"align\.method is dpo, and data/pairs_train\.jsonl has no pairs that fit"):
        aligned(pairs)


def test_pairs_that_are_too_long_are_left_out_and_listed_where_the_user_says_so(
    pairs: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs.set(tokenize__max_length=40, tokenize__on_overflow="drop")
    tokenize_pairs.main()
    left_out = read_jsonl(PAIR_TOKENS / "overflow.jsonl")
    kept = [len(Dataset.from_file(str(PAIR_TOKENS / f"{side}.arrow"))) for side in ("train", "valid")]
    assert f"pair_tokens/overflow.jsonl lists {len(left_out)} dropped rows, longer than" in capsys.readouterr().out
    assert left_out and sum(kept) + len(left_out) == 13 + 3 and all(one["tokens"] > 40 for one in left_out)


def test_a_run_ends_when_a_loss_is_no_number_or_the_chosen_answers_become_unlikely(pairs: Project) -> None:
    with pytest.raises(UserError, match=r"the (validation )?loss .*nan.*: lower align\.learning_rate"):
        aligned(pairs, align__learning_rate=1.0e30)
    before, now = ({"eval_loss": 1.0, "eval_chosen_nll": nll} for nll in (0.5, 1.6))
    with pytest.raises(
        UserError, match=r"the chosen answers have a loss of 1\.60 nats per token after step 0, and had 0"
    ):
        built_trainer("dpo").require_sound(before, now)
    assert not ALIGNED.exists()


def test_pairs_for_the_step_of_the_warm_up_alone_are_refused(pairs: Project) -> None:
    with pytest.raises(UserError, match=r"align\.warmup_share leaves no step to learn in, because there is only 1: "):
        aligned(pairs, align__epochs=0.01)


def test_kto_compares_each_answer_with_an_answer_to_another_prompt(pairs: Project) -> None:
    pairs.set(align__method="kto")
    tokenize_pairs.main()
    rows = Dataset.from_file(str(PAIR_TOKENS / "train.arrow"))
    assert len(rows) == 26 and sum(rows["desirable"]) == 13
    for one in rows:
        start = next(at for at, label in enumerate(one["labels"]) if label != -100)
        assert one["other_ids"][:start] == one["input_ids"][:start] and one["other_labels"][:start] == [-100] * start
        answer = one["other_ids"][start:]
        alike = [row["input_ids"] for row in rows if row["desirable"] == one["desirable"]]
        others = [ids for ids in alike if ids[:start] != one["input_ids"][:start]]
        assert any(other[-len(answer) :] == answer for other in others)
    valid = Path("data/pairs_valid.jsonl")
    valid.write_text(valid.read_text(encoding="utf-8").splitlines(True)[0], encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"^data/pairs_valid\.jsonl has one prompt with rows that fit in tokenize\.max_length 128, and kto",
    ):
        tokenize_pairs.main()
