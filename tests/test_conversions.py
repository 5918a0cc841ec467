"""What each conversion from the tuned model to a GGUF file lost is measured, and a loss above the limit is named."""

import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Project, describe_base
from transformers import AutoModelForCausalLM

from pipeline.common.errors import UserError
from pipeline.common.outputs import write_jsonl
from pipeline.common.parameters.params_yaml import check
from pipeline.common.paths import ALIGNED, GGUF
from pipeline.evaluation.answers import prompt, prompt_and_reference
from pipeline.evaluation.conversions import NextToken, Variant, divergence, measured
from pipeline.evaluation.next_tokens import N_PROBS, in_llama_cpp, in_transformers
from pipeline.evaluation.questions import Question, read_questions
from pipeline.export.llama_cpp import run_script
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.base import located
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.llama_server import served
from pipeline.report.conversion_table import conversion_table
from pipeline.training.runs import save_adapter
from stages import convert_gguf, evaluate_gguf, merge_adapter
from stages.evaluate_gguf import require_ended, require_same_ends, require_same_model
from tools import gate

TINY = ROOT / "models/tiny-base"


def test_a_file_that_stops_at_other_tokens_than_its_base_is_refused(base_gguf: Path) -> None:
    question = Question("a", "Who leads it?", ["x"], "here")
    asked = prompt(load_tokenizer(TINY), question)
    with served(base_gguf, context=64, threads=1) as server:
        require_same_ends(server, asked, {2}, "model.gguf")
        with pytest.raises(UserError, match=r"model\.gguf: llama\.cpp does not stop at token 7"):
            require_same_ends(server, asked, {2, 7}, "model.gguf")
        reply = server.complete(asked, 32)
    require_ended([reply, reply | {"stop_type": "limit", "tokens": [7]}], [question] * 2, {2}, "model-f16.gguf")
    require_ended([reply], [question], {0}, "model-q4_0.gguf")  # a loss, and measured
    with pytest.raises(
        UserError, match=r"^model-f16\.gguf: llama\.cpp ends the answer to question a at token 2, .* \[0\]"
    ):
        require_ended([reply], [question], {0}, "model-f16.gguf")


def test_next_tokens_are_those_of_transformers_within_characters_too(base_gguf: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), load_tokenizer(TINY)
    asked = prompt_and_reference(tokenizer, Question("a", "Who leads it?", ["Ada 🙂 튐 耀"], "here"), {2})[:2]
    assert tokenizer.decode(asked[1][:3]).endswith("\ufffd")
    with served(base_gguf, context=128, threads=1) as server:
        shorter = prompt_and_reference(tokenizer, Question("b", "Who?", ["Ada"], "here"), {2})[:2]  # padded
        pairs = list(zip(in_llama_cpp(server, *asked), in_transformers(model, [shorter, asked], 2)[1], strict=True))
    assert [ours.token for ours, _ in pairs] == asked[1]
    for ours, theirs in pairs:
        assert ours.nll == pytest.approx(theirs.nll, abs=0.02) and len(ours.likeliest) == N_PROBS
        assert next(iter(ours.likeliest)) == next(iter(theirs.likeliest))
        assert divergence(ours.likeliest, theirs.likeliest) == pytest.approx(0, abs=1e-5)


