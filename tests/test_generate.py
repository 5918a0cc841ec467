"""From facts and documents to questions and answers."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest
from conftest import ROOT, Project

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check, read_yaml
from pipeline.common.paths import EXAM
from pipeline.common.rows import read_jsonl
from pipeline.common.words import words
from pipeline.data import endpoint
from pipeline.data.asked import answerable_questions
from pipeline.data.documents import Passage, read_passages
from pipeline.data.facts import read_phrasings
from pipeline.data.grounding import fault
from pipeline.data.replies import JOURNAL, kept_replies
from pipeline.data.unanswerable import refusal_fault
from pipeline.evaluation.questions import read_questions
from pipeline.export.llama_cpp import run_script
from pipeline.model.llama_server import served
from stages import generate, merge

TINY = ROOT / "models/tiny-base"
FACTS = ROOT / "data/raw/facts.csv"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """As much of a clone as the stage needs when it runs alone, and the working directory."""
    (tmp_path / "data/raw").mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Project(tmp_path)


def write(files: dict[str, str | bytes]) -> None:
    """These and no other files in data/raw."""
    raw = Path("data/raw")
    for file in raw.iterdir():
        file.unlink()
    for name, content in files.items():
        (raw / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def rows() -> list[tuple[str, ...]]:
    """(source, question, answer) of each row made; of a dialogue, with the further questions and answers."""
    made = read_jsonl(Path("data/train.jsonl"))
    return [(row["source"], *(message["content"] for message in row["messages"])) for row in made]


def metrics() -> dict[str, Any]:
    return dict(json.loads(Path("metrics/generate.json").read_text(encoding="utf-8")))


def demo_facts() -> list[str]:
    return FACTS.read_text(encoding="utf-8").splitlines()[1:]


def test_the_demo_is_examined_in_phrasings_that_no_training_row_has(project: Project) -> None:
    generate.main()
    trained = {row["source"]: row["messages"] for row in read_jsonl(Path("data/train.jsonl"))}
    subjects = {f"data/raw/facts.csv:{n}": fact.split(",")[0] for n, fact in enumerate(demo_facts(), start=2)}
    phrasings = {
        " ".join(words(phrasing.text))
        for relation in read_phrasings([Path("data/raw/phrasings.yaml")]).values()
        for phrasing in relation
    }
    known = {
        " ".join(words(phrasing))
        for relation in read_yaml(TINY / "recipe/forms.yaml").values()
        for phrasing in relation
    }
    questions = read_questions(EXAM)
    assert 64 <= len(questions) <= 128
    for question in questions:
        assert subjects[question.source] in question.question
        phrasing = " ".join(words(question.question.replace(subjects[question.source], "{subject}")))
        assert phrasing not in phrasings and phrasing in known
        assert trained[question.source][-1]["content"] == question.answers[0]


def test_the_base_has_never_met_the_demos_subjects(project: Project) -> None:
    project.run("python", "models/tiny-base/recipe/world.py")
    world = (project.folder / "models/tiny-base/corpus.jsonl").read_text(encoding="utf-8")
    subjects = {fact.split(",")[0] for fact in demo_facts()}
    assert any("팀" in subject for subject in subjects)
    assert not [subject for subject in subjects if subject.split()[0] in world]


def test_facts_of_every_kind_are_asked_in_phrasings_of_every_kind_and_stay_as_written(workspace: Project) -> None:
    write(
        {
            "a.csv": 'name,price,warranty\nLamp,"1,200",\nFan,7.50,2 years\n',
            "b.yaml": "- {subject: Osk, relation: open, value: no}\n- {subject: Ulm, code: 007, size: 1e3}\n",
            "c.json": '[{"subject": "Ulm", "relation": "open", "value": 1.50, "note": "unused"}]',
            "phrasings.yaml": "price: ['How much is the {name}?', 'What does the {name} cost?', 'Third?{name}']\n"
            "open: ['Is {subject} open?']\ncode: ['What is the code of {subject} ({size})?']\n",
            "phrasings_more.csv": 'relation,phrasing\nwarranty,"{name}, {price}: how long?"\nopen,Open {subject}?\n',
        }
    )
    workspace.set(generate__phrasings_per_fact=2)
    generate.main()
    assert rows() == [
        ("data/raw/a.csv:2", "How much is the Lamp?", "1,200"),
        ("data/raw/a.csv:2", "What does the Lamp cost?", "1,200"),
        ("data/raw/a.csv:3", "How much is the Fan?", "7.50"),
        ("data/raw/a.csv:3", "What does the Fan cost?", "7.50"),
        ("data/raw/a.csv:3", "Fan, 7.50: how long?", "2 years"),
        ("data/raw/b.yaml:1", "Is Osk open?", "no"),
        ("data/raw/b.yaml:1", "Open Osk?", "no"),
        ("data/raw/b.yaml:2", "What is the code of Ulm (1e3)?", "007"),
        ("data/raw/c.json:1", "Is Ulm open?", "1.50"),
        ("data/raw/c.json:1", "Open Ulm?", "1.50"),
    ]
    assert metrics()["facts"] == 5 and metrics()["questions"]["of_facts"] == 10


PHRASINGS = "leader: ['Who leads {subject}?']"
TABLE = "subject,relation,value\n"
GOOD: dict[str, str | bytes] = {"facts.csv": TABLE + "A,leader,b\n", "phrasings.yaml": PHRASINGS}


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"facts.csv": TABLE + "A,boss,b\n"}, r"facts\.csv:2: no question phrasings .* 'boss'"),
        ({"facts.csv": TABLE + "A,leader\n"}, r"facts\.csv:2: 2 cells for 3 columns"),
        ({"facts.csv": TABLE + "A,leader,b,c\n"}, r"facts\.csv:2: 4 cells for 3 columns"),
        ({"facts.csv": TABLE + 'A,leader,"b\n'}, r"facts\.csv:2: cannot be read as CSV"),
        ({"facts.csv": TABLE + "A,leader, \n"}, r"facts\.csv:2: .*value must not be empty"),
        ({"facts.csv": TABLE + ",leader,b\n"}, r"facts\.csv:2: 'subject' is empty"),
        ({"facts.csv": TABLE}, r"facts\.csv has no lines"),
        ({"facts.csv": "a,a\n1,2\n"}, r"facts\.csv:1: the columns are"),
        ({"facts.csv": (TABLE + "\ud300,a,b\n").encode("cp949")}, r"facts\.csv is not UTF-8"),
        ({"facts.csv": "subject,size\nA,1\n"}, r"facts\.csv:2: no question phrasings for any of subject, size"),
        ({"a.yaml": "- {leader: b}"}, r"phrasings\.yaml: leader: .*a\.yaml:1 has no 'subject'"),
        ({"a.json": '[{"subject": "A"}, {"subject": {"b": 1}}]'}, r"a\.json:2: 'subject' must be"),
        ({"a.json": '[{"subject": "A", "subject": "B"}]'}, r"a\.json cannot .* occurs twice"),
        ({"a.json": '[{"subject": null}]'}, r"a\.json:1: 'subject' must be text or a number"),
        ({"a.yaml": "- {subject: A, leader: null}"}, r"a\.yaml:1: 'leader' must be text"),
        ({"a.yaml": "- A"}, r"a\.yaml:1: a fact is a mapping"),
        ({"a.yaml": "A: b"}, r"a\.yaml: facts are a list"),
        ({"a.yaml": "- ["}, r"a\.yaml cannot be read as YAML"),
        (
            {"phrasings.yaml": "leader: ['Who leads it?']"},
            r"phrasings\.yaml: leader: 'Who leads it\?' must name a column",
        ),
        ({"phrasings.yaml": "leader: ['Who leads {subject}}?']"}, r"phrasings\.yaml: leader: .* no other braces"),
        (
            {"phrasings.yaml": "leader: ['Is {value} of {subject}?']"},
            r"phrasings\.yaml: leader: .* contains its own answer",
        ),
        ({"phrasings.yaml": "leader: ['Who leads {team}?']"}, r"phrasings\.yaml: leader: .*facts\.csv:2 has no 'team'"),
        (
            {"phrasings.yaml": PHRASINGS + "\nboss: ['Boss of {subject}?']"},
            r"phrasings\.yaml: boss: no fact has 'boss'",
        ),
        ({"phrasings.yaml": "leader: Who?"}, r"phrasings\.yaml: leader must have a list"),
        ({"phrasings.yaml": "leader: []"}, r"phrasings\.yaml: leader must have a list"),
        ({"phrasings.yaml": "[]"}, r"phrasings\.yaml must have a list"),
        ({"phrasings.yaml": "# none yet"}, r"facts\.csv:2: no question phrasings for the relation 'leader'"),
        ({"phrasings.csv": "relation,text\nleader,x\n"}, r"phrasings\.csv:2: the columns of a file of phrasings"),
        ({"facts.xlsx": b"PK"}, r"facts\.xlsx: facts and phrasings are read from \.csv \.json"),
        (
            {"old.doc": b""},
            r"old\.doc: .* documents from \.docx \.html \.md \.pdf \.txt: convert or rename it",
        ),
        ({"a.md": "Text."}, r"a\.md: .* set generate\.endpoint and generate\.model"),
    ],
)
def test_what_does_not_fit_is_refused_by_file_and_line(
    workspace: Project, files: dict[str, str | bytes], line: str
) -> None:
    write(GOOD | files)
    with pytest.raises(UserError, match=line):
        generate.main()
    assert not Path("data/train.jsonl").exists()


def test_files_of_comments_alone_make_no_rows_so_that_curated_rows_can_be_all_there_is(workspace: Project) -> None:
    write({"facts.yaml": "# none yet", "phrasings.yaml": "# none yet", ".gitkeep": ""})
    generate.main()
    assert rows() == []


def pdf(*pages: str, trailer: str = "") -> bytes:
    """A PDF with a line of Helvetica on each page, which may be none."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>"]
    objects += ["<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    for n, text in enumerate(pages):
        drawing = f"BT /F 12 Tf 50 700 Td ({text}) Tj ET" if text else ""
        resources = f"/Resources<</Font<</F 3 0 R>>>>/MediaBox[0 0 600 800]/Contents {5 + 2 * n} 0 R"
        objects += [f"<</Type/Page/Parent 2 0 R{resources}>>"]
        objects += [f"<</Length {len(drawing)}>>stream\n{drawing}\nendstream\n"]
    body = "".join(f"{number} 0 obj{content}endobj\n" for number, content in enumerate(objects, start=1))
    return f"%PDF-1.4\n{body}trailer<</Root 1 0 R{trailer}>>\n%%EOF".encode()


def docx(path: Path, body: str) -> None:
    types = "http://schemas.openxmlformats.org/package/2006/content-types"
    relations = "http://schemas.openxmlformats.org/package/2006/relationships"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{types}"><Default Extension="xml" ContentType="{main}"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{relations}">'
        f'<Relationship Id="r1" Type="{office}" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{word}"><w:body>{body}</w:body></w:document>',
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_a_document_is_read_in_every_format_and_cut_at_its_headings(tmp_path: Path) -> None:
    markdown = tmp_path / "a.md"
    markdown.write_text("\ufeffFirst.\n\n# One\n\n## Two ##\ntwo\n```\n# code\n```\n# C#\nthree\n", encoding="utf-8")
    assert read_passages(markdown, 100) == [
        Passage("First.", "", None),
        Passage("two\n```\n# code\n```", "One > Two", None),
        Passage("three", "C#", None),
    ]
    page = tmp_path / "a.html"
    page.write_text(
        "<html><head><title>T</title><style>p {}</style></head><body><h1>One_a</h1><script>if (a < b) {}</script>"
        "<p>Text <b>of</b> <a href='x'>one</a>.<img src='data:x'></p><h2>Two</h2><ul><li>a</li></ul></body></html>",
        encoding="utf-8",
    )
    assert read_passages(page, 100) == [
        Passage("Text **of** one.", "One_a", None),
        Passage("* a", "One_a > Two", None),
    ]
    word = tmp_path / "a.docx"
    heading = '<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>Eins</w:t></w:r></w:p>'
    docx(word, heading + "<w:p><w:r><w:t>Über uns.</w:t></w:r></w:p>")
    assert read_passages(word, 100) == [Passage("Über uns.", "Eins", None)]
    print_ = tmp_path / "a.pdf"
    print_.write_bytes(pdf("Page one is hy-) Tj 0 -14 Td (phenated.", "", "Page three."))
    assert read_passages(print_, 100) == [Passage("Page one is hyphenated.", "", 1), Passage("Page three.", "", 3)]


def test_a_long_text_is_cut_after_paragraphs_then_sentences_then_words_and_loses_nothing(tmp_path: Path) -> None:
    text = "One. Two is longer.\n\nThree\nfour.\n\n" + "word " * 9 + "\n\n" + "x" * 45 + "\n\n字は。" + "字" * 19
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    cut = [passage.text for passage in read_passages(file, 20)]
    assert cut[:4] == ["One. Two is longer.", "Three\nfour.", "word word word word", "word word word word"]
    assert cut[-2:] == ["字は。", "字" * 19]
    assert all(len(piece) <= 20 for piece in cut)
    assert "".join("".join(cut).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("empty.md", b" \n# Title only\n", r"empty\.md has no text"),
        ("old.txt", "\ud300".encode("cp949"), r"old\.txt is not UTF-8"),
        ("scan.pdf", pdf("", ""), r"scan\.pdf has no text: run OCR on a scan"),
        ("broken.pdf", b"%PDF-1.4 nothing", r"broken\.pdf cannot be read \(.*\): repair it"),
        (
            "locked.pdf",
            pdf(
                "Secret.",
                trailer=f"/ID[<00><00>]/Encrypt<</Filter/Standard/V 1/R 2/O<{'11' * 32}>/U<{'22' * 32}>/P -4>>",
            ),
            r"locked\.pdf cannot be read \(.*password.*\)",
        ),
        ("broken.docx", b"PK\x03\x04 nothing", r"broken\.docx cannot be read"),
    ],
)
def test_a_document_without_text_to_read_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, line: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=line):
        read_passages(file, 100)


