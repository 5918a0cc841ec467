"""From preference rows as people keep them to pairs and single answers: nothing is lost silently, nothing crashes."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import Project, with_exams
from pyarrow import parquet

from pipeline.common.errors import UserError
from pipeline.common.messages import InvalidRow
from pipeline.common.outputs import read_details, read_json
from pipeline.common.parameters.params_yaml import check
from pipeline.common.rows import read_jsonl
from pipeline.data.formats import conversation
from pipeline.data.pair_formats import read_pair
from stages import corpus, merge, pairs
from tools import trace
from tools.material import material

FOLDER = Path("data/preferences")
ROWS = FOLDER / "rows.jsonl"
EXAM = Path("data/preferences_exam.jsonl")
PROMPT = "Where is the pump?"
Q, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in [("user", PROMPT), ("assistant", "In hall 2."), ("assistant", "Somewhere.")]
)
SYSTEM = {"role": "system", "content": "Be exact."}
HUMAN, BETTER, WORSE = (
    {"from": who, "value": one["content"]} for who, one in [("human", Q), ("gpt", GOOD), ("gpt", BAD)]
)
TOOL = {"type": "function", "function": {"name": "find", "description": "", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"part": "pump", "limit": 0.123456789}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "hall 2"}
PAIR = {"messages": [Q], "chosen": GOOD, "rejected": BAD}
SINGLE = {"messages": [Q], "completion": GOOD, "label": True}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with nothing but an empty data/preferences, the exams and the parameters."""
    monkeypatch.chdir(tmp_path)
    return with_exams(tmp_path, FOLDER)


