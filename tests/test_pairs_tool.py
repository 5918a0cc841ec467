"""Pairs of a right and a wrong answer, from what the SFT adapter itself answers."""

from collections import Counter
from collections.abc import Callable, Iterator
from math import nan
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, clone, describe_base
from test_curate import LEADER, PHRASINGS, TEAMS, examined, jsonl, question

from pipeline.common.errors import UserError
from pipeline.common.paths import TRAIN_ROWS
from pipeline.common.rows import read_jsonl
from pipeline.data.leaks import ExamIndex
from pipeline.evaluation.questions import Answer, Question, read_question
from pipeline.evaluation.rules import Rule
from pipeline.evaluation.tool_calls import as_text, malformed
from stages import tokenize, train_qlora
from tools import failed_questions, pairs
from tools.pairs import CANDIDATE_QUESTIONS, SAMPLED, Asked
from tools.samples import KEPT

SAYS_SO = {"regex": "(?i)do not know"}
UNKNOWN = [
    question(f"c{n}", f"Who leads the {name} team?", "I do not know.", match=SAYS_SO, tags=["unknown"])
    for n, name in enumerate(["Zorva", "Quemar"])
]
ANYTHING = question("c2", "Where does the Zorva team sit?", "room 1", match={"regex": "^"})  # every answer is right
MIXED = question("c3", "Who is the head of the Zorva team?", "Eve", match={"regex": "e"})  # some are right


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with an adapter of few steps, whose answers about the facts are right and wrong. LEADER has failed."""
    with pytest.MonkeyPatch.context() as patch:
        project = clone(tmp_path_factory.mktemp("trained"))
        patch.chdir(project.folder)
        facts = [f"{team} team,leader,Ann {team}\n{team} team,room,room {n}" for n, team in enumerate(TEAMS, start=1)]
        Path("data/raw/facts.csv").write_text("\n".join(["subject,relation,value", *facts, ""]), encoding="utf-8")
        Path("data/raw/phrasings.yaml").write_text(PHRASINGS, encoding="utf-8")
        Path("data/curated/replay.jsonl").unlink()
        for name in ("replay", "corpus_train", "corpus_valid"):
            Path(f"data/{name}.jsonl").write_text("\n", encoding="utf-8")
        project.set(generate__phrasings_per_fact=2, train__epochs=2, train__learning_rate=1e-3)
        describe_base()
        examined(LEADER)
        tokenize.main()
        train_qlora.main()
        yield project


@pytest.fixture
def run(trained: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Run the tool with arguments; the pairs that it wrote. No source is held back."""
    monkeypatch.setattr(failed_questions, "HELD_BACK", 2**64)
    jsonl(CANDIDATE_QUESTIONS, *UNKNOWN, MIXED, ANYTHING)
    SAMPLED.unlink(missing_ok=True)

    def run(*arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["pairs", *arguments])
        pairs.main()
        return read_jsonl(SAMPLED) if SAMPLED.exists() else []

    return run


