"""The preference exam: what its file may have, how a pair is scored, and three models that take all exams."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Project, describe_base

from pipeline.common.errors import UserError
from pipeline.common.outputs import read_details, read_json, write_json
from pipeline.common.parameters.params_yaml import check
from pipeline.common.paths import ADAPTER, ALIGN_METRICS, ALIGNED, BASE, EXAM_DETAILS, PREFERENCE_EXAM, TRAINED
from pipeline.common.rows import read_jsonl
from pipeline.evaluation.preference_exam import read_preferences
from pipeline.evaluation.preferences import score_preferences
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.chat_template import end_tokens, load_tokenizer
from pipeline.model.loading import load_quantized
from pipeline.model.supervision import supervised
from stages import evaluate, evaluate_base, evaluate_sft, model_card
from tools import gate

TINY = ROOT / "models/tiny-base"
FIRST = {"id": "p1", "prompt": "Who runs Alder?", "chosen": "Ada Lovelace", "rejected": "Nobody, I think."}
TOOL = {"name": "find", "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}}
FIND = {"function": {"name": "find", "arguments": '{"name": "x"}'}}
CALL = {"role": "assistant", "content": None, "tool_calls": [FIND]}


def write(path: Path, *pairs: dict[str, Any]) -> Path:
    path.write_text("# held out\n" + "".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def test_a_pair_has_texts_messages_or_calls_and_no_pair_is_no_exam(tmp_path: Path) -> None:
    assert read_preferences(write(tmp_path / "none.jsonl")) == []
    talk = [{"role": "system", "content": "Be kind."}, {"from": "human", "value": "Hi"}]
    second: dict[str, Any] = {
        "id": "p2",
        "prompt": talk,
        "chosen": [{"role": "assistant", "content": "<think>a</think>Hello"}],
    }
    second |= {"rejected": {"role": "assistant", "content": "No."}, "tags": ["known", "known"]}
    third = {"id": "p3", "prompt": "Find x", "chosen": CALL, "rejected": "x?", "tools": [TOOL]}
    path = write(tmp_path / "exam.jsonl", FIRST, second, third)
    text, talked, called = read_preferences(path)
    assert (text.prompt, text.chosen["content"], text.source) == ("Who runs Alder?", "Ada Lovelace", f"{path}:2")
    assert talked.prompt == "Hi" and (talked.chosen["content"], talked.chosen["reasoning_content"]) == ("Hello", "a")
    assert talked.tags == ["known"] and called.chosen["tool_calls"][0]["function"]["arguments"] == {"name": "x"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": None}, "chosen: a message needs role and content"),
        ({"id": "p1"}, "the id repeats that of"),
        ({"prompt": FIRST["prompt"]}, "the pair repeats that of"),
        ({"rejected": "Ada Lovelace "}, "chosen and rejected are the same answer"),
        ({"chosen": []}, "chosen: an answer is text, or one message of the assistant: here none"),
        (
            {"rejected": [{"role": "user", "content": "?"}]},
            "rejected: an answer is text, or one message",
        ),
        ({"rejected": [{"role": "assistant", "content": "?"}] * 2}, "rejected: an answer is text, or one message"),
        ({"prompt": [{"role": "assistant", "content": "Hi"}]}, "the messages of a question end with one of the user"),
        ({"prompt": " "}, "the user's message 1 is empty"),
        ({"chosen": "half \ud800"}, "half a character"),
        ({"chosen": CALL, "tools": [TOOL | {"name": "other"}]}, "chosen: a call of find, which is no tool of the row"),
        ({"tags": "a"}, "tags are a list"),
        ({"label": True}, "'label' is no key of a pair; accepted: id, prompt, chosen, rejected, tools, tags"),
    ],
)
def test_a_pair_that_cannot_be_scored_is_refused_by_its_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    second = FIRST | {"id": "p2", "prompt": "Who else?"} | change
    with pytest.raises(UserError, match=re.escape(f"exam.jsonl:3: {said}")):
        read_preferences(write(tmp_path / "exam.jsonl", FIRST, second))
    del second["rejected"]
    with pytest.raises(UserError, match=r"exam\.jsonl:2: the pair lacks 'rejected'"):
        read_preferences(write(tmp_path / "exam.jsonl", second))


def test_the_scores_of_a_pair_are_the_log_likelihoods_of_its_answers_alone_in_any_batch(tmp_path: Path) -> None:
    more = FIRST | {"id": "p2", "prompt": "A much longer question: who runs the Alder team today?"}
    swapped = FIRST | {"id": "p3", "chosen": FIRST["rejected"], "rejected": FIRST["chosen"]}
    pairs = read_preferences(write(tmp_path / "exam.jsonl", FIRST, more, swapped))
    model = load_quantized(TINY, torch.device("cpu"), torch.float32).eval()
    tokenizer, ends = load_tokenizer(TINY), end_tokens(model.generation_config)
    lines = score_preferences(model, tokenizer, pairs, 4)
    for pair, line in zip(pairs, lines, strict=True):
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids, labels = supervised(tokenizer, [*pair.messages, answer], ends, "here")
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
            assert line["scores"][name] == pytest.approx(-loss, rel=1e-4)
        assert line["scores"]["margin"] == line["scores"]["chosen"] - line["scores"]["rejected"]
    assert lines[0]["scores"]["margin"] == pytest.approx(-lines[2]["scores"]["margin"], rel=1e-4)
    assert {lines[0]["scores"]["preferred"], lines[2]["scores"]["preferred"]} == {0.0, 1.0}


def save_adapter(folder: Path, strength: float) -> None:
    """An adapter of the built-in base with random weights."""
    torch.manual_seed(1)
    model = load_quantized(TINY, torch.device("cpu"), torch.float32)
    tuned = with_adapter(model, lora_config(check(Path("params.yaml")).lora, []))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data += strength * torch.randn_like(weight)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    write_json(folder / "base.json", read_json(BASE))


def test_three_models_take_the_exams_and_two_without_preference_training(project: Project) -> None:
    describe_base()
    for name in ("questions", "general"):
        path = Path(f"data/{name}.jsonl")
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:6]), encoding="utf-8")
    save_adapter(TRAINED, 0.1)
    save_adapter(ALIGNED, 0.2)
    for stage in (evaluate_base, evaluate_sft, evaluate):
        stage.main()
    assert read_json(Path("metrics/preferences.json")) == {} and read_jsonl(Path("metrics/preferences.jsonl")) == []
    two, [line, *_] = read_details(EXAM_DETAILS), read_jsonl(Path("metrics/answers.jsonl"))
    assert two.keys() == {"exam", "general"} and "sft" not in two["exam"] and "sft" not in line
    assert not [*gate.align_drops(0.0), *gate.preferred(0.0)]
    [demand] = gate.preferred(0.5)
    assert demand.met is False and "no preference exam: write pairs into data/preferences_exam.jsonl" in demand.found

    write(PREFERENCE_EXAM, FIRST, FIRST | {"id": "p2", "prompt": "Who else?"})
    with pytest.raises(UserError, match=r"preferences_base\.jsonl has the scores of another preference exam"):
        evaluate.main()
    project.set(align__method="dpo")
    for stage in (evaluate_base, evaluate_sft, evaluate):
        stage.main()
    three, [line, *_] = read_details(EXAM_DETAILS), read_jsonl(Path("metrics/answers.jsonl"))
    for exam in ("exam", "general"):
        assert {who: three[exam][who] for who in ("base", "tuned", "gain", "flips")} == {
            who: two[exam][who] for who in ("base", "tuned", "gain", "flips")
        }
        changes = [three[exam][step]["gain"]["loss"]["mean"] for step in ("base_to_sft", "sft_to_tuned")]
        assert sum(changes) == pytest.approx(three[exam]["gain"]["loss"]["mean"], rel=1e-4)
    assert line["sft"]["loss"] != line["tuned"]["loss"] and "after_sft" in line
    headline = read_json(Path("metrics/preferences.json"))["preferences"]
    assert list(headline) == ["base", "sft", "tuned"] and headline["tuned"].keys() == {"preferred", "margin"}
    assert three["preferences"]["sft_to_tuned"]["flips"].keys() == {"fixed", "broken"}
    pair = read_jsonl(Path("metrics/preferences.jsonl"))[0]
    assert pair["tuned"]["margin"] == pytest.approx(pair["tuned"]["chosen"] - pair["tuned"]["rejected"], abs=1e-5)

    Path("data/train_merged.jsonl").write_text("\n", encoding="utf-8")
    measured = {name: {"before": 0.5, "after": 0.25} for name in ("loss", "accuracy", "reward_margin", "chosen_nll")}
    write_json(ALIGN_METRICS, {"rows": {"train": 190, "valid": 10, "dropped": 0}, "steps": 48} | measured)
    model_card.main()
    card = (ADAPTER / "README.md").read_text(encoding="utf-8")
    assert (
        "- dpo\n" in card
        and "trained further with [DPO](" in card
        and "on 190 pairs" in card
        and "  beta: 0.1\n" in card
    )
    assert "SFT → aligned" in card and "The preference exam has 2 pairs" in card and "| Margin, nats per token" in card


def test_the_gate_names_what_preference_training_lost_and_a_share_of_pairs_that_is_too_low(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exam = {"sft": {"correct": 0.9}, "tuned": {"correct": 0.85}}
    details = {"exam": exam, "general": exam, "preferences": {"tuned": {"preferred": 0.8}}}
    write_json(EXAM_DETAILS, [details])
    names = ["drop of the exam in preference training", "drop of the general exam in preference training"]
    assert [(demand.name, demand.met) for demand in gate.align_drops(0.04)] == [(name, False) for name in names]
    assert all(demand.met for demand in gate.align_drops(0.05))
    [low], [enough] = gate.preferred(0.9), gate.preferred(0.8)
    assert (low.name, low.met, low.found) == ("minimum of preferred pairs", False, "0.800, at least 0.900")
    assert enough.met