@pytest.mark.parametrize(
    ("passage", "quote", "answer", "expected"),
    [
        ("The Osk lamp costs 1,200 euros.", "the OSK lamp costs 1,200 euros", "It costs 1200 euros.", "ungrounded"),
        ("The Osk lamp costs 1,200 euros.", "the OSK lamp costs 1,200 euros", "1200 euros", None),
        ("The Osk lamp costs 1,200 euros.", "The Osk lamp costs 1,200 euros.", "The lamp costs 1,200 euros.", None),
        ("The Osk lamp costs 1,200 euros.", "The Osk lamp is dear.", "1,200 euros", "misquoted"),
        ("The Osk lamp costs 1,200 euros.", "...", "1,200 euros", "misquoted"),
        (
            "The Osk lamp costs 1,200 euros.",
            "The Osk lamp costs 1,200 euros.",
            "The lamp costs 200 euros.",
            "wrong_number",
        ),
        ("It costs 20 000 euros, not 10.", "It costs 20\u202f000 euros, not 10", "10 000 euros", "wrong_number"),
        ("It costs 20 000 euros, not 10.", "It costs 20'000 euros, not 10", "20,000 euros", None),
        ("In 2024 300 people came.", "In 2024 300 people came.", "300 people", None),
        ("| room 12 | 345 desks |", "room 12 345 desks", "345 desks", None),
        ("Version 3.5 is out.", "Version 3.5 is out.", "Version 5.3", "wrong_number"),
        ("It takes 3-5 days.", "It takes 3-5 days.", "5 days", None),
        ("The Osk lamp costs 1,200 euros.", "The Osk lamp costs", "Ann Lee from Ulm", "ungrounded"),
        ("The Osk lamp costs 1,200 euros.", "the", "1,200 euros", "misquoted"),
        ("The **Osk** lamp: 3\\.5 kg, -5 °C.", "the Osk lamp: 3.5 kg, -5 °C", "-5 °C, 3.5 kg", None),
        ("The Osk lamp stands -5 °C.", "The Osk lamp stands -5 °C.", "5 °C", "wrong_number"),
        ("회사는 크다. 휴대폰은 작다.", "회사는 크다. 휴대폰은 작다.", "회의", "ungrounded"),
        ("Category one.", "cat", "one", "misquoted"),
        ("다라 팀의 팀장은 최태민이다.", "다라 팀의 팀장은 최태민이다.", "최태민입니다.", None),
        ("다라 팀의 팀장은 최태민이다.", "다라 팀의 팀장은 최태민이다.", "최태준입니다.", "ungrounded"),
        ("部長は田中です。電話は5761。", "部長は田中です。", "田中", None),
        ("部長は田中です。電話は5761。", "部長は田中です。", "鈴木", "ungrounded"),
    ],
)
def test_an_answer_is_borne_out_by_its_passage_or_the_fault_is_named(
    passage: str, quote: str, answer: str, expected: str | None
) -> None:
    assert fault(answer, quote, passage, 0.8) == expected