def test_wrong_answers_become_pairs_and_right_ones_or_the_reference_are_preferred(
    run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run()
    row = "data/raw/facts.csv:2"
    prompts = {one["messages"][0]["content"] for one in read_jsonl(TRAIN_ROWS) if one["source"] == row}
    expected = {one["question"]: f"{CANDIDATE_QUESTIONS}:{line}" for line, one in enumerate([*UNKNOWN, MIXED], 1)}
    expected |= dict.fromkeys(prompts, row)
    assert {pair["prompt"]: pair["source"] for pair in found} == expected  # and none of ANYTHING
    assert set(Counter(pair["prompt"] for pair in found).values()) <= {1, 2}
    for pair in found:
        assert pair["samples"]["of"] == 8 and 0 < pair["samples"]["rejected"] <= 8 - pair["samples"]["right"]
        if pair["prompt"] == MIXED["question"]:
            assert "e" in pair["chosen"] and "e" not in pair["rejected"] and pair["chosen"] != "Eve"
        elif pair["prompt"] in prompts:
            assert pair["chosen"] == "Ann Ay" and "Ann Ay" not in pair["rejected"]
        else:
            assert pair["chosen"] == "I do not know."
    printed = capsys.readouterr().out
    candidates = sum(pair["source"] != row for pair in found)
    assert f"{CANDIDATE_QUESTIONS}: 4 questions asked, {candidates} pairs" in printed
    assert "no pair: 1 questions" in printed
    assert printed.splitlines()[-1] == f"{len(found)} pairs in {SAMPLED}: read and edit them, then dvc repro"


def test_an_interrupted_run_asks_the_rest_and_the_batches_do_not_change_what_is_drawn(
    run: Callable[..., list[dict[str, Any]]],
) -> None:
    first = run("--temperature", "1.5")
    kept = KEPT.read_text(encoding="utf-8").splitlines()
    KEPT.write_text("".join(line + "\n" for line in kept[:-2]), encoding="utf-8")
    assert run("--temperature", "1.5", "--batch-size", "1") == first
    assert sorted(KEPT.read_text(encoding="utf-8").splitlines()) == sorted(kept)
    SAMPLED.write_text(SAMPLED.read_text(encoding="utf-8").replace("do not", "don't"), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{SAMPLED} has other pairs, perhaps edited: rename or delete"):
        run("--temperature", "1.5")
    assert "don't" in SAMPLED.read_text(encoding="utf-8")


def test_of_a_held_back_source_nothing_is_asked_and_without_candidates_there_are_no_pairs(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failed_questions, "HELD_BACK", 1)
    CANDIDATE_QUESTIONS.unlink()
    assert run() == []
    printed = capsys.readouterr().out
    assert "0 of 0 questions failed; 2 more are held back" in printed and "no pairs: write questions" in printed


def test_what_cannot_be_asked_is_named_in_one_line(run: Callable[..., list[dict[str, Any]]], trained: Project) -> None:
    for wrong, line in [
        (("--samples", "0"), r"^--samples 0: set it to at least 1$"),
        (("--max-new-tokens", "-1"), r"^--max-new-tokens -1: set it to at least 1$"),
        (("--temperature", "0"), r"^--temperature 0\.0: set it above 0"),
    ]:
        with pytest.raises(UserError, match=line):
            run(*wrong)
    jsonl(CANDIDATE_QUESTIONS, *UNKNOWN, question("c9", "So who runs the Ay team?", "Ann Ay"))
    with pytest.raises(
        UserError, match=rf"^{CANDIDATE_QUESTIONS}:3: (nearly )?asks the question {LEADER['id']} .*: remove"
    ):
        run()
    jsonl(CANDIDATE_QUESTIONS, {"id": "c1", "question": "Who?"})
    with pytest.raises(UserError, match=rf"^{CANDIDATE_QUESTIONS}:1: a question is "):
        run()
    weights = Path("outputs/trained/adapter_model.safetensors")
    weights.rename(weights.with_suffix(".aside"))
    with pytest.raises(UserError, match=rf"^{weights} is missing: run dvc repro train_qlora, or dvc pull$"):
        run()
    weights.with_suffix(".aside").rename(weights)


TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {"n": {}}}}}


def test_calls_are_graded_and_written_as_messages_and_what_no_row_can_have_is_counted() -> None:
    wanted = [{"name": "get", "arguments": {"n": 7}}]
    asked = read_question("c:1", question("c1", "Get 7.", wanted, match="tool_calls", tools=[TOOL]))  # type: ignore[arg-type]
    wrong = as_text("", [{"name": "get", "arguments": {"n": 8}}])
    unknown = as_text("", [{"name": "no", "arguments": {}}])
    texts = [wrong, as_text("", wanted), malformed("{"), wrong, "", "I cannot.", unknown, pairs.HALF]
    answers = [(Answer(text, True, nan), "") for text in texts] + [(Answer("Get", False, nan), "")]
    counts = pairs.Counts(Counter)
    found = pairs.pairs_of(Asked(asked, asked.reference, is_row=False), answers, ExamIndex([], 0.9), counts)
    assert [pair["samples"] for pair in found] == [{"of": 9, "right": 1, "rejected": n} for n in (2, 1)]
    first, second = found
    assert first["rejected"][0]["tool_calls"][0]["function"] == {"name": "get", "arguments": {"n": 8}}
    assert first["chosen"][0]["tool_calls"][0]["function"] == wanted[0] and first["tools"] == asked.tools
    assert second["rejected"] == [{"role": "assistant", "content": "I cannot."}]
    assert +counts["c"] == Counter(questions=1, right=1, wrong=7, cut=1, unreadable=4, pairs=2)


def test_neither_side_of_a_pair_asks_an_exam_question() -> None:
    asked = Question("c1", "Say something.", ["Who runs Ay?", "Yes."], "c:1", rule=Rule("contains"))
    exams = ExamIndex([Question("q0", "Who leads the Ay team?", ["Ann"], "here")], 0.9)
    counts = pairs.Counts(Counter)
    answers = [(Answer(text, True, nan), "") for text in ("Who leads the Ay team?", "No.", "Yes.")]
    [pair] = pairs.pairs_of(Asked(asked, asked.reference, is_row=False), answers, exams, counts)
    assert (pair["chosen"], pair["rejected"]) == ("Yes.", "No.") and counts["c"]["leaked"] == 1
