"""From failed exam questions to candidates of training rows, and no further without a person."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import ROOT, Project
from test_generate import Endpoint, completion

from pipeline.common.errors import UserError
from pipeline.common.paths import EXAM, GENERAL_EXAM
from pipeline.common.rows import read_jsonl
from pipeline.evaluation.questions import read_questions
from stages import generate, merge
from tools import curate, failed_questions

CANDIDATES = Path("data/candidates.jsonl")
CURATED = Path("data/curated/round.jsonl")
PHRASINGS = """\
leader: ["Who leads the {subject}?", "Who is the head of the {subject}?", "Who is in charge of the {subject}?"]
room: ["Where does the {subject} sit?", "In which room is the {subject}?"]
"""
TEAMS = ["Ay", "Boe", "Cire", "Dovan", "Eloris", "Fenkano", "Gilanack", "Hardewell"]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The working directory: the files that the tool needs, with two facts per team and two phrasings per fact. No
    source is held back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(failed_questions, "HELD_BACK", 2**64)
    files = ("general.jsonl", "preferences_exam.jsonl", "curated/handbook.jsonl")
    for name in ("dvc.yaml", "params.yaml", *(f"data/{file}" for file in files)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, name)
    Path("data/raw").mkdir()
    facts = [f"{team} team,leader,Ann {team}\n{team} team,room,room {n}" for n, team in enumerate(TEAMS, start=1)]
    Path("data/raw/facts.csv").write_text("\n".join(["subject,relation,value", *facts, ""]), encoding="utf-8")
    Path("data/raw/phrasings.yaml").write_text(PHRASINGS, encoding="utf-8")
    Path("data/replay.jsonl").write_text("\n", encoding="utf-8")
    project = Project(tmp_path)
    project.set(generate__phrasings_per_fact=2, merge__valid_share=0.2)
    return project


def examined(*wrong: dict[str, Any], right: int = 1) -> None:
    """Train on data/raw, and fail the given questions of an exam that has others, which the model knew."""
    known = [{"id": f"known{n}", "question": f"Known {n}?", "answer": "yes"} for n in range(right)]
    jsonl(EXAM, *wrong, *known)
    generate.main()
    merge.main()
    answer_exams({question["id"] for question in wrong})


def answer_exams(wrong: set[str], forgotten: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    for path, name in [(EXAM, "answers"), (GENERAL_EXAM, "answers_general")]:
        results = [
            {
                "id": one.id,
                "question": one.question,
                "reference": one.answers,
                "tags": one.tags,
                "source": one.source,
                "after": "\x1b[2Jno idea",
                "base": {"correct": float(one.id in forgotten)},
                "tuned": {"correct": float(one.id not in wrong | forgotten)},
            }
            for one in read_questions(path)
        ]
        jsonl(Path(f"metrics/{name}.jsonl"), *results)


def jsonl(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def question(key: str, text: str, answer: str, source: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": key, "question": text, "answer": answer} | ({"source": source} if source else {}) | more


def proposed() -> list[tuple[str, str, str, list[str]]]:
    return [(row["question"], row["answer"], row["source"], row["for"]) for row in read_jsonl(CANDIDATES)]


LEADER = question("q0", "Who runs the Ay team?", "Ann Ay", "data/raw/facts.csv:2", tags=["leader"])
ROOM = question("q1", "Where can I find the Ay team?", "room 1", "data/raw/facts.csv:3", tags=["room"])


def test_a_failed_question_brings_the_phrasings_of_its_fact_that_training_has_not_used(
    workspace: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    examined(LEADER, ROOM)
    answer_exams({LEADER["id"], ROOM["id"]}, forgotten={"g01"})
    curate.main()
    assert proposed() == [("Who is in charge of the Ay team?", "Ann Ay", "data/raw/facts.csv:2", [LEADER["id"]])]
    printed = capsys.readouterr().out
    assert f"{EXAM}: 2 of " in printed and "1 of    1  leader" in printed
    assert f'{LEADER["id"]}  "Who runs the Ay team?"\n    expected "Ann Ay", answered "\\u001b[2Jno idea"' in printed
    assert f"none for {ROOM['id']}: all its phrasings are used: add phrasings, set generate.endpoint" in printed
    assert "1 of 60 questions failed, 1 of them forgotten" in printed and "g01\n" in printed
    assert printed.splitlines()[-1].startswith("edit them, then: mv data/candidates.jsonl data/curated/")


def test_kept_candidates_are_trained_on_and_the_leak_gate_stands(workspace: Project) -> None:
    examined(LEADER)
    curate.main()
    CANDIDATES.rename(CURATED)
    merge.main()
    trained = read_jsonl(Path("data/train_merged.jsonl")) + read_jsonl(Path("data/valid.jsonl"))
    assert [row["messages"][0]["content"] for row in trained if row["source"] == f"{CURATED}:1"] == [
        "Who is in charge of the Ay team?"
    ]
    curate.main()  # and they are not proposed again
    assert not CANDIDATES.exists()
    with open(CURATED, "a", encoding="utf-8") as file:
        file.write(json.dumps({"question": LEADER["question"], "answer": LEADER["answer"]}) + "\n")
    with pytest.raises(UserError, match=rf"{CURATED}:2: asks the question {LEADER['id']}"):
        merge.main()


def test_a_phrasing_that_asks_a_question_of_either_exam_is_no_candidate(
    workspace: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.set(merge__near_leak=0.85)
    jsonl(GENERAL_EXAM, question("g1", "So who is in charge of the Boe team?", "Ann Boe"))
    boe = question("q2", "Who runs the Boe team?", "Ann Boe", "data/raw/facts.csv:4")
    dovan = question("q3", "Who runs the Dovan team?", "Ann Dovan", "data/raw/facts.csv:8")
    examined(LEADER | {"question": "Who is in charge of the Ay team, please?"}, boe, dovan)
    curate.main()
    assert proposed() == [("Who is in charge of the Dovan team?", "Ann Dovan", "data/raw/facts.csv:8", [dovan["id"]])]
    assert (
        "dropped: 6 in the training or validation rows already, 2 that ask an exam question" in capsys.readouterr().out
    )


def test_without_a_source_the_answer_and_the_words_lead_to_the_fact_and_what_nothing_answers_is_named(
    workspace: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    found = question("q0", "Who runs the Boe team?", "ann boe", "an old handbook, page 3")
    nobody = question("q1", "Who runs the Zorkon team?", "Ann Boe", "data/raw/gone.csv:7")
    fax = question("q2", "What is the fax number of the Boe team?", "555")
    hand = question("q3", "When is the workshop open?", "at 8 in the morning")
    examined(found, nobody, fax, hand)
    curate.main()
    assert proposed() == [("Who is in charge of the Boe team?", "Ann Boe", "data/raw/facts.csv:4", [found["id"]])]
    printed = capsys.readouterr().out
    unanswered = printed.partition("data/raw and data/curated have no answer to these questions")[2].partition(
        str(GENERAL_EXAM)
    )[0]
    assert [key for key in ("q0", "q1", "q2", "q3") if f"  {key}  " in unanswered] == [nobody["id"], fax["id"]]
    assert "data/curated/handbook.jsonl:3: candidates: 0" in printed


def test_a_fact_that_says_otherwise_than_the_exam_is_named(
    workspace: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    examined(LEADER | {"answer": "Bo Ek"})
    curate.main()
    printed = capsys.readouterr().out
    assert (
        f'none for {LEADER["id"]}: the answer is "Ann Ay", which the exam does not accept: correct the data' in printed
    )
    assert printed.splitlines()[-1] == "no candidates: correct the data as printed above, then run dvc repro"
    assert not CANDIDATES.exists()


def test_a_fact_added_above_leads_a_question_on_to_its_own_fact(workspace: Project) -> None:
    table = Path("data/raw/facts.csv")
    head, *facts = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([head, "Zoe team,leader,Ann Zoe", *facts, ""]), encoding="utf-8")
    examined(LEADER)  # whose source is the line of the new fact
    curate.main()
    assert proposed() == [("Who is in charge of the Ay team?", "Ann Ay", "data/raw/facts.csv:3", [LEADER["id"]])]


def test_a_held_back_question_is_neither_named_nor_helped(
    workspace: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failed_questions, "HELD_BACK", 1)  # every source
    examined(LEADER, right=0)
    curate.main()
    printed = capsys.readouterr().out
    assert LEADER["question"] not in printed and not CANDIDATES.exists()
    assert "held back: 0 of 1 correct" in printed and printed.endswith("except held-back ones\n")


def test_a_fact_or_a_question_added_above_moves_no_other_question_into_the_hold_out() -> None:
    def results(line: int) -> list[dict[str, Any]]:
        """Two questions about each of 30 facts, of which the first stands in `line`."""
        asked = [(line + n // 2, f"Question {n}?") for n in range(60)]
        return [{"source": f"data/raw/facts.csv:{location}", "question": question} for location, question in asked]

    def held_back(exam: list[dict[str, Any]]) -> set[str]:
        sources = failed_questions.held_back_sources(exam)
        return {result["question"] for result in exam if result["source"] in sources}

    before = held_back(results(2))
    moved = results(3)
    assert held_back([{"source": "data/raw/facts.csv:2", "question": "New?"}, *moved]) - {"New?"} == before
    assert 0 < len(before) < 40
    pairs = [{result["question"] for result in moved[n : n + 2]} for n in range(0, 60, 2)]
    assert all(len(pair & before) in (0, 2) for pair in pairs)  # all questions of a fact are on one side


@pytest.fixture
def endpoint(workspace: Project) -> Iterator[Endpoint]:
    """A server on loopback that asks and answers by the last line of what it is sent, in three ways."""
    server = Endpoint()
    server.script = lambda body: completion(worded(body["messages"][0]["content"].splitlines()[-1], body["seed"]))
    Thread(target=server.server.serve_forever, args=(0.05,), daemon=True).start()
    workspace.set(generate__endpoint=server.url, generate__model="m", generate__passage_length=1000)
    yield server
    server.server.shutdown()
    server.server.server_close()


def worded(line: str, seed: int) -> str:
    questions = {
        "room 1": ["Where would I meet the Ay team?", "Where can I find the Ay team?"],  # the second is the exam's
        "noon": [f"Till when does the shop sell, {seed}?"],
        "closes": ["What does it do at noon?"],  # no answer to the exam
    }
    items = [{"questions": asked, "answer": a, "quote": line} for a, asked in questions.items() if a in line]
    wrong = {"questions": ["When does the shop shut?"], "answer": "noon", "quote": "It shuts."}  # which nothing says
    return json.dumps({"items": [*items, wrong]})


def test_the_endpoint_words_questions_about_a_used_up_fact_and_the_part_of_a_passage_that_holds_the_answer(
    endpoint: Endpoint, workspace: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    hours = "The shop opens at nine.\n\n" + "It is a fine shop. " * 20 + "\n\nIt closes at noon."
    Path("data/raw/guide.md").write_text(f"# Hours\n\n{hours}\n", encoding="utf-8")
    shop = question("q2", "At what time does the shop shut?", "noon", "data/raw/guide.md:1")
    examined(LEADER, ROOM, shop)
    workspace.set(generate__turns=3)  # candidates are single questions
    endpoint.requests.clear()
    for _ in range(2):  # the second time, of what was kept
        curate.main()
        assert proposed() == [
            ("Who is in charge of the Ay team?", "Ann Ay", "data/raw/facts.csv:2", [LEADER["id"]]),
            ("Where would I meet the Ay team?", "room 1", "data/raw/facts.csv:3", [ROOM["id"]]),
            ("Till when does the shop sell, 2?", "noon", "data/raw/guide.md:1", [shop["id"]]),
        ]
        assert sorted(endpoint.asked()) == ["It closes at noon.", "Where does the Ay team sit? room 1"]
    assert "1 that ask an exam question" in capsys.readouterr().out
    sent = json.dumps(endpoint.requests)
    assert "opens at nine" not in sent and "follow_ups" not in sent
    assert all(one["question"] not in sent for one in (LEADER, ROOM, shop))


def test_what_a_person_has_edited_is_not_written_over(workspace: Project) -> None:
    examined(LEADER)
    curate.main()
    curate.main()
    edited = CANDIDATES.read_text(encoding="utf-8").replace("in charge of", "the boss of")
    CANDIDATES.write_text(edited, encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"^{CANDIDATES} has other rows, perhaps edited: move the file to data/curated"
    ):
        curate.main()
    assert CANDIDATES.read_text(encoding="utf-8") == edited


@pytest.mark.parametrize("missing", ["metrics/answers.jsonl", "metrics/answers_general.jsonl", "data/valid.jsonl"])
def test_what_is_missing_is_named_with_what_makes_it(workspace: Project, missing: str) -> None:
    examined(LEADER)
    Path(missing).unlink()
    with pytest.raises(UserError, match=rf"^{missing} is missing: run dvc repro( merge)?, or dvc pull {missing}$"):
        curate.main()


def test_answers_to_another_exam_are_refused(workspace: Project) -> None:
    examined(LEADER)
    jsonl(EXAM, LEADER | {"answer": ["Ann Ay", "Ms Ay"]})
    with pytest.raises(UserError, match=r"^metrics/answers\.jsonl has the answers to another exam: run dvc repro"):
        curate.main()
