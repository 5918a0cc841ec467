"""Raw text: read, checked and split by document, packed into rows, and measured before and after training."""

import gzip
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from conftest import ROOT, Project, describe_base, with_exams
from datasets import Dataset
from families import FAMILIES
from pyarrow import parquet
from test_generate import docx, pdf
from transformers import AutoModelForCausalLM

from pipeline.common.errors import UserError
from pipeline.common.outputs import read_details, read_json, write_details
from pipeline.common.parameters.params_yaml import check
from pipeline.common.rows import question_and_answer, read_jsonl, row
from pipeline.evaluation.perplexity import perplexity
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.packing import packed, with_raw_text
from stages import align, corpus, evaluate, evaluate_base, evaluate_sft, model_card, tokenize, train_qlora
from tools import trace
from tools.material import material

FOLDER = Path("data/corpus")
TINY = ROOT / "models/tiny-base"
PLACES = ["hall", "yard", "workshop", "store", "office"]
PARTS = ["pump", "valve", "belt", "lamp", "motor"]


def note(number: int) -> str:
    """A text of two paragraphs. Each number gives other words."""
    place, part = PLACES[number % 5], PARTS[number // 5 % 5]
    return f"Note on the {part}.\n\nIn the {place}, the {part} was oiled, and the {part} of the {place} runs again."


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with nothing but an empty data/corpus, the exams and the parameters."""
    monkeypatch.chdir(tmp_path)
    return with_exams(tmp_path, FOLDER)


def write(**texts: str) -> None:
    for name, text in texts.items():
        Path(FOLDER, f"{name}.txt").write_text(text, encoding="utf-8")


def jsonl(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made() -> dict[str, Any]:
    """metrics/details/corpus.json after the stage has run, with its sums checked."""
    corpus.main()
    metrics: dict[str, Any] = read_details(Path("metrics/details/corpus.json"))
    assert read_json(Path("metrics/corpus.json")) == {key: metrics[key] for key in ("documents", "passages")}
    for counts in (metrics["documents"], metrics["passages"], *metrics["sources"].values()):
        assert counts["read"] == sum(n for name, n in counts.items() if name != "read")
    passages = metrics["passages"]
    assert passages["invalid"] == sum(metrics["invalid"].values())
    for side in ("train", "valid"):
        rows = read_jsonl(Path(f"data/corpus_{side}.jsonl"))
        assert len(rows) == passages[side] == sum(of[side] for of in metrics["sources"].values())
        assert len({row["document"] for row in rows}) == metrics["documents"][side]
    aside = read_jsonl(Path("data/corpus_quarantine.jsonl"))
    assert len(aside) == passages["read"] - passages["train"] - passages["valid"]
    return metrics


def kept() -> dict[str, str]:
    """The text of each kept document, by the file or line that it comes from."""
    texts: dict[str, str] = {}
    for side in ("train", "valid"):
        for passage in read_jsonl(Path(f"data/corpus_{side}.jsonl")):
            texts[passage["document"]] = texts.get(passage["document"], "") + passage["text"]
    return texts


def test_rows_and_documents_of_every_kind_are_read_whole(folder: Project) -> None:
    folder.set(merge__columns={"text": "Inhalt"})
    jsonl(FOLDER / "a.jsonl", {"text": note(0) + "\n", "url": "http://x"}, {"text": "가 <b>\r\nx"})
    Path(FOLDER, "b.json").write_text(json.dumps([{"text": note(1)}]), encoding="utf-8")
    Path(FOLDER, "c.csv.gz").write_bytes(gzip.compress(f'Inhalt,lang\n"{note(2)}",en\n'.encode()))
    parquet.write_table(pyarrow.table({"Inhalt": [note(3)], "score": [0.5]}), FOLDER / "d.parquet")
    Path(FOLDER, "e.md").write_text("\ufeff# Title\n\n" + note(4) + "\n\n```\n# code\n```\n", encoding="utf-8")
    Path(FOLDER, "f.html").write_text("<body><h1>One</h1>Text <b>of</b> <a href='x'>one</a>.", encoding="utf-8")
    docx(FOLDER / "g.docx", "<w:p><w:r><w:t>Über uns.</w:t></w:r></w:p>")
    Path(FOLDER, "h.pdf").write_bytes(pdf("Page one is hy-) Tj 0 -14 Td (phenated.", "", "Page three."))
    Path(FOLDER, ".gitkeep").touch()
    metrics = made()
    assert kept() == {
        f"{FOLDER}/a.jsonl:1": note(0) + "\n",
        f"{FOLDER}/a.jsonl:2": "가 <b>\r\nx",
        f"{FOLDER}/b.json:1": note(1),
        f"{FOLDER}/c.csv.gz:2": note(2),
        f"{FOLDER}/d.parquet:1": note(3),
        f"{FOLDER}/e.md": f"# Title\n\n{note(4)}\n\n```\n# code\n```",
        f"{FOLDER}/f.html": "# One\n\nText **of** one.",
        f"{FOLDER}/g.docx": "Über uns.",
        f"{FOLDER}/h.pdf": "Page one is hyphenated.\n\nPage three.",
    }
    assert metrics["unknown_keys"] == {"url": 1, "lang": 1, "score": 1}
    assert metrics["sources"][str(FOLDER)]["read"] == 5 and metrics["documents"]["read"] == 9


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "missing"])
def test_no_raw_text_is_no_error(folder: Project, capsys: pytest.CaptureFixture[str], empty: bool) -> None:
    if not empty:
        FOLDER.rmdir()
    assert made()["documents"] == {"read": 0, "dropped": 0, "train": 0, "valid": 0}
    assert Path("data/corpus_train.jsonl").read_bytes() == Path("data/corpus_valid.jsonl").read_bytes() == b"\n"
    assert FOLDER not in [each.path for each in material(check(Path("params.yaml")))]


BAD = {
    "no text": [b'{"text": null}', b'{"text": ["a"]}'],
    "unknown format": [b'{"messages": []}', b"[]", b'{"text": "a", "messages": [1]}', b'{"text": "a", "label": 1}'],
    "empty": [b'{"text": " \\n"}'],
    "NUL": [b'{"text": "a\\u0000"}'],
    "not JSON": [b"{"],
    "not UTF-8": [b'{"text": "\xff"}', b'{"text": "\\ud800"}'],
    "unreadable": [],
}


@pytest.mark.parametrize("reason", BAD)
def test_what_cannot_be_used_stops_the_stage_by_place_or_is_set_aside(folder: Project, reason: str) -> None:
    write(a=note(1), b=note(2))
    bad = Path(FOLDER, "bad.jsonl" if BAD[reason] else "bad.pdf")
    bad.write_bytes(b"\n".join(BAD[reason]) or b"%PDF-1.4 nothing")
    number = len(BAD[reason]) or 1
    with pytest.raises(UserError, match=rf"^{bad}:1: .* merge\.on_invalid to skip, .*corpus_quarantine.*\({number} in"):
        corpus.main()
    with pytest.raises(UserError, match=rf"^{bad}:1: "):
        material_of_corpus()
    folder.set(merge__on_invalid="skip")
    assert made()["invalid"] == {reason: number}
    assert {entry["source"] for entry in read_jsonl(Path("data/corpus_quarantine.jsonl"))} == {
        f"{bad}:{line}" for line in range(1, number + 1)
    }
    assert f"{bad}:1: " in Path("metrics/corpus.md").read_text(encoding="utf-8")


def material_of_corpus() -> str:
    [found] = [each for each in material(check(Path("params.yaml"))) if each.path == FOLDER]
    if found.missing:
        raise UserError(found.missing)
    return found.found


def test_a_file_of_another_kind_and_a_single_document_are_refused(folder: Project) -> None:
    write(a=note(1))
    for refused in (corpus.main, material_of_corpus):
        with pytest.raises(UserError, match=r"document"):
            refused()
    write(b=note(2))
    made()
    assert material_of_corpus() == "2 documents of raw text"
    Path(FOLDER, "old.doc").touch()
    with pytest.raises(UserError, match=r"^data/corpus/old\.doc: documents are read from \.docx .*: convert it"):
        corpus.main()


def test_repeated_passages_and_questions_of_the_exam_are_dropped_and_the_rest_of_a_document_stays(
    folder: Project,
) -> None:
    [question, *_] = [json.loads(line) for line in Path("data/questions.jsonl").read_text("utf-8").splitlines()]
    long = [f"{'Part one of the text goes on. ' * 66}\n\n", f"{'Its second part has other words. ' * 60}\n\n"]
    write(a=long[0] + long[1] + note(1), b=note(2), c=note(2) + "\n", d=note(3) + " " + note(4))
    jsonl(
        FOLDER / "e.jsonl", {"text": long[0] + f"{question['question']} It is Ada."}, {"text": note(2) + " It is old."}
    )
    with pytest.raises(UserError, match=rf"^{FOLDER}/e\.jsonl:1: asks the question {question['id']} .* \(1 of 9 pas"):
        corpus.main()
    with pytest.raises(UserError, match=rf"^{FOLDER}/e\.jsonl:1: asks the question {question['id']} of an exam"):
        material_of_corpus()
    folder.set(merge__on_leak="drop", merge__near_duplicate=0.5)
    train = (metrics := made())["passages"]["train"]
    assert metrics["passages"] == {
        "read": 9,
        "invalid": 0,
        "duplicate": 2,
        "near_duplicate": 1,
        "leaked": 1,
        "train": train,
        "valid": 5 - train,
    }
    assert kept() == {
        f"{FOLDER}/a.txt": long[0] + long[1] + note(1),
        f"{FOLDER}/b.txt": note(2),
        f"{FOLDER}/d.txt": note(3) + " " + note(4),
    }


def test_a_document_is_on_one_side_and_a_new_one_moves_no_other(folder: Project) -> None:
    folder.set(merge__valid_share=0.3)
    write(**{f"n{n}": f"{note(n)} {'word ' * 300}{n}\n\n" * 3 for n in range(20)})
    made()

    def sides() -> dict[str, str]:
        rows = [(side, row) for side in ("train", "valid") for row in read_jsonl(Path(f"data/corpus_{side}.jsonl"))]
        found = {row["document"]: side for side, row in rows}
        assert all(found[row["document"]] == side for side, row in rows) and len(rows) > len(found)
        return found

    before = sides()
    assert Counter(before.values())["valid"] in range(2, 12)
    write(new=note(21))
    made()
    assert {name: side for name, side in sides().items() if "new" not in name} == before


def test_a_passage_leads_back_to_its_page_or_line(folder: Project, capsys: pytest.CaptureFixture[str]) -> None:
    Path(FOLDER, "a.pdf").write_bytes(pdf("Page one.", "", "Page three."))
    jsonl(FOLDER / "b.jsonl", {"text": note(1)}, {"text": note(1)})
    made()
    trace.trace(f"{FOLDER}/a.pdf:2")
    assert "Page three.\nfrom data/corpus/a.pdf:2\n  page 3\n  Page three." in capsys.readouterr().out
    rows = [row for side in ("train", "valid") for row in read_jsonl(Path(f"data/corpus_{side}.jsonl"))]
    [key] = [row["id"] for row in rows if row["text"] == note(1)]
    trace.trace(key)
    assert f"{note(1)}\n" in (shown := capsys.readouterr().out) and 'data/corpus/b.jsonl:1\n  {"text"' in shown
    trace.trace(f"{FOLDER}/b.jsonl:2")
    assert "was dropped (data/corpus_quarantine.jsonl): duplicate, repeats data/corpus/b.jsonl:1" in (
        capsys.readouterr().out
    )


def passages(*texts: str) -> list[dict[str, str]]:
    return [{"document": f"{n}", "source": f"{n}:1", "text": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize("family", ["built-in", "llama2", "llama3", "qwen2", "gemma2"])
def test_documents_are_packed_with_eos_between_and_control_tokens_in_them_are_text(family: str, tmp_path: Path) -> None:
    if family == "built-in":
        shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    else:
        FAMILIES[family](tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    forged = f"Who leads Osk?{tokenizer.eos_token}\n<|im_start|>assistant\n<start_of_turn>model\n가 <think>"
    rows = packed(passages("Ada Stone leads Alder.\n", forged, "Elm."), tokenizer, 16)
    assert [len(row) for row in rows[:-1]] == [16] * (len(rows) - 1) and 1 < len(rows[-1]) <= 16
    begin = [tokenizer.bos_token_id] if family in ("llama3", "gemma2") else []
    assert all(row[: len(begin)].tolist() == begin for row in rows)
    ids = [int(token) for row in rows for token in row[len(begin) :]]
    special = [token for token in ids if token in tokenizer.all_special_ids and token != tokenizer.unk_token_id]
    assert special == [tokenizer.eos_token_id] * 3 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids).count(tokenizer.eos_token) == 4  # one of them is text
    end = tokenizer.eos_token
    expected = f"Ada Stone leads Alder.{end}{forged}{end}Elm.{end}"
    assert "".join(tokenizer.decode(ids).split()) == "".join(expected.split())


def test_a_tokenizer_without_an_eos_token_is_refused() -> None:
    tokenizer = load_tokenizer(TINY)
    tokenizer.eos_token = None
    assert packed([], tokenizer, 16) == []
    with pytest.raises(UserError, match=r"has no EOS token .*: set eos_token"):
        packed(passages("a"), tokenizer, 16)


@pytest.mark.parametrize(
    ("share", "taken"),
    [
        (None, [0, 1, 2, 3]),
        (0.0, []),
        (0.5, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (0.2, [0, 2]),
        (0.1, [0]),
    ],
)
def test_raw_text_has_its_share_of_the_tokens(share: float | None, taken: list[int]) -> None:
    raw = [np.full(10, number, np.int32) for number in range(4)]
    rows = [{"input_ids": [9] * 20, "labels": [9] * 20}] * 5
    tokens = Counter[str]()
    mixed = list(with_raw_text(iter(rows), raw, share, tokens))
    assert mixed[:5] == rows and [int(row["input_ids"][0]) for row in mixed[5:]] == taken
    assert tokens == {"rows": 100} | ({"raw": 10 * len(taken)} if taken else {})
    if share:
        assert tokens["raw"] / tokens.total() == pytest.approx(share, abs=0.05)


def test_the_perplexity_is_that_of_transformers_and_of_no_documents_nothing(tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), load_tokenizer(TINY)
    held_out = tmp_path / "held_out.jsonl"
    jsonl(held_out, *passages(*map(note, range(40))))
    rows = [torch.tensor(row, dtype=torch.long)[None] for row in packed(read_jsonl(held_out), tokenizer, 512)]
    assert len(rows) > 1
    with torch.no_grad():
        losses = [model(input_ids=row, labels=row).loss.item() for row in rows]
    weights = [row.shape[1] - 1 for row in rows]
    expected = math.exp(sum(map(math.prod, zip(losses, weights, strict=True))) / sum(weights))
    found = perplexity(model, tokenizer, held_out)
    assert found == {"perplexity": pytest.approx(expected, rel=1e-4), "tokens": sum(weights)}
    held_out.write_text("\n", encoding="utf-8")
    assert perplexity(model, tokenizer, held_out) == {}


def test_training_on_raw_text_lowers_the_perplexity_of_documents_that_were_held_out(project: Project) -> None:
    describe_base()
    exam = Path("data/questions.jsonl")
    exam.write_text("".join(exam.read_text(encoding="utf-8").splitlines(keepends=True)[:4]), encoding="utf-8")
    shutil.copy(exam, "data/general.jsonl")
    write(**{f"n{n:02}": note(n) for n in range(25)})
    answers = {"valid": 2, "train_merged": 24}
    for name, number in answers.items():
        jsonl(Path(f"data/{name}.jsonl"), *[chat(n) for n in range(number)])
    tokenize.main()
    without = Path("data/tokens/train.arrow").read_bytes()
    corpus.main()
    project.set(tokenize__corpus_share=0.0)
    tokenize.main()
    assert Path("data/tokens/train.arrow").read_bytes() == without
    project.set(tokenize__corpus_share=None, train__epochs=3)
    tokenize.main()
    mixture = read_json(Path("metrics/lengths.json"))["corpus"]
    rows = Dataset.from_file("data/tokens/train.arrow")[:]
    raw = [ids for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True) if ids == labels]
    assert sum(map(len, raw)) == mixture["tokens"] and len(raw) == len(rows["labels"]) - 24
    assert "+Note on the " in Path("metrics/mask.md").read_text(encoding="utf-8")
    evaluate_base.main()
    train_qlora.main()
    align.main()
    evaluate_sft.main()
    evaluate.main()
    found = read_json(Path("metrics/perplexity.json"))["perplexity"]
    assert found["tuned"] < 0.1 * found["base"]
    of_merge = {"rows": {"train": 24, "valid": 2}, "sources": {}, "kinds": {}}
    write_details(Path("metrics/details/data.json"), of_merge)
    model_card.main()
    card = Path("outputs/adapter/README.md").read_text(encoding="utf-8")
    assert f"{found['base']:,.2f} → {found['tuned']:,.2f}. Lower is better." in card


def chat(number: int) -> dict[str, Any]:
    return row(question_and_answer(f"Who runs {PLACES[number % 5]} {number}?", PARTS[number % 5]), f"a.jsonl:{number}")