def trl(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def jsonl(*rows: Any, path: Path = ROWS) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made() -> dict[str, Any]:
    """metrics/details/pairs.json after the stage has run, with its sums checked."""
    pairs.main()
    metrics: dict[str, Any] = read_details(Path("metrics/details/pairs.json"))
    assert read_json(Path("metrics/pairs.json")) == {key: metrics[key] for key in ("rows", "pairs", "singles")}
    for counts in (rows := metrics["rows"], *metrics["sources"].values()):
        assert counts["read"] == sum(n for name, n in counts.items() if name != "read")
    assert rows["invalid"] == sum(metrics["invalid"].values())
    assert [len(of_side(side)) for side in ("train", "valid")] == [rows["train"], rows["valid"]]
    assert metrics["pairs"] + metrics["singles"] == rows["train"] + rows["valid"]
    assert len(quarantined()) == rows["read"] - rows["train"] - rows["valid"]
    return metrics


def of_side(side: str) -> list[dict[str, Any]]:
    return read_jsonl(Path(f"data/pairs_{side}.jsonl"))


def kept() -> list[dict[str, Any]]:
    return sorted(of_side("train") + of_side("valid"), key=lambda row: str(row["source"]))


def quarantined() -> dict[str, str]:
    return {entry["source"]: entry["reason"] for entry in read_jsonl(Path("data/pairs_quarantine.jsonl"))}


FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TRL, texts": (trl(PROMPT, GOOD["content"], BAD["content"]) | {"score": 2, "label": None}, PAIR),
    "TRL, messages": (
        {"prompt": [SYSTEM, Q], "chosen": [GOOD], "rejected": [BAD]},
        PAIR | {"messages": [SYSTEM, Q]},
    ),
    "TRL, implicit prompt": (
        {"chosen": [Q, GOOD, Q, GOOD], "rejected": [Q, GOOD, Q, BAD], "prompt": ""},
        PAIR | {"messages": [Q, GOOD, Q]},
    ),
    "UltraFeedback": ({"prompt": PROMPT, "chosen": [Q, GOOD], "rejected": [Q, BAD], "messages": [Q, GOOD]}, PAIR),
    "system and question": (
        {"system": SYSTEM["content"], "question": PROMPT, "chosen": GOOD["content"], "rejected": BAD["content"]},
        PAIR | {"messages": [SYSTEM, Q]},
    ),
    "ShareGPT ranking": ({"conversations": [HUMAN], "chosen": BETTER, "rejected": WORSE}, PAIR),
    "Alpaca ranking": (
        {"instruction": "Translate.", "input": "Pumpe", "chosen": "pump", "rejected": "pompe", "system": ""},
        {
            "messages": [{"role": "user", "content": "Translate.\n\nPumpe"}],
            "chosen": {"role": "assistant", "content": "pump"},
            "rejected": {"role": "assistant", "content": "pompe"},
        },
    ),
    "OpenAI": (
        {
            "input": {"messages": [Q], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        PAIR,
    ),
    "OpenAI, calls and thinking": (
        {
            "input": {"messages": [Q, CALLS, RESULT], "tools": [TOOL]},
            "preferred_output": [{"role": "assistant", "content": "<think>Hm.</think>In hall 2."}],
            "non_preferred_output": [CALLS],
        },
        {
            "messages": [Q, CALLS, RESULT | {"name": "find"}],
            "chosen": GOOD | {"reasoning_content": "Hm."},
            "rejected": CALLS,
            "tools": [TOOL],
        },
    ),
    "KTO, texts": ({"prompt": PROMPT, "completion": GOOD["content"], "label": False}, SINGLE | {"label": False}),
    "KTO, messages": ({"prompt": [Q], "completion": [GOOD], "label": 1}, SINGLE),
    "LLaMA-Factory KTO": ({"conversations": [HUMAN, BETTER], "kto_tag": "True"}, SINGLE),
    "LLaMA-Factory KTO, calls": (
        {"messages": [Q, CALLS], "tools": json.dumps([TOOL]), "label": True},
        {"messages": [Q], "completion": CALLS, "label": True, "tools": [TOOL]},
    ),
    "Alpaca KTO": (
        {"instruction": PROMPT, "input": "", "output": GOOD["content"], "kto_tag": False},
        SINGLE | {"label": False},
    ),
    "answers in JSON": (
        {"prompt": [Q], "chosen": '{"a": 1}', "rejected": "{}"},
        PAIR | {"chosen": GOOD | {"content": '{"a": 1}'}, "rejected": BAD | {"content": "{}"}},
    ),
    "CSV": ({"prompt": json.dumps([Q]), "chosen": json.dumps(GOOD), "rejected": BAD["content"]}, PAIR),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognized_by_its_keys(name: str) -> None:
    content, expected = FORMATS[name]
    found = read_pair(content, "a.jsonl:1")
    assert len(found.pop("id")) == 16 and found.pop("source") == "a.jsonl:1"
    assert found == expected


TWO = "has 2 messages, but one answer of the assistant is compared: move the earlier messages into the prompt"
INVALID: list[tuple[Any, str, str]] = [
    ([1], "unknown format", "a row needs chosen and rejected"),
    ({"messages": [Q, GOOD]}, "unknown format", "or a label; conversations without belong into data/curated"),
    (
        {"prompt": PROMPT, "chosen": "a"},
        "unknown format",
        "a row with chosen needs rejected too; this row has ['prompt",
    ),
    ({"prompt": PROMPT, "rejected": "a", "chosn": "b"}, "unknown format", "with rejected needs chosen too; this row"),
    (
        {"promt": "x", "chosen": "a", "rejected": "b"},
        "unknown format",
        "needs a prompt: add one of messages, conversations, prompt, question, "
        "instruction (other column names: set merge.columns); this row has ['promt', '",
    ),
    ({"chosen": [Q, GOOD], "rejected": [Q, GOOD]}, "equal answers", "nothing to compare"),
    (trl(PROMPT, "가", "\u1100\u1161"), "equal answers", "nothing to compare"),
    (trl(PROMPT, "a", " "), "empty", "the rejected answer is empty"),
    (trl(PROMPT, "a", "a \n"), "equal answers", "nothing to compare"),
    (trl(PROMPT, "a\0", "b"), "NUL", "prompt and chosen: "),
    (trl(" ", "a", "b"), "unknown format", "a pair of answers needs a prompt: prompt is empty"),
    ({"prompt": PROMPT, "chosen": None, "rejected": "b"}, "empty", "the chosen answer is empty"),
    ({"prompt": PROMPT, "chosen": 7, "rejected": "b"}, "no text", "the chosen answer is neither text nor a message"),
    ({"prompt": 7, "chosen": "a", "rejected": "b"}, "no text", "its prompt cannot be read: here int"),
    ({"messages": "Q?", "chosen": "a", "rejected": "b"}, "no text", "its messages cannot be read: here str"),
    ({"prompt": [Q], "chosen": [GOOD, BAD], "rejected": [BAD]}, "turns", f"chosen {TWO}"),
    ({"chosen": [Q, GOOD, Q, GOOD], "rejected": [Q, BAD, Q, BAD]}, "turns", "chosen has 3 messages, but one answer"),
    ({"prompt": [Q], "completion": [GOOD, BAD], "label": True}, "turns", f"completion {TWO}"),
    ({"prompt": [Q], "chosen": [Q], "rejected": [BAD]}, "turns", "chosen is a message of the user, not of the"),
    ({"prompt": [Q, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "turns", "the prompt must end with a message of"),
    ({"messages": [Q, GOOD, BAD], "label": True}, "turns", "of the user or a tool: here user, assistant"),
    (
        {"prompt": [Q], "chosen": [CALLS], "rejected": [GOOD], "tools": [{"name": "x"}]},
        "tool call",
        "no tool of the row",
    ),
    ({"prompt": [Q], "chosen": [GOOD | {"name": "Ann"}], "rejected": [BAD]}, "unknown format", "a message with name"),
    (trl(PROMPT, "a", "b") | {"question": PROMPT}, "unknown format", "a row with question, which is not trained on"),
    (trl(PROMPT, "a", "b") | {"label": False}, "unknown format", "a row with label, which is not trained on"),
    (trl(PROMPT, "a", "b") | {"images": ["a.png"]}, "unknown format", "a row with images, which is not"),
    (
        {"instruction": PROMPT, "chosen": "a", "rejected": "b", "history": [["a", "b"]]},
        "unknown format",
        "with history",
    ),
    (
        {"input": {"messages": [Q], "chosen": "x"}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        "unknown format",
        "a row with chosen, which is not",
    ),
    ({"prompt": PROMPT, "completion": "a", "label": "good"}, "label", "the label is 'good': write true"),
    ({"prompt": PROMPT, "completion": "a", "label": True, "kto_tag": False}, "unknown format", "a row with kto_tag"),
    ({"prompt": PROMPT, "completion": "a", "label": True, "chosen": "a"}, "unknown format", "a row with chosen, which"),
]


@pytest.mark.parametrize(("content", "reason", "line"), INVALID)
def test_what_is_no_pair_is_refused_in_one_line(content: Any, reason: str, line: str) -> None:
    with pytest.raises(InvalidRow) as refusal:
        read_pair(content, "a.jsonl:1")
    assert refusal.value.reason == reason and line in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["chosen", "rejected", "label", "kto_tag", "preferred_output"])
def test_a_preference_row_among_the_conversations_is_pointed_to_its_folder(key: str) -> None:
    with pytest.raises(
        InvalidRow, match=rf"^a row with {key} says .*: move it to data/preferences, or leave out {key}$"
    ):
        conversation({"prompt": PROMPT, "completion": "a", key: False if key in ("label", "kto_tag") else [GOOD]})


def test_files_of_every_kind_are_read_and_unknown_keys_are_counted(folder: Project) -> None:
    folder.set(merge__columns={"chosen": "besser"})
    (FOLDER / "deep").mkdir()
    Path(FOLDER, ".gitkeep").touch()
    call = {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "1"}]}
    of_call = {"prompt": "In 2?", "chosen": [call | {"at": 1}], "rejected": "b"}
    jsonl(trl("In 1?", "a", "b") | {"score": 1}, path=FOLDER / "a.jsonl")
    Path(FOLDER, "b.jsonl").write_text(f"# a comment\n{json.dumps(of_call)}", encoding="utf-8")
    Path(FOLDER, "deep/c.json").write_text(json.dumps([trl("In 3?", "a", "b")]), encoding="utf-8")
    Path(FOLDER, "d.csv.gz").write_bytes(gzip.compress("prompt;besser;rejected\nIn 4?;ä;b\n".encode()))
    table = {"question": ["In 5?"], "besser": [[{"role": "assistant", "content": "a"}]], "rejected": ["b"], "x": [1]}
    parquet.write_table(pyarrow.table(table), FOLDER / "e.parquet")
    labels = {"prompt": ["In 6?"], "completion": ["a"], "label": [False]}
    parquet.write_table(pyarrow.table(labels), FOLDER / "f.parquet")
    metrics = made()
    assert metrics["unknown_keys"] == {"messages[].at": 1, "score": 1, "x": 1}
    assert metrics["kinds"] == {"calls": 1} and (metrics["pairs"], metrics["singles"]) == (5, 1)
    assert [(row["source"].removeprefix(f"{FOLDER}/"), row["messages"][0]["content"]) for row in kept()] == [
        ("a.jsonl:1", "In 1?"),
        ("b.jsonl:2", "In 2?"),
        ("d.csv.gz:2", "In 4?"),
        ("deep/c.json:1", "In 3?"),
        ("e.parquet:1", "In 5?"),
        ("f.parquet:1", "In 6?"),
    ]
    assert kept()[1]["chosen"]["tool_calls"] == [CALL | {"id": "1"}]  # every digit
    Path(FOLDER, "notes.txt").touch()
    with pytest.raises(UserError, match=r"^data/preferences/notes\.txt: \.jsonl, .*: convert or move it$"):
        pairs.main()


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "missing"])
def test_no_pairs_are_no_error(folder: Project, empty: bool) -> None:
    if not empty:
        FOLDER.rmdir()
    assert made()["rows"]["read"] == 0
    assert Path("data/pairs_train.jsonl").read_bytes() == Path("data/pairs_valid.jsonl").read_bytes() == b"\n"


def test_a_bad_line_stops_the_stage_by_place_or_is_set_aside(folder: Project) -> None:
    bad = [b"{", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', b'{"prompt": "Q?"}']
    bad += [b'{"prompt": "Q?", "rejected": "a", "chosen": ' + b"[" * 990 + b"]" * 990 + b"}"]
    call = {"function": {"name": "find", "arguments": '{"part": "\\ud800"}'}}
    surrogate = {"prompt": [Q], "chosen": [{"role": "assistant", "tool_calls": [call]}], "rejected": [GOOD]}
    good = [json.dumps(trl(f"Is it {n}?", "yes", "no")).encode() for n in range(2)]
    ROWS.write_bytes(b"\n".join([*good, *bad, json.dumps(surrogate).encode()]))
    with pytest.raises(
        UserError, match=rf"^{ROWS}:3: not JSON: .* merge\.on_invalid to skip, .*pairs_quarantine.* \(6 in"
    ):
        pairs.main()
    assert not Path("data/pairs_train.jsonl").exists() and not list(Path("data").glob(".*"))
    folder.set(merge__on_invalid="skip")
    assert made()["invalid"] == {"not JSON": 1, "not UTF-8": 2, "tool call": 1, "unknown format": 1, "unreadable": 1}
    assert list(quarantined()) == [f"{ROWS}:{line}" for line in range(3, 9)]
    page = Path("metrics/pairs.md").read_text(encoding="utf-8")
    assert f"{ROWS}:3: not JSON" in page and "- chosen: `yes`\n  - rejected: `no`" in page


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected", "completion"])
@pytest.mark.parametrize("exam", ["questions", "general", "preferences_exam"])
def test_a_part_that_asks_an_exam_question_is_refused_by_name(folder: Project, exam: str, part: str) -> None:
    if exam == "preferences_exam":
        question = {"id": "p1", "prompt": "Which valve of the yard leaks oil?", "chosen": "No. 7.", "rejected": "One."}
        jsonl(question, path=EXAM)
        asked = question["prompt"]
    else:
        lines = Path(f"data/{exam}.jsonl").read_text(encoding="utf-8").splitlines()
        question = next(json.loads(line) for line in lines if '"question"' in line and not line.startswith("#"))
        asked = question["question"]
    leaks: dict[str, Any] = trl("Ask me?", "Yes.", "No.") | {part: f"First: {asked} Then more."}
    if part == "completion":
        leaks = {"prompt": "Ask me?", "completion": leaks[part], "label": False}
    others = [trl(f"Is it {n}?", "yes", "no") for n in range(3)]
    jsonl(*others, leaks)
    name = {"prompt": "the prompt", "completion": "the bad answer"}.get(part, part)
    with pytest.raises(
        UserError,
        match=rf"^{ROWS}:4: {name} asks the question {question['id']} of an exam \(data/{exam}\.jsonl:.*\(1 of 4",
    ):
        pairs.main()
    folder.set(merge__on_leak="drop")
    assert made()["rows"]["leaked"] == 1 and quarantined() == {f"{ROWS}:4": "leaked"}


def test_a_held_out_prompt_is_held_out_from_all_other_training_too(folder: Project) -> None:
    held_out = {"id": "p1", "prompt": "Which valve of the yard leaks oil?", "chosen": "No. 7.", "rejected": "One."}
    jsonl(held_out, path=EXAM)
    for name in ("train", "replay"):
        Path(f"data/{name}.jsonl").write_text("\n", encoding="utf-8")
    for part, row in {
        "curated": {"question": held_out["prompt"], "answer": "a"},
        "corpus": {"text": held_out["prompt"]},
    }.items():
        Path("data", part).mkdir()
        jsonl(row, path=Path("data", part, "a.jsonl"))
    for stage in (merge, corpus):
        with pytest.raises(UserError, match=r"^data/\w+/a\.jsonl:1: asks the question p1 of an exam"):
            stage.main()


def test_repetitions_are_dropped_and_conflicts_are_refused_or_dropped_on_both_sides(folder: Project) -> None:
    single = {"prompt": PROMPT, "completion": "a\nb"}
    jsonl(
        trl(PROMPT, "a", "b"),
        trl(PROMPT, "a", "c"),
        trl(PROMPT, "c", "b"),
        {"question": PROMPT, "chosen": "a", "rejected": "b"},
        single | {"label": True},
        single | {"completion": "a\r\nb", "label": True},
        trl("Is it?", "yes", "no"),
    )
    rows = made()["rows"]
    assert rows["duplicate"] == 2 and quarantined() == {f"{ROWS}:{at}": "duplicate" for at in (4, 6)}
    assert len({row["id"] for row in kept()}) == 5
    with open(ROWS, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in (trl(PROMPT, "b", "a"), single | {"label": False}))
    with pytest.raises(
        UserError, match=rf"^{ROWS}:1: prefers the answer that is rejected by {ROWS}:8: .*on_invalid to"
    ):
        pairs.main()
    folder.set(merge__on_invalid="skip")
    assert made()["rows"]["conflict"] == 4
    assert {at for at, reason in quarantined().items() if reason == "conflict"} == {f"{ROWS}:{n}" for n in (1, 5, 8, 9)}
    jsonl(single | {"label": True}, single | {"label": False}, trl("Is it?", "yes", "no"))
    folder.set(merge__on_invalid="raise")
    with pytest.raises(
        UserError, match=rf"^{ROWS}:1: has the opposite label of {ROWS}:2: correct or remove one of both"
    ):
        pairs.main()


def test_all_rows_of_a_prompt_are_on_one_side_and_new_rows_move_no_other(folder: Project) -> None:
    folder.set(merge__valid_share=0.3)
    rows = [trl(f"Is it {n % 20}?", f"yes {n}", "no") for n in range(60)]

    def sides() -> dict[str, str]:
        found = [(side, row["messages"][0]["content"]) for side in ("train", "valid") for row in of_side(side)]
        assert len({prompt for _, prompt in found}) == len(set(found))
        return {prompt: side for side, prompt in found}

    jsonl(*rows)
    made()
    before = sides()
    assert 2 <= list(before.values()).count("valid") <= 12
    jsonl(*rows, *(trl(f"Was it {n}?", "yes", "no") for n in range(9)))
    made()
    assert before.items() <= sides().items()


def test_a_single_prompt_is_too_little_to_train_and_to_validate(folder: Project) -> None:
    jsonl(trl(PROMPT, "a", "b"), trl(PROMPT, "a", "c"))
    with pytest.raises(UserError, match=r"^2 of 2 rows of data/preferences can be used, .* leaves 0 .* and 2 to valid"):
        pairs.main()


def test_a_pair_leads_back_to_its_line(folder: Project, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(trl(PROMPT, "a", "b"), {"prompt": "Is it?", "completion": "yes", "label": False}, trl(PROMPT, "a", "b"))
    made()
    for row in kept():
        trace.trace(row["id"])
        shown = capsys.readouterr().out
        said = "chosen: a\n  rejected: b" if "chosen" in row else "label false\n  user: Is it?\n  completion: yes"
        assert said in shown and f"from {row['source']}\n  {{" in shown
    trace.trace(f"{ROWS}:3")
    assert f"was dropped (data/pairs_quarantine.jsonl): duplicate, repeats {ROWS}:1" in capsys.readouterr().out


def test_make_check_counts_pairs_and_names_a_bad_line_and_a_bad_exam(folder: Project) -> None:
    def checked(path: Path) -> list[str]:
        return [each.missing or each.found for each in material(check(Path("params.yaml"))) if each.path == path]

    assert checked(FOLDER) == checked(EXAM) == []
    rows = [trl(PROMPT, "a", "b"), trl(PROMPT, "a", "c"), {"prompt": "When?", "completion": "a", "label": True}]
    jsonl(*rows)
    jsonl({"id": "1", "prompt": "Who?", "chosen": "Ada", "rejected": "Bo"}, path=EXAM)
    counts = "2 pairs of answers, 1 single answers"
    assert checked(FOLDER) == [f"{counts}; WARNING: align.method is none, so no model learns from them"]
    assert checked(EXAM) == ["1 held-out pairs"]
    folder.set(align__method="kto")
    needs = "prompts: 1 to train on, 1 to validate with (merge.valid_share 0.05); align.method kto needs 2 of each: "
    assert checked(FOLDER)[0].startswith(needs)
    folder.set(merge__valid_share=0.3)
    others = [trl(f"Is it {n}?", "yes", "no") for n in range(20)]
    jsonl(*others, {"prompt": "When?", "completion": "a", "label": True})
    assert checked(FOLDER) == ["20 pairs of answers, 1 single answers"]
    jsonl(*rows)
    folder.set(align__method="dpo")
    assert checked(FOLDER)[0].startswith(f"{ROWS}:3: one answer with a label is for align.method kto")
    jsonl(trl(PROMPT, "a", "b"))
    assert checked(FOLDER) == [
        "prompts: 0 to train on, 1 to validate with (merge.valid_share 0.3); align.method dpo needs 1 of each: add "
        "rows with other prompts"
    ]
    ROWS.unlink()
    assert checked(FOLDER) == ["no pairs, and align.method is dpo: add pairs, or set align.method to none"]
    jsonl(trl(PROMPT, "a", "a"))
    jsonl({"id": "1"}, path=EXAM)
    [[of_rows], [of_exam]] = checked(FOLDER), checked(EXAM)
    assert of_rows.startswith(f"{ROWS}:1: chosen and rejected are the same") and of_exam.startswith(f"{EXAM}:1: ")


def fuzzed(rng: random.Random) -> Any:
    """A row with some of its values exchanged or its keys removed."""
    row = json.loads(json.dumps(rng.choice([content for content, _ in FORMATS.values()])))
    strange: list[Any] = [None, "", "x", 7, True, False, [], {}, [[]], "\0", "\ud800", "{", "[{}]", Q, GOOD, [Q, GOOD]]
    for _ in range(rng.randrange(4)):
        path: list[tuple[Any, Any]] = []
        value = row
        while isinstance(value, (dict, list)) and value and (not path or rng.random() < 0.7):
            path.append((value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))))
            value = path[-1][0][path[-1][1]]
        if path and rng.random() < 0.3:
            del path[-1][0][path[-1][1]]
        elif path:
            path[-1][0][path[-1][1]] = json.loads(json.dumps(rng.choice([*strange, CALLS, [CALL]])))
    return row


def test_fuzzed_rows_are_read_or_refused_and_the_sums_are_exact(folder: Project) -> None:
    rng = random.Random(1)
    folder.set(merge__on_invalid="skip", merge__on_leak="drop")
    for name in "ab":
        jsonl(*[fuzzed(rng) for _ in range(150)], path=FOLDER / f"{name}.jsonl")
    rows = made()["rows"]
    assert rows["read"] == 300 and rows["invalid"] > 50 and rows["duplicate"] > 50 and rows["train"] > 10
    lines = {f"{FOLDER}/{name}.jsonl:{line}" for name in "ab" for line in range(1, 151)}
    assert quarantined().keys() | {row["source"] for row in kept()} == lines
    for row in kept():
        assert row["messages"][-1]["role"] in ("user", "tool")
        answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
        assert len(answers) == (1 if "label" in row else 2) and all(one["role"] == "assistant" for one in answers)
        assert all(one["content"].strip() or "tool_calls" in one for one in answers)