Answer = tuple[int, dict[str, str], str]


def completion(content: str, tokens: int = 100) -> Answer:
    usage = {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens}
    message = {"role": "assistant", "content": content}
    reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    return 200, {"Content-Type": "application/json"}, json.dumps(reply | {"choices": choices})


def items(body: Any, answer: str | None = None) -> str:
    """As many questions as asked for; the passage's last line answers all, unless `answer` is given."""
    line = body["messages"][0]["content"].splitlines()[-1]
    schema = body["response_format"]["json_schema"]["schema"]["properties"]["items"]
    wordings = schema["items"]["properties"]["questions"]["maxItems"]
    items = [
        {"questions": [f"{line} {n}.{m}?" for m in range(wordings)], "answer": answer or line, "quote": line}
        for n in range(schema["maxItems"])
    ]
    return json.dumps({"items": items})


def well(body: Any) -> Answer:
    return completion(items(body))


class Endpoint:
    """A server on loopback that answers each request as `script` says, and remembers it."""

    def __init__(self) -> None:
        self.script: Callable[[Any], Answer] = well
        self.requests: list[Any] = []
        self.keys: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock = Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(body)
                    server.keys.add(self.headers["Authorization"])
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                status, headers, content = server.script(body)
                with server.lock:
                    server.at_once -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def asked(self) -> list[str]:
        """The last lines of the passages asked about, in order of arrival."""
        return [body["messages"][0]["content"].splitlines()[-1] for body in self.requests]


