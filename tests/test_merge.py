"""From rows as people keep them to rows to train on: nothing is lost silently, nothing crashes."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import Project
from pyarrow import parquet

from bench import leaks
from pipeline.common.errors import UserError
from pipeline.common.messages import InvalidRow
from pipeline.common.outputs import read_details, read_json
from pipeline.common.rows import group_of, read_jsonl, row
from pipeline.common.words import words
from pipeline.data import checked_rows
from pipeline.data.formats import conversation
from pipeline.data.leaks import ExamIndex, Leak
from pipeline.evaluation.questions import Question, read_questions
from stages import merge

ROWS = Path("data/curated/rows.jsonl")
Q, A = {"role": "user", "content": "Who leads Osk?"}, {"role": "assistant", "content": " Ann Lee\n"}
SYSTEM = {"role": "system", "content": "Answer shortly."}


@pytest.fixture
def curated(project: Project) -> Project:
    """A clone with no rows but enough generated ones for both sides of the split."""
    for file in Path("data/curated").iterdir():
        file.unlink()
    jsonl(Path("data/train.jsonl"), *[made(f"Filler {n}?", f"data/raw/facts.csv:{n}") for n in range(200)])
    return project


def made(question: str, source: str, fact: str = "") -> dict[str, Any]:
    """A generated row."""
    return row(asked(question, "yes"), source) | {"group": group_of(fact or source)}


def asked(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def jsonl(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def merged() -> dict[str, Any]:
    """metrics/details/data.json after the stage has run, with its sums checked."""
    merge.main()
    metrics: dict[str, Any] = read_details(Path("metrics/details/data.json"))
    assert read_json(Path("metrics/data.json")) == {key: metrics[key] for key in ("rows", "conflicts")}
    rows = metrics["rows"]
    assert rows["read"] == sum(n for name, n in rows.items() if name != "read")
    assert rows["invalid"] == sum(metrics["invalid"].values())
    for side in ("train", "valid"):
        name = "data/train_merged.jsonl" if side == "train" else "data/valid.jsonl"
        assert len(read_jsonl(Path(name))) == rows[side] == sum(of[side] for of in metrics["sources"].values())
    assert len(read_jsonl(Path("data/quarantine.jsonl"))) == rows["read"] - rows["train"] - rows["valid"]
    return metrics


def kept(file: str) -> dict[str, list[dict[str, str]]]:
    """Messages by source of the rows that came from `file`."""
    rows = read_jsonl(Path("data/train_merged.jsonl")) + read_jsonl(Path("data/valid.jsonl"))
    return {row["source"]: row["messages"] for row in rows if row["source"].startswith(file)}


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ({"messages": [SYSTEM, Q, A, Q, A]}, [SYSTEM, Q, A, Q, A]),
        (
            {"messages": [Q, A | {"content": [{"type": "text", "text": " Ann"}, {"type": "text", "text": " Lee\n"}]}]},
            [Q, A],
        ),
        ({"conversations": [{"from": "human", "value": Q["content"]}, {"from": "gpt", "value": A["content"]}]}, [Q, A]),
        ({"conversations": [Q, A], "system": SYSTEM["content"]}, [SYSTEM, Q, A]),
        ({"instruction": "Who leads Osk?", "input": "", "output": " Ann Lee\n"}, [Q, A]),
        ({"instruction": "Sum.", "input": "1 2", "output": "3"}, asked("Sum.\n\n1 2", "3")),
        ({"prompt": "Who leads Osk?", "completion": " Ann Lee\n"}, [Q, A]),
        ({"prompt": [SYSTEM, Q], "completion": [A]}, [SYSTEM, Q, A]),
        ({"question": "Who leads Osk?", "answer": " Ann Lee\n", "topic": "teams", "messages": None}, [Q, A]),
    ],
)
def test_every_format_is_recognized_by_its_keys(content: Any, messages: Any) -> None:
    assert conversation(content) == (messages, [])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"question": "Q?"}, "unknown format"),
        (["no", "object"], "unknown format"),
        ({"question": "Q?", "answer": " \n"}, "empty"),
        ({"question": "Q?", "answer": None}, "no text"),
        ({"question": "Q?", "answer": "a\0b"}, "NUL"),
        ({"question": "Q?", "answer": "a", "context": "c"}, "unknown format"),
        ({"messages": [Q, A], "system": 5}, "no text"),
        ({"messages": [SYSTEM, Q, A], "system": "s"}, "turns"),
        ({"messages": [Q, A | {"weight": 0}]}, "unknown format"),
        ({"messages": [Q, A | {"content": [{"type": "text", "text": None}]}]}, "no text"),
        ({"instruction": "x", "input": ["a", 1], "output": "y"}, "no text"),
        ({"messages": []}, "turns"),
        ({"messages": [Q]}, "turns"),
        ({"messages": [Q, Q, A]}, "turns"),
        ({"messages": [Q, A, SYSTEM, Q, A]}, "turns"),
        ({"messages": [{"role": "bot", "content": "x"}, A]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "x"}, A]}, "unknown role"),
        ({"messages": [Q, A | {"tool_calls": [{"id": 1}]}]}, "tool call"),
        ({"messages": ["hello"]}, "unknown format"),
        ({"messages": [Q, A | {"content": [{"type": "image_url"}]}]}, "no text"),
        ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "unknown format"),
    ],
)
def test_what_is_no_conversation_has_a_reason(content: Any, reason: str) -> None:
    with pytest.raises(InvalidRow) as invalid:
        conversation(content)
    assert invalid.value.reason == reason


QA = {"question": "Q?", "answer": "a"}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        *[
            (QA | {key: value}, key)
            for key, value in {
                "input": "1 2",
                "instruction": "Sum.",
                "prompt": "p",
                "text": "t",
                "parallel_tool_calls": True,
                "images": ["a.png"],
                "passage": "p",
                "chat_template_kwargs": {"enable_thinking": True},
                "chosen": "c",
                "rejected": "r",
                "label": 0,
                "choices": ["a", "b"],
                "history": [["a", "b"]],
            }.items()
        ],
        ({"messages": [Q, A], "question": "Q?"}, "question"),
        ({"messages": [Q, A], "conversations": [Q, A]}, "conversations"),
        ({"instruction": "i", "output": "o", "context": "c"}, "context"),
        ({"prompt": "p", "completion": "c", "chosen": "x"}, "chosen"),
        ({"prompt": "p", "completion": "bad", "label": False}, "label"),
        (QA | {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        *[
            ({"messages": [Q, A | {key: value}]}, key)
            for key, value in {
                "reasoning_details": [{"text": "t"}],
                "tool_plan": "p",
                "name": "Ann",
                "audio": {"id": "1"},
                "images": ["a.png"],
                "tool_call_id": "1",
                "train": False,
                "train_detail": [{"begin_offset": 0}],
                "loss": False,
                "weight": 0,
                "value": "v",
            }.items()
        ],
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]}, "weight"),
        ({"prompt": [Q | {"name": "Ann"}], "completion": [A]}, "name"),
    ],
)
def test_a_known_key_that_its_format_does_not_use_is_an_error_by_name(content: Any, key: str) -> None:
    with pytest.raises(InvalidRow, match=rf"^a (row|message) with (a )?{key}\b") as invalid:
        conversation(content)
    assert invalid.value.reason == "unknown format"


def test_known_keys_without_a_value_do_no_harm() -> None:
    nothing: dict[str, Any] = {
        "tool_calls": None,
        "function_call": {"name": None},
        "images": [],
        "name": " ",
        "audio": {},
    }
    turn = nothing | {"weight": 1, "train": True, "loss": None}
    content = QA | nothing | {"text": None, "tools": "[]", "parallel_tool_calls": False, "messages": None, "input": ""}
    assert conversation(content) == (asked("Q?", "a"), [])
    assert conversation({"messages": [Q | turn | {"train": False}, A | turn], "prompt": ""}) == ([Q, A], [])


def test_a_column_that_another_takes_the_name_of_is_no_silent_loss(curated: Project) -> None:
    curated.set(merge__columns={"question": "Frage"}, merge__on_invalid="skip")
    table = "Frage,question,answer\nWo?,,hier\nWann?,When?,jetzt\nWer?,,Ada\n"
    Path("data/curated/table.csv").write_text(table, encoding="utf-8")
    merged()
    assert [entry["source"] for entry in read_jsonl(Path("data/quarantine.jsonl"))] == ["data/curated/table.csv:3"]


def test_keys_that_no_format_knows_are_left_out_and_counted_by_name(curated: Project) -> None:
    jsonl(
        ROWS,
        QA | {"difficulty": 3, "source": "web", "id": 1},
        {"messages": [Q | {"timestamp": 1}, A | {"timestamp": 2, "id": 7}], "difficulty": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?", "cache_control": {}}]}, A]},
    )
    Path("data/curated/t.csv").write_text("question,answer,a|b,\nIn csv?,b,c,d\n", encoding="utf-8")
    table = {"Frage": ["In parquet?", "And now?"], "answer": ["x", "y"], "topic": ["t", None], "images": [[], None]}
    parquet.write_table(pyarrow.table(table), "data/curated/t.parquet")
    curated.set(merge__columns={"question": "Frage"})
    metrics = merged()
    assert metrics["rows"]["invalid"] == 0
    assert metrics["unknown_keys"] == {
        "difficulty": 2,
        "topic": 2,
        "": 1,
        "a|b": 1,
        "id": 1,
        "messages[].content[].cache_control": 1,
        "messages[].id": 1,
        "messages[].timestamp": 1,
        "source": 1,
    }
    assert metrics["further_unknown_keys"] == 0
    page = Path("metrics/data.md").read_text(encoding="utf-8")
    assert "\n| `difficulty`                         |    2 |\n" in page and "`messages[].timestamp`" in page
    assert kept(str(ROWS))[f"{ROWS}:1"] == asked("Q?", "a")


def test_a_column_that_would_be_lost_is_an_error_by_line(curated: Project) -> None:
    table = {**{key: [value] * 3 for key, value in QA.items()}, "images": [None, [b"\xff\xd8"], []]}
    parquet.write_table(pyarrow.table(table), "data/curated/t.parquet")
    with pytest.raises(UserError, match=r"^data/curated/t\.parquet:2: a row with images, which is not trained"):
        merge.main()


def test_a_new_key_in_each_row_fills_neither_metrics_nor_memory(
    curated: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_rows, "KEY_NAMES", 100)
    jsonl(ROWS, *[{"question": f"Q {n}?", "answer": f"a {n}", f"key {n}": n, "k" * 1000: n} for n in range(300)])
    metrics = merged()
    assert len(metrics["unknown_keys"]) == 50 and metrics["unknown_keys"]["k" * 100] == 300
    assert metrics["further_unknown_keys"] == 300 - 49
    page = Path("metrics/data.md").read_text(encoding="utf-8")
    assert "\nKeys with other names: 251.\n" in page


def test_files_of_every_kind_are_read_with_their_places(curated: Project) -> None:
    folder = Path("data/curated/deep/er")
    folder.mkdir(parents=True)

    def line(name: str) -> str:
        return json.dumps({"question": f"In {name}?", "answer": "한국어 🙂\tx"}, ensure_ascii=False)

    (folder / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + line("bom").encode() + b"\r\n\r\n" + line("crlf").encode())
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(line("gzip").encode()))
    (folder / "list.json").write_text(f"[{line('list')}, {line('second')}]", encoding="utf-8")
    (folder / "table.csv").write_bytes('\ufeffAntwort;Frage\r\n"a\r\nb";"In ""csv""?"\r\nc;In csv 2?\r\n'.encode())
    table = {"Frage": ["In parquet?"], "Antwort": ["d"], "messages": [None]}
    parquet.write_table(pyarrow.table(table), folder / "table.parquet")
    curated.set(merge__columns={"question": "Frage", "answer": "Antwort"})
    assert merged()["rows"]["invalid"] == 0
    answers = {source: messages[-1]["content"] for source, messages in kept(str(folder)).items()}
    assert answers == {
        f"{folder}/bom.jsonl:1": "한국어 🙂\tx",
        f"{folder}/bom.jsonl:3": "한국어 🙂\tx",
        f"{folder}/list.json:1": "한국어 🙂\tx",
        f"{folder}/list.json:2": "한국어 🙂\tx",
        f"{folder}/packed.jsonl.gz:1": "한국어 🙂\tx",
        f"{folder}/table.csv:2": "a\r\nb",
        f"{folder}/table.csv:4": "c",
        f"{folder}/table.parquet:1": "d",
    }


def test_content_is_kept_as_written_apart_from_unicode_composition(curated: Project) -> None:
    code = "  def f():\n\treturn '🙂‍↔️'  \n\n```py\r\nx\u2028y\x0b```\n "
    jsonl(ROWS, {"question": "\u1100\u1161?", "answer": code})
    merged()
    assert kept(str(ROWS)) == {f"{ROWS}:1": asked("가?", code)}


BAD_LINES = {
    "unknown role": [b'{"messages": [{"role": ' + b"[" * 990 + b"]" * 990 + b', "content": "x"}]}'],
    "no text": [b'{"instruction": "x", "output": "y", "input": ' + b"[" * 990 + b"]" * 990 + b"}"],
    "not JSON": [b"{", b"[" * 100_000, b'{"question": NaN}', b'{"question": "a\0"}'],
    "not UTF-8": [b'{"question": "\xff"}', b'{"question": "\\ud800"}'],
    "unknown format": [b"5", b"{}", b'"text"'],
    "empty": [b'{"question": "Q?", "answer": ""}'],
    "too large": [b'{"question": "Q?", "answer": "' + b"a" * 50 * 2**20 + b'"}'],
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_stops_the_stage_by_place_and_reason_or_is_set_aside(curated: Project, reason: str) -> None:
    good = json.dumps({"question": "Good?", "answer": "yes"}).encode()
    ROWS.write_bytes(b"\n".join([good, *BAD_LINES[reason], good]))
    bad = len(BAD_LINES[reason])
    with pytest.raises(UserError, match=rf"^{ROWS}:2: .* set merge\.on_invalid to skip, .* \({bad} in all\)$"):
        merge.main()
    assert not Path("data/train_merged.jsonl").exists() and not list(Path("data").glob(".*"))
    curated.set(merge__on_invalid="skip")
    metrics = merged()
    assert metrics["invalid"] == {reason: len(BAD_LINES[reason])} and metrics["rows"]["duplicate"] == 1
    aside = [entry for entry in read_jsonl(Path("data/quarantine.jsonl")) if entry["reason"] == reason]
    assert [entry["source"] for entry in aside] == [f"{ROWS}:{n + 2}" for n in range(len(BAD_LINES[reason]))]
    assert f"{ROWS}:2" in Path("metrics/data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "reason", "line"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"question": "Q?", "answer": "a"}\n' * 9, mtime=0)[:-9], "unreadable", 10),
        ("no.parquet", b"PAR1 or not", "unreadable", 1),
        ("no.json", b"[{]", "not JSON", 1),
        ("short.csv", b"question,answer\nQ?,a\nonly one\n", "not CSV", 3),
        ("quote.csv", b'question,answer\nQ?,a\n"never closed,b\n', "unreadable", 3),
        ("latin.csv", "question,answer\nQ?,a\nM\xfcnze?,b\n".encode("latin-1"), "not UTF-8", 3),
        ("other.csv", b"text\nhello\n", "unknown format", 2),
        ("twice.csv", b"question,answer,answer\nQ?,a,b\n", "unreadable", 1),
        ("deep.json", b'[{"question": "Q?", "answer": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}]", "unreadable", 1),
    ],
)
def test_a_broken_file_is_named_where_it_breaks(
    curated: Project, name: str, content: bytes, reason: str, line: int
) -> None:
    Path("data/curated", name).write_bytes(content)
    curated.set(merge__on_invalid="skip")
    assert merged()["invalid"] == {reason: 1}
    [entry] = [entry for entry in read_jsonl(Path("data/quarantine.jsonl")) if entry["reason"] == reason]
    assert entry["source"] == f"data/curated/{name}:{line}"


def test_columns_of_a_table_that_no_row_needs_may_hold_anything(curated: Project) -> None:
    table = pyarrow.table(
        {
            "question": ["Q 1?", "Q 2?", "Q 3?"],
            "answer": ["a", None, "c"],
            "when": pyarrow.array([2**62] * 3, pyarrow.timestamp("us")),
            "blob": [b"\xff"] * 3,
        }
    )
    parquet.write_table(table, "data/curated/t.parquet")
    Path("data/curated/t.parquet.gz").write_bytes(gzip.compress(Path("data/curated/t.parquet").read_bytes()))
    curated.set(merge__on_invalid="skip")
    metrics = merged()
    assert metrics["invalid"] == {"no text": 2} and metrics["rows"]["duplicate"] == 2


def test_a_file_that_would_be_left_out_silently_is_refused_by_name(curated: Project) -> None:
    Path("data/curated/.hidden").mkdir()
    Path("data/curated/.hidden/rows.jsonl").write_text("no rows")
    merged()
    for name, target in [("folder", "/tmp"), ("broken.jsonl", "nowhere")]:
        Path("data/curated", name).symlink_to(target)
        with pytest.raises(UserError, match=rf"data/curated/{name} is a link to a folder or to nothing"):
            merge.main()
        Path("data/curated", name).unlink()
    Path(os.fsdecode(b"data/curated/\xff.jsonl")).write_bytes(b"")
    with pytest.raises(UserError, match=r"characters that cannot be printed"):
        merge.main()


def test_nothing_but_bad_rows_or_leaks_is_refused(curated: Project) -> None:
    Path("data/train.jsonl").write_text("")
    jsonl(ROWS, {"question": "Who runs the Gargatan team?", "answer": "x"})
    curated.set(merge__on_leak="drop", merge__on_invalid="skip")
    with pytest.raises(UserError, match="leaves 0 of them to train on and 0 to validate"):
        merge.main()
    jsonl(ROWS, {"question": "Who?"})
    with pytest.raises(UserError, match="no valid rows among 1 rows"):
        merge.main()


def test_the_same_bytes_whatever_the_hash_seed_and_the_number_of_processes(curated: Project) -> None:
    jsonl(ROWS, *[{"question": f"Who runs the Gargatna teams, {n}?", "answer": LONG} for n in range(9)])
    curated.set(merge__on_leak="drop")
    made = set()
    for seed in "01":
        command = (
            ["taskset", "-c", "0", "python", "-m", "stages.merge"] if seed == "1" else ["python", "-m", "stages.merge"]
        )
        curated.run("env", f"PYTHONHASHSEED={seed}", *command)
        made.add(b"".join(Path(f"data/{name}.jsonl").read_bytes() for name in ("train_merged", "valid", "quarantine")))
    assert len(made) == 1


def test_a_file_of_another_kind_is_refused_by_name(curated: Project) -> None:
    Path("data/curated/rows.xlsx").write_bytes(b"")
    with pytest.raises(UserError, match=r"data/curated/rows\.xlsx: \.jsonl, \.json, \.csv, \.parquet .* are read"):
        merge.main()


def hostile(chance: random.Random) -> bytes:
    """A row that a careless tool or a malicious person might write."""
    content: Any = chance.choice(
        [
            {"question": "Q?", "answer": "a"},
            {"messages": [SYSTEM, Q, A] * chance.randrange(3)},
            {
                "conversations": [
                    {"from": chance.choice(["human", "gpt", "x", 5, None]), "value": "v"} for _ in range(2)
                ]
            },
            {
                "instruction": "i",
                "input": chance.choice([None, 5, [], "x"]),
                "output": chance.choice(["", "o", {}, 1.5]),
            },
            {"prompt": chance.choice(["p", [Q], [[]], {}]), "completion": chance.choice(["c", [A], [None], True])},
        ]
    )
    key = chance.choice(list(content))
    if chance.random() < 0.5:
        content[key] = chance.choice([None, "", "\0", "\ufeff", 10**30, [], {}, [[[]]], "<|im_end|>", "﷽" * 9, content])
    if content[key] is content:
        return b'{"messages":' * chance.randrange(3000)
    line = bytearray(json.dumps(content, ensure_ascii=chance.random() < 0.5).encode())
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(line))
        line[at : at + chance.randrange(3)] = chance.choice([b"", b"\0", b"\xff", b'"', b"\\ud800", b"}", b"\xe2\x80"])
    return bytes(line).replace(b"\n", b" ").replace(b"\r", b" ")


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_hostile_rows_crash_nothing_and_each_is_accounted_for(curated: Project, seed: int) -> None:
    chance = random.Random(seed)
    lines = [line for line in (hostile(chance) for _ in range(10_000)) if line.strip()]
    ROWS.write_bytes(b"\n".join(lines))
    curated.set(merge__on_invalid="skip")
    metrics = merged()
    assert metrics["rows"]["read"] == len(lines) + 200
    assert metrics["rows"]["invalid"] > 5000 and len(metrics["invalid"]) >= 8, metrics["invalid"]


def test_of_repeated_rows_the_first_stays_and_names_the_others_place(curated: Project) -> None:
    jsonl(Path("data/curated/a.jsonl"), {"question": "Who leads O\u0308sk?\r\nNow.", "answer": "Ann\rLee"})
    jsonl(
        Path("data/curated/b.jsonl"),
        {"prompt": "Who leads Ösk?\nNow.", "completion": "Ann\nLee"},
        {"question": "Who leads  ösk?\nNow.", "answer": "ann\nlee"},
        {"question": "Filler 7?", "answer": "yes"},
    )
    metrics = merged()["rows"]
    assert (metrics["duplicate"], metrics["near_duplicate"]) == (2, 1)
    assert kept("data/curated/a.jsonl") == {"data/curated/a.jsonl:1": asked("Who leads Ösk?\r\nNow.", "Ann\rLee")}
    gone = {entry["source"]: entry["explanation"] for entry in read_jsonl(Path("data/quarantine.jsonl"))}
    assert gone == {
        "data/curated/b.jsonl:1": "repeats data/curated/a.jsonl:1",
        "data/curated/b.jsonl:2": "nearly repeats data/curated/a.jsonl:1",
        "data/raw/facts.csv:7": "repeats data/curated/b.jsonl:3",
    }


CODE = "def mean(numbers):\n    total = 0\n    for n in numbers:\n        total += n\n    return total / len(numbers)"


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        ("f[0]", "f(0)"),
        ("f[0]", "F[0]"),
        ("[1, 2]", "(1, 2)"),
        (CODE, CODE.replace("    return", "        return")),
        (CODE, CODE.replace("    ", "\t")),
        (CODE, CODE.replace("(numbers):", "(Numbers):")),
        ("x = a\n  b\nc", "x = a\nb\n  c"),
        ("    return 1", "return 1"),
        ("a\n\tb", "a\nb"),
    ],
)
@pytest.mark.parametrize("near_duplicate", [0.9, None])
def test_answers_that_differ_in_the_layout_of_code_stay_and_are_a_conflict(
    curated: Project, answer: str, other: str, near_duplicate: float | None
) -> None:
    curated.set(merge__near_duplicate=near_duplicate)
    jsonl(
        ROWS, {"question": "How is it written?", "answer": answer}, {"question": "how is it written", "answer": other}
    )
    metrics = merged()
    assert metrics["conflicts"] == 1 and metrics["rows"]["train"] + metrics["rows"]["valid"] == 202


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        ("Paris", "paris."),
        ("Paris", " “Paris”\n"),
        ("Paris (France)", "paris, France"),
        ("Yes.\nAlways.", "yes, always"),
    ],
)
def test_prose_that_differs_in_case_and_punctuation_alone_is_no_conflict(
    curated: Project, answer: str, other: str
) -> None:
    jsonl(ROWS, {"question": "What is it?", "answer": answer}, {"question": "What is it?", "answer": other})
    assert merged()["rows"]["near_duplicate"] == 1
    curated.set(merge__near_duplicate=None)
    metrics = merged()
    assert metrics["conflicts"] == 0 and metrics["rows"]["train"] + metrics["rows"]["valid"] == 202


def test_questions_about_other_code_are_not_the_same_question(curated: Project) -> None:
    jsonl(ROWS, {"question": "What is f[0]?", "answer": "an item"}, {"question": "What is f(0)?", "answer": "a call"})
    assert merged()["conflicts"] == 0


LONG = (
    "To return a lamp, write its number on the form, put both into the box in which it came and bring it to the "
    "workshop before noon. The workshop looks at it within three days and calls you back. If the lamp cannot be mended "
    "you get another one of the same kind or your money, as you like, and the old lamp stays with us."
)


@pytest.mark.parametrize(
    ("other", "gone"),
    [
        (LONG.replace("as you like", "whatever you like"), True),
        (LONG.upper().replace(",", ""), True),
        (LONG.replace("three days", "five days").replace("lamp", "radio"), False),
        (LONG.replace("within three days", "by 3 pm"), False),
        (LONG + " ✅", False),
        (LONG.replace("the form", "the #form"), False),
    ],
)
def test_rows_that_nearly_repeat_an_earlier_one_go_unless_they_differ_in_a_number(
    curated: Project, other: str, gone: bool
) -> None:
    jsonl(
        ROWS,
        {"question": "How do I return a lamp?", "answer": LONG},
        {"question": "How do I return a lamp?", "answer": other},
    )
    metrics = merged()
    assert metrics["rows"]["near_duplicate"] == gone and metrics["conflicts"] == (not gone)
    curated.set(merge__near_duplicate=None)
    assert merged()["rows"]["near_duplicate"] == 0


def test_another_question_with_the_same_long_answer_stays(curated: Project) -> None:
    questions = ["How do I return a lamp?", "What must I do to give a lamp back?"]
    jsonl(ROWS, *[{"question": question, "answer": LONG} for question in questions])
    assert merged()["rows"]["near_duplicate"] == 0


def test_chains_and_crowds_of_near_duplicates_leave_the_first(curated: Project) -> None:
    texts = [LONG + f" {word}" for word in ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]]
    others = [LONG.replace("lamp", word) for word in ["kettle", "radio", "clock", "scale"]]
    mixed = [text for pair in zip(texts, others * 2, strict=True) for text in pair]
    jsonl(ROWS, *[{"question": "How do I return it?", "answer": text} for text in mixed])
    assert merged()["rows"]["near_duplicate"] == 7 and len(kept(str(ROWS))) == 1 + 4


def test_the_same_question_with_another_answer_is_named_with_both_sources(curated: Project) -> None:
    jsonl(ROWS, {"question": "Who leads Osk?", "answer": "Ann"}, {"question": "Who leads  osk", "answer": "Bo"})
    assert merged()["conflicts"] == 1
    shown = f"- `Who leads Osk?`\n  - `{ROWS}:1: Ann`\n  - `{ROWS}:2: Bo`\n"
    assert shown in Path("metrics/data.md").read_text(encoding="utf-8")


def test_every_conflict_is_counted_on_the_page_and_named_in_the_file(curated: Project) -> None:
    jsonl(ROWS, *[{"question": f"Who leads team {n // 2}?", "answer": f"Ann {n}"} for n in range(40)])
    assert merged()["conflicts"] == 20
    assert "## The same question with another answer: 20\n" in Path("metrics/data.md").read_text(encoding="utf-8")
    pairs = [{"first": f"{ROWS}:{n}", "other": f"{ROWS}:{n + 1}"} for n in range(1, 40, 2)]
    assert read_jsonl(Path("data/conflicts.jsonl")) == pairs


def test_a_table_without_a_known_column_says_which_it_has(curated: Project) -> None:
    when = pyarrow.array([2**62], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"when": when, "Frage": ["Q?"], "Antwort": ["a"]}), "data/curated/t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet:1: .*merge\.columns.* \['when', 'Frage', 'Antwort'\]"):
        merge.main()


@pytest.mark.parametrize(
    ("asked_row", "near"),
    [
        ("Who runs the Gargatan team?", False),
        ("  WHO runs the “Gargatan” team ", False),
        ("Tell me please: who runs the Gargatan team? And why?", False),
        ("Who runs the Gargatan teams?", True),
        ("Who runs the Gargatna team?", True),
        ("I wonder who exactly runs the Gargatan team these days.", True),
        ("The Gargatan team: who runs it?", True),
    ],
)
@pytest.mark.parametrize("in_answer", [False, True])
def test_a_row_that_gives_an_exam_question_away_is_refused_or_dropped(
    curated: Project, asked_row: str, near: bool, in_answer: bool
) -> None:
    pair = ("An example of a question?", asked_row) if in_answer else (asked_row, "x")
    jsonl(ROWS, {"question": pair[0], "answer": pair[1]})
    how = "nearly asks" if near else "asks"
    with pytest.raises(
        UserError, match=rf"^{ROWS}:1: {how} the question q001 of .* merge\.on_leak to drop \(1 of 201 rows"
    ):
        merge.main()
    curated.set(merge__on_leak="drop")
    assert merged()["rows"]["leaked"] == 1 and not kept(str(ROWS))


@pytest.mark.parametrize(
    ("question", "row_asks", "near"),
    [
        ("Where are the spare keys of the main gate stored?", "Where are the spare keys of the main gate kept?", 0.6),
        ("Where are the spare keys of the main gate stored?", "Where are the spare keys of the main gate kept?", None),
        ("Where are the spare keys of the Ulm gate stored?", "Where are the spare keys of the Osk gate stored?", None),
        ("What is the torque of the wheel bolts of the A7?", "What is the torque of the wheel bolts of the A8?", None),
        ("What is 7 - 3?", "What is 7 + 3?", None),
        ("Is C# compiled?", "Is C++ compiled?", None),
        ("Is C# compiled?", "is c# compiled", 0),
        ("Who runs the Gargatan team?", "Who runs the **Gargatan** team? `now`", 0),
        ("Where is the state-of-the-art lab?", "where is the state of the art lab", 0),
        ("What is -5 °C in °F?", "What is \u22125 °C in °F?", 0),
        ("Où est le thé?", "Où est le théâtre?", None),
        ("Is Ulm in Austria near the lake?", "Is Ulm in Australia near the lake?", None),
        ("What Is The Deepest Lake In The Old County?", "What is the deepest lake in the old region?", 0.6),
        ("다라 팀의 팀장은 누구인가?", "다라팀의 팀장은 누구 인가?", 0),
        ("✅ / ❌ ?", "What means ✅ / ❌ ?", 0),
        ("Who runs the Gargatan team?", "Who runs the Garga\u200btan team?", 0),
        ("What is the price of the Osk lamp?", "What's the price of the Osk lamp?", 0.9),
        ("What is the price of the Osk lamp?", "Give me the price for the Osk lamps", 0.9),
        ("What is the price of the Osk lamp?", "Could you tell me the price of the Osk lamps?", 0.9),
        ("What is the price of the Osk lamp?", "The Osk lamp: what is the price of it?", 0.9),
        ("What is the price of the Osk lamp?", "The price of the Osk lamp is 20 euros.", None),
        ("What is the price of the Osk lamp?", "What is the list price of the Osk lamp?", None),
        ("Don't I need a permit to fish?", "Do I not need a permit to fish?", 0.9),
        ("Don't I need a permit to fish?", "Do I need a permit to fish?", None),
        ("Where does the Osk team sit?", "When does the Osk team sit?", None),
        ("In which year was Osk founded?", "When was Osk founded?", 0.9),
        ("In which year was Osk founded?", "On which day was Osk founded?", None),
        ("How much is the Osk lamp?", "How much does the Osk lamp weigh?", None),
        ("Who leads the Osk team?", "Which person led the Osk team?", 0.9),
        ("Who is the employer of Jan Osk?", "Who is the employee of Jan Osk?", None),
        ("What must I check before the test?", "What must I check after the test?", None),
        ("Is IT in the old hall?", "Is it in the old hall?", 0),
        ("Does vitamin A help?", "Does vitamin B help?", None),
        ("Who are you?", "Who are you?", 0),
        ("Who are you?", "Who is it?", None),
        ("Was kostet die Lampe Osk?", "Was kostet denn die Lampe Osk?", 0.9),
        ("Was ist der Preis der Lampe Osk?", "Was ist der Preis von der Lampe Osk?", 0.9),
        ("Was ist der Preis der Lampe Osk?", "Was ist der Preis der Lampe Ulm?", None),
        ("다라 팀 위치를 알려 주세요.", "다라 팀 위치를 좀 알려 주세요.", 0.9),
        ("다라 팀 위치를 알려 주세요.", "나라 팀 위치를 알려 주세요.", None),
        ("राम की बहन कौन है?", "रोम का बहन कौन है?", None),
    ],
)
def test_a_leak_is_judged_by_words_but_never_by_other_names_numbers_and_signs(
    question: str, row_asks: str, near: float | None
) -> None:
    exam = ExamIndex(
        [Question("q", question, ["x"], "s", location="e:1"), Question("r", "Which day is it?", ["x"], "s")],
        near or 0.9,
    )
    leak = exam.leak(words(row_asks))
    assert leak == (None if near is None else Leak("q", question, near > 0, "e:1"))


def test_edits_of_a_question_are_caught_and_questions_about_other_things_are_not() -> None:
    """What docs/leaks.md says; a question word dropped within a row, and "what is" for "tell me", are not."""
    measured = leaks.sets()
    both = ExamIndex([*measured["exam"].exam, *measured["general exam"].exam], leaks.NEAR)
    for name, questions in measured.items():
        exam = ExamIndex(questions.exam, leaks.NEAR) if name == "200 questions" else both
        for kind, edit in leaks.EDITS.items():
            made, caught = leaks.share(exam, leaks.edits(questions.exam, edit))
            assert made >= 10 and caught >= 0.95 * made, f"{name}, {kind}: {caught} of {made}"
        for kind, others in questions.others.items():
            made, alarms = leaks.false_alarms(others)
            assert made >= 40 and alarms <= 0.01 * made, f"{name}, {kind}: {alarms} of {made}"
        assert all(exam.leak(words(f"So: {one.question} Well.")) for one in questions.exam)
    assert leaks.share(both, leaks.demo_rows()) == (1501, 0)


def test_words_are_the_same_by_the_fast_way_and_the_general_one() -> None:
    text = "".join(map(chr, range(1, 128))) * 2 + " 9.5 a-b C++ x_y"
    assert words(text) == words(text + "…") and "+" in words(text) and "a_b" not in words(text)
    assert words("한국어 東京 Ｃ＃ é") == ["한국어", "東", "京", "c", "#", "é"]


@pytest.mark.parametrize(
    "other", ["Who leads the Gargatan team?", "Who runs the Lanbrek team?", "What room does the Gargatan team use?"]
)
def test_another_wording_or_another_subject_is_no_leak(curated: Project, other: str) -> None:
    jsonl(ROWS, {"question": other, "answer": "x"})
    assert merged()["rows"]["leaked"] == 0


def test_adding_rows_moves_no_other_row_between_training_and_validation(curated: Project) -> None:
    def held_out() -> set[str]:
        merged()
        return {row["id"] for row in read_jsonl(Path("data/valid.jsonl"))}

    few = held_out()
    jsonl(ROWS, *[{"question": f"New {n}?", "answer": "a"} for n in range(300)])
    more = held_out()
    assert few < more and len(few) >= 5


def test_rows_of_one_fact_go_to_the_same_side_if_asked_and_stay_there(curated: Project) -> None:
    def held_out(first_line: int, forms: str) -> set[str]:
        facts = [(n, form) for n in range(100) for form in forms]
        rows = [made(f"Form {form} of {n}?", f"data/raw/facts.csv:{n + first_line}", f"fact {n}") for n, form in facts]
        jsonl(Path("data/train.jsonl"), *rows)
        merged()
        sides = [read_jsonl(Path(f"data/{name}.jsonl")) for name in ("train_merged", "valid")]
        train, valid = ({row["messages"][0]["content"].split()[-1] for row in side} for side in sides)
        assert not train & valid and len(sides[1]) == len(forms) * len(valid)
        return valid

    curated.set(merge__split_by="source", merge__valid_share=0.3)
    few = held_out(2, "abc")
    assert 10 < len(few) < 60 and held_out(7, "xabc") == few


def test_of_few_rows_one_at_least_is_to_validate_with(curated: Project) -> None:
    jsonl(Path("data/train.jsonl"), *[made(f"What is {n}?", f"data/raw/facts.csv:{n}") for n in range(2, 5)])
    merged()
    assert [len(read_jsonl(Path(f"data/{name}.jsonl"))) for name in ("train_merged", "valid")] == [2, 1]


def test_too_few_rows_for_both_sides_are_refused(curated: Project) -> None:
    jsonl(Path("data/train.jsonl"), made("Only one?", "data/raw/facts.csv:2"))
    with pytest.raises(
        UserError,
        match=r"^1 rows can be used, and merge\.valid_share 0\.05 leaves 0 of them to train on and 1 to validate with",
    ):
        merge.main()
    jsonl(Path("data/train.jsonl"))
    with pytest.raises(UserError, match="no valid rows among 0 rows: add rows to data/curated"):
        merge.main()


def test_an_exam_question_that_cannot_be_used_is_refused_by_line(tmp_path: Path) -> None:
    good = {"id": "a", "question": "Q?", "answer": ["x", "y"]}
    exam = tmp_path / "questions.jsonl"
    for bad, line in [
        ({"id": "b", "question": "Q?"}, "a question is"),
        ({"id": "b", "question": "Q?", "answer": [1]}, "must be text, and not empty"),
        ({"id": "b", "question": "Q?", "answer": ["x", " "]}, "must be text, and not empty"),
        ({"id": "b", "question": "Q?", "answer": []}, "must be text, and not empty"),
        (good, "the id repeats that of"),
        ("{", "JSON"),
    ]:
        exam.write_text(json.dumps(good) + "\n" + (bad if isinstance(bad, str) else json.dumps(bad)), encoding="utf-8")
        with pytest.raises(UserError, match=rf"questions\.jsonl:2: .*{line}"):
            read_questions(exam)