def test_the_probabilities_of_an_own_answer_are_those_that_the_server_gives_when_asked(base_gguf: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    prompt_of, reference, _ = prompt_and_reference(tokenizer, Question("a", "Who leads it?", ["x"], "here"), {2})
    with served(base_gguf, context=128, threads=1) as server:
        reply = server.complete(prompt_of, 8, N_PROBS)
        own = reply["tokens"]
        assert own[-1] == 2 and len(server.likeliest_of(reply)) == len(own)
        for answer in (own, [*own[:1], *reference]):  # the same answer, and one that begins with the same token
            asked = in_llama_cpp(server, prompt_of, answer)
            for ours, theirs in zip(in_llama_cpp(server, prompt_of, answer, reply), asked, strict=True):
                assert ours.token == theirs.token
                assert divergence(ours.likeliest, theirs.likeliest) == pytest.approx(0, abs=1e-6)
        with_emoji = server.forced(prompt_of, tokenizer.encode("🙂", add_special_tokens=False)[0], N_PROBS)
        assert server.likeliest_of(with_emoji) == []  # an incomplete character


def test_a_file_whose_probabilities_are_no_numbers_is_refused(base_gguf: Path, tmp_path: Path) -> None:
    content, file = base_gguf.read_bytes(), tmp_path / "model.gguf"
    file.write_bytes(content[: len(content) // 2] + b"\xff" * (len(content) - len(content) // 2))
    refused = pytest.raises(UserError, match=r"model\.gguf: the model's probabilities are NaN")
    with served(file, context=64, threads=1) as server, refused:
        in_llama_cpp(server, [1], [5, 2])


def test_divergence_is_that_of_the_likeliest_tokens_and_all_others_as_one() -> None:
    given = {0: math.log(0.5), 1: math.log(0.25), 2: math.log(0.125)}
    assert divergence(given, given) == pytest.approx(0, abs=1e-6)
    results = {1: math.log(0.25), 0: math.log(0.25)}
    assert divergence(results, given) == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), abs=1e-6)
    assert divergence({2: -800.0, **given}, given) == divergence(given, given)
    assert divergence({0: math.log(0.5), 2: -800.0}, given) > 10  # exp(-800) is 0
    assert divergence({7: math.log(0.9)}, given) > 1  # which `given` holds for as likely as its last


def test_each_conversion_is_measured_from_the_variant_that_it_starts_at() -> None:
    def variant(answer: str, likely: float) -> Variant:
        """A model that answers so, and finds the reference's one token, 0, so likely."""
        rest = {1: math.log(1 - likely)}
        likeliest = {0: math.log(likely)} | rest if likely > 0.5 else rest | {0: math.log(likely)}
        return Variant([(answer, True)], [[NextToken(0, likeliest)]])

    variants = {
        "tuned": variant("yes", 0.9),
        "merged": variant("yes", 0.8),
        "model-f16.gguf": variant("yes", 0.8),
        "adapter-f16.gguf": variant("Yes", 0.8),
        "model-q4_0.gguf": variant("no", 0.2),
        "model-q8_0.gguf": variant("yes", 0.6),
    }
    results = {
        name: measured(name, variants, [Question("a", "?", ["yes"], "here")]) for name in variants if name != "tuned"
    }
    lost = {
        name: (of["conversion"]["correct"], round(math.exp(-of["conversion"]["loss"]), 3))
        for name, of in results.items()
    }
    assert lost == {
        "merged": (0, 0.889),  # .8 / .9
        "model-f16.gguf": (0, 1),
        "adapter-f16.gguf": (0, 0.889),  # of the tuned model too
        "model-q4_0.gguf": (-1, 0.25),
        "model-q8_0.gguf": (0, 0.75),
    }
    assert [of["agreement"] for of in results.values()] == [1, 1, 0, 0, 1]
    assert [of["top1"] for of in results.values()] == [1, 1, 1, 0, 1]
    assert NextToken(5, {0: -0.1, 1: -2.5}).nll == 2.5  # at least
    expected = 0.9 * math.log(0.9 / 0.2) + 0.1 * math.log(0.1 / 0.8)
    assert results["model-q4_0.gguf"]["kl"] == results["model-q4_0.gguf"]["kl_max"] == pytest.approx(expected, abs=1e-6)
    head, lines = conversion_table(results)
    assert len(lines) == 5 and {len(head)} == set(map(len, lines))
    assert lines[3][:2] == ["model-f16.gguf → model-q4_0.gguf", "\u2212100.0"]


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("merged", True),
        ("model-f16.gguf", True),
        ("model-bf16.gguf", True),
        ("adapter-f16.gguf", True),
        ("model-q4_0.gguf", False),
    ],
)
def test_a_variant_in_16_bits_that_is_not_the_tuned_model_is_named(name: str, refused: bool) -> None:
    metrics = {"merged": {"kl": 1e-6}} | {name: {"kl": 0.031}}
    require_same_model(metrics, 0.031)
    why = re.escape(f"{name}: the KL divergence of the next-token probabilities from the tuned model is 0.031 nats")
    with pytest.raises(UserError, match=why) if refused else nullcontext():
        require_same_model(metrics, 0.03)


def lost() -> list[str]:
    return [demand.name for demand in gate.conversions(allowed=0.1, max_kl=0.05) if not demand.met]


def test_files_that_load_and_answer_worse_are_named_with_their_conversion(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    known = read_questions(Path("data/general.jsonl"))[:12]  # what the base answers, with a small random adapter too
    asked = [{"id": q.id, "question": q.question, "answer": q.answers} for q in known]
    stopped = {"tuned": {"stopped": 1}}
    results = [
        {"id": q.id, "question": q.question, "reference": q.answers, "after": q.answers[0], **stopped} for q in known
    ]
    write_jsonl("data/questions.jsonl", asked)
    write_jsonl("metrics/answers.jsonl", results)
    project.set(gguf__quantize=["q8_0"])
    describe_base()
    make_adapter()
    merge_adapter.main()
    Path("data/train_merged.jsonl").touch()  # its hash goes into every file
    convert_gguf.main()
    evaluate_gguf.main()
    assert lost() == []

    lora, model, quantized = (GGUF / f"{name}.gguf" for name in ("adapter-f16", "model-f16", "model-q8_0"))
    config = ALIGNED / "adapter_config.json"
    right = config.read_text(encoding="utf-8")
    config.write_text(right.replace('"lora_alpha": 32', '"lora_alpha": 128'), encoding="utf-8")
    run_script("convert.py", "lora", ALIGNED, "--base", TINY, "--outtype", "f16", "--outfile", lora)
    config.write_text(right, encoding="utf-8")
    complete = model.read_bytes()
    model.write_bytes(complete[: len(complete) // 2] + bytes(len(complete) - len(complete) // 2))  # zeros for weights
    run_script("quantize.py", model, quantized, "q8_0")
    model.write_bytes(complete)
    with pytest.raises(UserError, match=r"^adapter-f16\.gguf: the KL divergence of .* evaluate\.max_kl"):
        evaluate_gguf.main()
    assert "| model-f16.gguf → model-q8_0.gguf |" in capsys.readouterr().out  # DVC puts the last run's metrics back
    assert lost() == [
        "drop in the conversion tuned → adapter-f16.gguf",
        "KL divergence of adapter-f16.gguf",
        "drop in the conversion model-f16.gguf → model-q8_0.gguf",
        "KL divergence of model-q8_0.gguf",
    ]


def make_adapter() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    torch.manual_seed(1)
    tuned = with_adapter(model, lora_config(check(Path("params.yaml")).lora, []))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data += 0.05 * torch.randn_like(weight)
    save_adapter(tuned, ALIGNED, *located())