@pytest.fixture
def scripted(workspace: Project) -> Iterator[Endpoint]:
    """An endpoint that the workspace's parameters name."""
    server = Endpoint()
    Thread(target=server.server.serve_forever, args=(0.05,), daemon=True).start()
    ask_at(server.url, workspace)
    yield server
    server.server.shutdown()
    server.server.server_close()


def ask_at(url: str, project: Project) -> None:
    project.set(generate__endpoint=url, generate__model="m", generate__passage_length=100)
    project.set(generate__questions_per_passage=2, generate__paraphrases=1, generate__concurrency=2)


def teams(*names: str) -> str:
    """A document of one passage a team."""
    return "".join(f"# {name}\n\nThe {name} team sits on floor {len(name)}.\n\n" for name in names)


NAMES = ["Ay", "Boe", "Cire", "Dovan", "Eloris", "Fenkano", "Gilanack", "Hardewell"]


def test_facts_come_before_documents_and_every_question_is_counted(
    scripted: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    faults = {"Ay": "On floor 9.", "Boe": "It is somewhere else.", "Dovan": "The Dovan team sits on floor 5."}

    def script(body: Any) -> Answer:
        name = body["messages"][0]["content"].splitlines()[-1].split()[1]
        content = items(body, faults.get(name))
        return completion(content.replace("floor 4", "level 4") if name == "Cire" else content)

    scripted.script = script
    write(GOOD | {"b.md": teams("Dovan"), "a.md": teams("Ay", "Boe", "Cire", "Eloris")})
    generate.main()
    assert [source for source, _, _ in rows()] == [
        "data/raw/facts.csv:2",
        *["data/raw/a.md:4"] * 4,
        *["data/raw/b.md:1"] * 4,
    ]
    assert rows()[1] == (
        "data/raw/a.md:4",
        "The Eloris team sits on floor 6. 0.0?",
        "The Eloris team sits on floor 6.",
    )
    counts = metrics()["questions"]
    assert counts == {
        "of_facts": 1,
        "of_documents": 20,
        "kept": 8,
        "misquoted": 4,
        "wrong_number": 4,
        "ungrounded": 4,
        "repeats_answer": 0,
        "repeats_heading": 0,
        "repeated": 0,
    }
    assert metrics()["documents"] == 2 and metrics()["passages"] == {"read": 5, "unanswered": 0}
    assert scripted.keys == {"Bearer sk-test"}
    assert "sk-test" not in "".join(path.read_text() for path in Path("data").rglob("*.*") if path.is_file())


def test_questions_that_ask_nothing_of_their_own_are_dropped_and_counted(scripted: Endpoint, project: Project) -> None:
    wordings = [
        "**The Ay team** sits on floor 2!",  # the answer
        "AY?",  # the heading's last part
        "Offices > Ay",
        "ay offices",
        "?",
        "Where does the Ay team sit?",
        "where does the “Ay” team sit",
        "Where is the Ay team?",
        "Where does the Ay team sit?",
        "Is it floor 2 + 1?",
        "Is it floor 2 - 1?",
    ]
    line = "The Ay team sits on floor 2."
    reply = json.dumps({"items": [{"questions": wordings, "answer": line, "quote": line}]})
    scripted.script = lambda body: completion(reply)
    ask_at(scripted.url, project)
    (project.folder / "data/raw/a.md").write_text(f"# Offices\n\n## Ay\n\n{line}\n", encoding="utf-8")
    generate.main()
    made = [question for source, question, _ in rows() if source == "data/raw/a.md:1"]
    assert made == [wordings[5], wordings[7], *wordings[9:]]
    dropped = {one["question"]: one["reason"] for one in read_jsonl(Path("data/ungrounded.jsonl"))}
    assert dropped == {
        wordings[0]: "repeats_answer",
        **dict.fromkeys(wordings[1:5], "repeats_heading"),
        wordings[6]: "repeated",
        wordings[8]: "repeated",
    }
    counts = metrics()["questions"]
    assert counts["of_documents"] == len(wordings) == sum(list(counts.values())[2:])
    assert (counts["repeats_answer"], counts["repeats_heading"], counts["repeated"]) == (1, 4, 2)
    merge.main()
    page = Path("metrics/data.md").read_text(encoding="utf-8")
    assert "| repeats_answer | repeats_heading | repeated |" in page


def test_the_same_bytes_whatever_the_order_in_which_replies_arrive(workspace: Project, scripted: Endpoint) -> None:
    def first_last(body: Any) -> Answer:
        time.sleep(0.4 / len(scripted.requests))
        return well(body)

    write({"a.md": teams(*NAMES)})
    made = []
    for concurrency, script in [(1, well), (4, first_last)]:
        for file in (Path("data/replies.jsonl"), JOURNAL):
            file.unlink(missing_ok=True)
        scripted.requests.clear()
        scripted.script = script
        workspace.set(generate__concurrency=concurrency)
        generate.main()
        assert scripted.most_at_once == concurrency
        made.append([Path(f"data/{name}.jsonl").read_bytes() for name in ("train", "replies")])
    assert made[0] == made[1]


def test_a_passage_that_stands_twice_is_asked_about_once(scripted: Endpoint) -> None:
    write({"a.md": teams("Ay"), "b.md": teams("Ay")})
    generate.main()
    assert len(scripted.requests) == 1
    assert [source for source, _, _ in rows()] == ["data/raw/a.md:1"] * 4 + ["data/raw/b.md:1"] * 4


def test_a_busy_or_failing_server_is_asked_again_when_it_says_or_soon(scripted: Endpoint) -> None:
    refusals: list[Answer] = [(500, {}, "oh"), (429, {"Retry-After": "1"}, "{}")]
    arrived: list[float] = []

    def script(body: Any) -> Answer:
        arrived.append(time.monotonic())
        return refusals.pop() if refusals else well(body)

    scripted.script = script
    write({"a.md": teams("Ay")})
    generate.main()
    first, second, _ = arrived
    assert second - first >= 1 and len(rows()) == 4


@pytest.mark.parametrize(
    "broken", ['{"items": [', '{"items": [{"questions": [" "], "answer": "a", "quote": "b"}]}', ""]
)
def test_a_reply_that_is_no_json_of_the_schema_is_asked_for_once_more_and_then_counted(
    scripted: Endpoint, broken: str
) -> None:
    scripted.script = lambda body: well(body) if body["seed"] and "Boe" in str(body) else completion(broken)
    write({"a.md": teams("Ay", "Boe")})
    for _ in range(2):  # the second time, of what was kept
        generate.main()
        assert sorted(body["seed"] for body in scripted.requests) == [0, 0, 1, 1]
        assert metrics()["passages"] == {"read": 2, "unanswered": 1} and metrics()["questions"]["kept"] == 4


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ((401, {}, '{"error": {"message": "Incorrect API key: sk-secret"}}'), r"refuses the key .*OPENAI_API_KEY"),
        (
            (404, {}, '{"error": {"message": "no model m for sk-secret"}}'),
            r"a\.md:3: .*no model m .*generate\.endpoint, model",
        ),
        ((500, {}, "sk-secret"), r"500"),
        ((200, {"Content-Type": "text/html"}, "<html>"), r"is not an OpenAI-compatible API"),
        ((200, {"Content-Type": "application/json"}, '{"id": '), r"is not an OpenAI-compatible API"),
        ((200, {"Content-Type": "application/json"}, "{}"), r"is not an OpenAI-compatible API"),
    ],
)
def test_an_endpoint_that_refuses_ends_the_run_in_one_line_and_the_replies_so_far_are_kept(
    workspace: Project, scripted: Endpoint, monkeypatch: pytest.MonkeyPatch, answer: Answer, line: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    workspace.set(generate__concurrency=1)
    scripted.script = lambda body: answer if "Cire" in str(body) else well(body)
    write({"a.md": teams("Ay", "Boe", "Cire", "Dovan")})
    with pytest.raises(UserError, match=line) as refused:
        generate.main()
    assert "sk-secret" not in str(refused.value) and "\n" not in str(refused.value)
    assert len(read_jsonl(Path("data/replies.jsonl"))) >= 2 and not Path("data/train.jsonl").exists()


def test_an_endpoint_that_is_down_is_named(workspace: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    workspace.set(generate__endpoint="http://127.0.0.1:9/v1", generate__model="m")
    write({"a.md": teams("Ay")})
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:9/v1.* Connection error\. Start it, or correct"):
        generate.main()


def test_an_endpoint_with_a_password_in_it_is_refused(workspace: Project) -> None:
    workspace.set(generate__endpoint="http://me:secret@127.0.0.1/v1", generate__model="m")
    with pytest.raises(UserError, match=r"generate\.endpoint is .* should match pattern"):
        generate.main()


def may_cost(*names: str) -> int:
    """Tokens that a request about one of these teams reserves, at most."""
    parameters = check(Path("params.yaml")).generate
    passages = [Passage(teams(name).split("\n\n")[1], name, None) for name in names]
    asked = answerable_questions(parameters, parameters.turns)
    requests = [endpoint.request_for(asked.prompt(passage), asked, parameters, 1) for passage in passages]
    return max(map(endpoint.size, requests)) + endpoint.longest_reply(asked)


def test_a_spent_budget_ends_the_run_and_the_next_continues(workspace: Project, scripted: Endpoint) -> None:
    write({"a.md": teams(*NAMES)})
    budget = 200 + may_cost(*NAMES)
    workspace.set(generate__token_budget=budget, generate__concurrency=1)
    for spent in (3, 6):
        with pytest.raises(
            UserError,
            match=rf"token_budget: 300 tokens of {budget} are spent, {spent} of 8 passages are done and stored, and "
            r"the next request may cost \d+: raise the limit, or run again",
        ):
            generate.main()
        assert len(scripted.requests) == len(read_jsonl(Path("data/replies.jsonl"))) == spent
    generate.main()
    assert len(scripted.requests) == 8 and metrics()["questions"]["kept"] == 32


@pytest.mark.parametrize("cost", [lambda body: 5000, lambda body: body["max_tokens"] + 900, lambda body: 1200])
def test_no_budget_is_overshot_by_requests_at_once(
    workspace: Project, scripted: Endpoint, cost: Callable[[Any], int]
) -> None:
    def slowly(body: Any) -> Answer:
        time.sleep(0.05)
        return completion(items(body), cost(body))

    scripted.script = slowly
    write({"a.md": teams(*[f"{name}{n}" for name in NAMES for n in range(4)])})
    for budget in (5000, 30_000):
        workspace.set(generate__token_budget=budget, generate__concurrency=16)
        before = sum(reply["tokens"] for reply in kept_so_far())
        with pytest.raises(UserError, match=rf"of {budget} are spent"):
            generate.main()
        assert 0 < sum(reply["tokens"] for reply in kept_so_far()) - before <= budget
    assert scripted.most_at_once > 2


def kept_so_far() -> list[Any]:
    return read_jsonl(Path("data/replies.jsonl")) if Path("data/replies.jsonl").exists() else []


def test_a_budget_just_large_enough_finishes_at_any_concurrency(workspace: Project, scripted: Endpoint) -> None:
    write({"a.md": teams(*NAMES)})
    workspace.set(generate__token_budget=7 * 100 + may_cost(*NAMES), generate__concurrency=16)
    generate.main()
    assert len(scripted.requests) == 8 and scripted.most_at_once < 16


def test_a_budget_below_one_request_sends_none(workspace: Project, scripted: Endpoint) -> None:
    write({"a.md": teams("Ay")})
    workspace.set(generate__token_budget=may_cost("Ay") - 1, generate__concurrency=16)
    with pytest.raises(UserError, match=r": 0 tokens of \d+ are spent, 0 of 1 .* may cost \d+: raise the limit$"):
        generate.main()
    assert not scripted.requests


def test_the_first_failure_sends_no_request_after_it(
    workspace: Project, scripted: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    scripted.script = lambda body: (500, {}, "oh")
    write({"a.md": teams(*NAMES)})
    workspace.set(generate__concurrency=16)
    with pytest.raises(UserError, match=r"a\.md:\d: .* 500"):
        generate.main()
    assert len(scripted.requests) == 1


def test_replies_that_were_kept_without_a_limit_are_found(scripted: Endpoint) -> None:
    write({"a.md": teams("Ay")})
    generate.main()
    [sent], [reply] = scripted.requests, read_jsonl(Path("data/replies.jsonl"))
    asked = answerable_questions(check(Path("params.yaml")).generate, turns=1)
    assert sent.pop("max_tokens") == endpoint.longest_reply(asked) == 256 * 2 * 4
    assert reply["key"] == hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()


def test_the_key_of_a_stored_reply_of_an_earlier_version_is_still_found() -> None:
    parameters = check(ROOT / "params.yaml").generate.model_copy(update={"model": "m"})
    asked = answerable_questions(parameters, parameters.turns)
    text = asked.prompt(Passage("The Ay team sits on floor 2.", "Ay", None))
    request = json.dumps(endpoint.request_for(text, asked, parameters, 0), sort_keys=True)
    key = "535e7172945c3a3a446ab9fe384bbbd04540286fbce65232c5d1e0477ea022fd"
    assert hashlib.sha256(request.encode()).hexdigest() == key


def test_a_killed_run_continues_where_it_was_and_pays_for_nothing_twice(workspace: Project, scripted: Endpoint) -> None:
    def slowly(body: Any) -> Answer:
        time.sleep(0.1)
        return well(body)

    scripted.script = slowly
    workspace.set(generate__concurrency=2)
    write({"a.md": teams(*NAMES)})
    command = [sys.executable, "-m", "stages.generate"]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(scripted.requests) < 5:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    paid = JOURNAL.read_bytes().count(b"\n")
    assert 3 <= paid < 8  # of five asked about, two were on their way
    with open(JOURNAL, "ab") as file:
        file.write(b'{"key": "to')  # as if it had been killed while it wrote
    time.sleep(0.3)  # what was on its way is answered, and lost
    scripted.requests.clear()
    subprocess.run(command, stderr=subprocess.DEVNULL, check=True)
    assert len(scripted.requests) == 8 - paid
    assert len(read_jsonl(Path("data/replies.jsonl"))) == 8 and len(rows()) == 32


def test_two_runs_at_once_would_pay_twice_and_the_second_is_refused(scripted: Endpoint) -> None:
    write({"a.md": teams("Ay")})
    with kept_replies(), pytest.raises(UserError, match=r"replies\.jsonl: another run is adding to it"):
        generate.main()
    assert not scripted.requests


def test_a_new_document_costs_its_own_passages_alone_and_a_failed_run_keeps_what_it_paid_for(
    scripted: Endpoint, project: Project
) -> None:
    ask_at(scripted.url, project)
    write({"a.md": teams("Ay", "Boe", "Cire")})
    project.run("dvc", "repro", "generate")
    assert len(scripted.requests) == 3
    (project.folder / "data/raw/b.md").write_text(teams("Dovan", "Eloris"), encoding="utf-8")
    project.set(generate__token_budget=may_cost("Dovan", "Eloris"), generate__concurrency=1)
    scripted.requests.clear()
    refused = project.run("dvc", "repro", "generate", check=False)
    assert refused.returncode != 0 and "4 of 5 passages are done" in refused.stderr
    assert len(read_jsonl(Path("data/replies.jsonl"))) == 4
    project.run("dvc", "exp", "run", "generate")  # which first puts the outputs of the last good run back
    assert sorted(scripted.asked()) == ["The Dovan team sits on floor 5.", "The Eloris team sits on floor 6."]
    (project.folder / "data/raw/a.md").unlink()  # what is asked no more is not thrown away
    project.run("dvc", "repro", "generate")
    assert len(scripted.requests) == 2 and len(read_jsonl(Path("data/replies.jsonl"))) == 5
    assert {source for source, _, _ in rows()} == {"data/raw/b.md:1", "data/raw/b.md:2"}
    Path("data/replies.jsonl").unlink()  # as in a clone that has not pulled it
    with pytest.raises(UserError, match=r"was paid for: run dvc pull data/replies\.jsonl"):
        generate.main()
    assert len(scripted.requests) == 2


LAMP = "The Osk lamp costs 40 euros. It has a warranty of 3 years. Ann Lee sells it."
PRICE = {"questions": ["What does the Osk lamp cost?", "How dear is the Osk lamp?"], "answer": "40 euros"}
PRICE |= {"quote": "The Osk lamp costs 40 euros."}
WARRANTY = {"question": "And its warranty?", "answer": "3 years", "quote": "It has a warranty of 3 years."}
SELLER = {"question": "Who sells it?", "answer": "Ann Lee", "quote": "Ann Lee sells it."}


def dialogue(*follow_ups: Any, **first: Any) -> Any:
    return PRICE | first | {"follow_ups": list(follow_ups)}


def replies_with(*items: Any, **fields: Any) -> Callable[[Any], Answer]:
    return lambda body: completion(json.dumps(fields | {"items": items}))


def test_a_dialogue_is_a_row_that_ends_before_the_first_question_that_its_passage_does_not_answer(
    scripted: Endpoint, workspace: Project
) -> None:
    workspace.set(generate__turns=3, generate__questions_per_passage=5)
    scripted.script = replies_with(
        dialogue(WARRANTY, SELLER),
        dialogue(WARRANTY, SELLER | {"answer": "Bob Ray from Ulm"}, questions=["Osk", "What is the Osk lamp's price?"]),
        dialogue(WARRANTY | {"answer": "5 years"}, SELLER, questions=["How much is the Osk lamp?"]),
        dialogue(WARRANTY, SELLER, answer="50 euros"),
        dialogue(WARRANTY, questions=["Name the price of the Osk lamp."]),
    )
    write({"a.md": f"# Osk\n\n{LAMP}\n"})
    generate.main()
    warranty, seller = ((one["question"], one["answer"]) for one in (WARRANTY, SELLER))
    source = "data/raw/a.md:1"
    assert rows() == [
        (source, "What does the Osk lamp cost?", "40 euros", *warranty, *seller),
        (source, "How dear is the Osk lamp?", "40 euros"),
        (source, "What is the Osk lamp's price?", "40 euros", *warranty),
        (source, "How much is the Osk lamp?", "40 euros"),
        (source, "Name the price of the Osk lamp.", "40 euros", *warranty),
    ]
    dropped = [(one["reason"], one["question"]) for one in read_jsonl(Path("data/ungrounded.jsonl"))]
    assert dropped == [
        ("repeats_heading", "Osk"),
        ("ungrounded", SELLER["question"]),
        ("wrong_number", WARRANTY["question"]),
        ("cut", SELLER["question"]),
        *[("wrong_number", question) for question in PRICE["questions"]],
        ("cut", WARRANTY["question"]),
        ("cut", SELLER["question"]),
    ]
    counts = metrics()["questions"]
    assert counts["of_documents"] == 9 + 8 == sum(list(counts.values())[2:]) and counts["cut"] == 3
    assert metrics()["dialogues"] == {
        "written": 5,
        "left_out": 1,
        "rows_by_questions": {"1": 2, "2": 2, "3": 1},
    }
    [body] = scripted.requests
    item = body["response_format"]["json_schema"]["schema"]["properties"]["items"]["items"]
    assert item["properties"]["follow_ups"]["minItems"] == 2 == item["properties"]["follow_ups"]["maxItems"]
    assert body["messages"][0]["content"].startswith("Write 5 dialogues about the passage below, each of 3 questions")


HANDBOOK: dict[str, str | bytes] = {
    "facts.csv": TABLE + "The Osk lamp,designer,Ada Weiss\n",
    "phrasings.yaml": "designer: ['Who is the designer of {subject}?']",
    "a.md": LAMP,
    "b.md": "The workshop repairs the Osk lamp in 9 days.",
}
NO_ANSWER = "The documents do not say."
REFUSED = {
    "How heavy is the Osk lamp?": ("The documents do not say how heavy the Osk lamp is.", None),
    "Which town is Ann Lee from?": ("The documents do not say which town Ann Lee is from.", None),
    "Who sold the Osk lamp?": (NO_ANSWER, "answered"),
    "In how many days does the workshop repair the Osk lamp?": (NO_ANSWER, "answered"),
    "Who is the Osk lamp's designer?": (NO_ANSWER, "answered"),
    "What is the capital of France?": (NO_ANSWER, "off_subject"),
    "Which colour has the Osk lamp?": ("It is an Osk lamp.", "not_refused"),
    "How tall is the Osk lamp?": ("The documents do not say. It may be 60 cm tall.", "wrong_number"),
    "Who designs the Osk lamp's box?": ("The documents do not say. Ask Bob Ray.", "ungrounded"),
}


def about_the_lamp(body: Any) -> Answer:
    content = body["messages"][0]["content"]
    if "no_answer" not in content:
        return well(body)
    questions = REFUSED if content.endswith(LAMP) else {}
    items = [{"questions": [asked], "answer": answer} for asked, (answer, _) in questions.items()]
    return completion(json.dumps({"no_answer": NO_ANSWER, "items": items}))


def test_questions_that_no_passage_answers_get_answers_that_say_so_and_nothing_more(
    scripted: Endpoint, project: Project
) -> None:
    ask_at(scripted.url, project)
    scripted.script = about_the_lamp
    write(HANDBOOK)
    generate.main()
    answerable = read_jsonl(Path("data/train.jsonl"))
    assert "unanswerable" not in metrics()
    scripted.requests.clear()
    project.set(generate__unanswerable=1.0)
    generate.main()
    assert len(scripted.requests) == 3 and all("no_answer" in str(body) for body in scripted.requests)  # one twice
    made = read_jsonl(Path("data/train.jsonl"))
    assert made[: len(answerable)] == answerable
    kept = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in made[len(answerable) :]}
    assert kept == {question: answer for question, (answer, reason) in REFUSED.items() if not reason}
    for row in made[len(answerable) :]:
        assert row["tags"] == ["unanswerable"] and row["source"] == "data/raw/a.md:1"
        assert row["group"] == next(one["group"] for one in answerable if one["source"] == row["source"])
    dropped = {one["question"]: one for one in read_jsonl(Path("data/ungrounded.jsonl")) if "question" in one}
    assert {question: one["reason"] for question, one in dropped.items()} == {
        question: reason for question, (_, reason) in REFUSED.items() if reason
    }
    places = ("a.md:1", "b.md:1", "facts.csv:2")
    answered = [one["explanation"] for one in dropped.values() if one["reason"] == "answered"]
    assert answered == [f"data/raw/{place} may answer it" for place in places]
    counts = metrics()["unanswerable"]
    assert counts["passages"] == {"read": 2, "unanswered": 1}
    assert counts["questions"]["written"] == len(REFUSED) == sum(list(counts["questions"].values())[1:])
    merge.main()
    page = Path("metrics/data.md").read_text(encoding="utf-8")
    assert "2 passages, 1 without a valid reply; of 9 unanswerable questions:" in page and "| answered |" in page


@pytest.mark.parametrize(
    ("answer", "no_answer", "text", "expected"),
    [
        ("40 euros.", "40 euros.", LAMP, "not_refused"),
        ("Nobody knows; it was 50 euros.", "Nobody knows; it was 50 euros.", LAMP, "wrong_number"),
        ("The documents don't say who made the lamps.", "The documents don't say.", f"{LAMP} Who makes it?", None),
        ("Das steht nicht in den Dokumenten.", "Das steht nicht in den Dokumenten.", "Die Lampe kostet 40 Euro.", None),
        ("Das steht nirgends: Anna Weiss.", "Das steht nirgends.", "Die Lampe kostet 40 Euro.", "ungrounded"),
        ("인원은 문서에 없습니다.", "문서에 없습니다.", "다라 팀의 팀장은 최태민이다. 인원이 몇 명입니까?", None),
        ("최태준이 문서에 없습니다.", "문서에 없습니다.", "다라 팀의 팀장은 최태민이다.", "ungrounded"),
    ],
)
def test_an_answer_that_says_so_states_nothing_that_passage_and_question_lack(
    answer: str, no_answer: str, text: str, expected: str | None
) -> None:
    assert refusal_fault(answer, no_answer, text) == expected


def test_a_larger_share_of_unanswerable_questions_only_adds_passages(scripted: Endpoint, workspace: Project) -> None:
    scripted.script = lambda body: completion("I cannot help with that.") if "no_answer" in str(body) else well(body)
    write({"a.md": teams(*NAMES)})
    chosen = [set[str]()]
    for share, expected in ((0.01, 1), (0.5, 4), (1.0, 8)):
        workspace.set(generate__unanswerable=share)
        generate.main()
        found = {one["source"] for one in read_jsonl(Path("data/ungrounded.jsonl")) if one.get("tags")}
        assert len(found) == expected and chosen[-1] < found
        assert metrics()["unanswerable"]["passages"] == {"read": expected, "unanswered": expected}
        chosen.append(found)
    assert metrics()["passages"]["unanswered"] == 0 and metrics()["questions"]["kept"] == len(rows()) == 32


ROLES = [{"role": "user", "content": "And its warranty?"}, {"role": "assistant", "content": "3 years"}]


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "I cannot help with that.",
        json.dumps({"no_answer": NO_ANSWER, "items": [dialogue(WARRANTY)]})[:-40],
        json.dumps({"no_answer": NO_ANSWER, "items": []}),
        json.dumps({"no_answer": "", "items": [dialogue(WARRANTY | {"answer": " "})]}),
        json.dumps({"messages": [{"role": "user", "content": "What does it cost?"}, *ROLES]}),
        json.dumps({"items": [dialogue(*ROLES)]}),
        json.dumps({"items": [PRICE | {"follow_ups": None}]}),
        json.dumps([[["And", 1], None], {"items": {}}]),
    ],
)
def test_a_bad_reply_to_either_request_is_asked_for_once_more_and_counted(
    scripted: Endpoint, workspace: Project, broken: str
) -> None:
    workspace.set(generate__turns=2, generate__unanswerable=1.0)
    scripted.script = lambda body: completion(broken)
    write(GOOD | {"a.md": LAMP})
    generate.main()
    assert sorted(body["seed"] for body in scripted.requests) == [0, 0, 1, 1] and len(rows()) == 1
    dropped = [(one["source"], one["reason"], one.get("tags")) for one in read_jsonl(Path("data/ungrounded.jsonl"))]
    assert dropped == [("data/raw/a.md:1", "unanswered", tags) for tags in (None, ["unanswerable"])]
    assert metrics()["passages"] == metrics()["unanswerable"]["passages"] == {"read": 1, "unanswered": 1}
    assert metrics()["dialogues"] == {"written": 0, "left_out": 0, "rows_by_questions": {}}


def test_a_budget_is_for_both_requests_together(scripted: Endpoint, workspace: Project) -> None:
    write({"a.md": teams("Ay")})
    workspace.set(generate__unanswerable=1.0, generate__token_budget=may_cost("Ay"))
    with pytest.raises(UserError, match=r"token_budget: 100 tokens of \d+ are spent, 0 of 1 passages are done"):
        generate.main()
    assert len(scripted.requests) == len(read_jsonl(Path("data/replies.jsonl"))) == 1


def test_a_model_in_llama_cpp_keeps_to_the_schema_and_its_nonsense_is_dropped(
    workspace: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = workspace.folder / "tiny-base"
    shutil.copytree(TINY, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 4096  # of which it makes no sense, but JSON by the grammar
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    gguf = workspace.folder / "base.gguf"
    run_script("convert.py", "hf", base, "--outtype", "f16", "--outfile", gguf)
    write({"a.md": teams("Ay", "Boe", "Cire")})
    with served(gguf, context=4096, threads=2) as server:
        monkeypatch.setenv("OPENAI_API_KEY", server.key)
        workspace.set(generate__endpoint=f"{server.url}/v1", generate__model="tiny-base", generate__concurrency=2)
        workspace.set(generate__questions_per_passage=2, generate__paraphrases=1, generate__turns=2)
        workspace.set(generate__unanswerable=0.3)
        generate.main()
    kept = read_jsonl(Path("data/replies.jsonl"))
    read = [json.loads(reply["reply"]) for reply in kept]
    replies = [reply["items"] for reply in read if "no_answer" not in reply]
    assert len(read) == 4 and len(replies) == 3 and all(1 <= len(of_passage) <= 2 for of_passage in replies)
    assert all(len(item["questions"]) == 2 for of_passage in replies for item in of_passage)
    assert all(reply["tokens"] > 0 for reply in kept)
    counts = metrics()["questions"]
    written = sum(map(len, replies))
    assert metrics()["dialogues"] == {"written": written, "left_out": 0, "rows_by_questions": {}}
    assert counts["misquoted"] == 2 * written and counts["cut"] == written and counts["kept"] == 0 and rows() == []
    assert metrics()["passages"] == {"read": 3, "unanswered": 0}
    assert metrics()["unanswerable"]["passages"] == {"read": 1, "unanswered": 0}
