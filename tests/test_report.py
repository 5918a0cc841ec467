"""The report: what it says of a run, and that its page works in a real browser."""

import csv
import functools
import html
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
from conftest import ROOT, environment
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pipeline.common.errors import UserError
from pipeline.common.markdown import quoted, table
from pipeline.evaluation import comparison
from pipeline.evaluation.questions import Answer, Question
from pipeline.evaluation.rules import read_rule
from pipeline.evaluation.scores import graded
from pipeline.report.readable import SCORES
from stages import report

FILES = ("merged", "adapter-f16.gguf", "model-f16.gguf", "model-q8_0.gguf")
HOSTILE = (
    "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"> ' \u2028 & \x07"
)

Row = tuple[dict[str, Any], str, str]  # a line of an exam, the answer before, the answer after
SFT = {"q1": "no", "q2": "yes", "q4": "yes", "g2": "yes"}  # by id, the other answers of SFT are those after


def asked(number: int, before: str, after: str, **others: Any) -> Row:
    return {"id": f"q{number}", "question": f"Question {number}?", "answer": "yes"} | others, before, after


# Fixed, broken, right, wrong; two tags, no tag; a rule of its own.
EXAM = [
    asked(1, "no", "yes", tags=["a", "b"]),
    asked(2, "yes", "no", tags=["b"]),
    asked(3, "yes", "yes"),
    asked(4, "no", "never", tags=['"odd" <tag>']),
    asked(5, "1", "10.4", answer="10", match={"number": 0.5}, tags=["b"]),
]
GENERAL = [asked(1, "yes", "yes", id="g 1/%"), asked(2, "yes", "no", id="g2")]


def write_run(exam: list[Row], general: list[Row], files: tuple[str, ...] = FILES) -> None:
    """What the stages before leave in the working directory; GGUF files answer as the tuned model, q8_0 with blanks."""
    put("params.yaml", (ROOT / "params.yaml").read_text(encoding="utf-8"))
    details = {}
    for name, answers, kind, rows in [
        ("questions", "answers", "exam", exam),
        ("general", "answers_general", "general", general),
    ]:
        compared = [side_by_side(*row) for row in rows]
        put(f"data/{name}.jsonl", *[question for question, _, _ in rows])
        put(f"metrics/{answers}.jsonl", *compared)
        details[kind] = comparison.comparison([c["base"] for c in compared], [c["tuned"] for c in compared])
    put("metrics/details/evaluate.json", [details])
    given = ({name: after + " " * (name == "model-q8_0.gguf") for name in files} for _, _, after in exam)
    put("metrics/answers_gguf.jsonl", *[{"id": row[0]["id"]} | of for row, of in zip(exam, given, strict=True)])
    scores = {"correct": 0.6, "exact_match": 0.5, "f1": 0.55, "agreement": 0.9}
    conversion = {"correct": -0.01, "loss": 0.0123, "agreement": 0.9, "top1": 0.99, "kl": 0.001, "kl_max": 0.2}
    size = {"kl": 0.001, "bytes": 2_500_000}
    put(
        "metrics/details/gguf.json",
        [{name: scores | {"conversion": conversion} | (size if name.endswith("gguf") else {}) for name in files}],
    )
    put("metrics/loss.csv", "step,train,valid\n10,1.5,1.2\n20,0.5,0.4\n")
    losses = {"loss": {"before": 2.5, "train": 0.5, "valid": 0.4}, "steps": 20, "best_step": 20}
    put("metrics/train.json", losses | {"trainable_parameters": 4096})
    put("metrics/details/train.json", [{"tokens": {"trained": 1234}}])
    outcomes = {"read": 12, "invalid": 1, "duplicate": 0, "near_duplicate": 1, "leaked": 0, "train": 9, "valid": 1}
    put("metrics/details/data.json", [{"rows": outcomes, "sources": {"data/raw/facts.csv": outcomes}}])
    lengths = {"p50": 20, "p95": 25, "max": 30}
    sources = {"data/raw/facts.csv": lengths}
    put(
        "metrics/details/lengths.json",
        [{"tokens": lengths, "rows": {"dropped": 1, "truncated": 0}, "sources": sources}],
    )
    put("metrics/details/corpus.json", [{"documents": {"read": 9, "dropped": 1, "train": 6, "valid": 2}}])
    put("metrics/perplexity.json", {})
    put("metrics/preferences.jsonl", "")
    put("models/base.json", {"model": "models/tiny-base", "revision": None, "fingerprint": "f" * 64})
    lock("a" * 32 + ".dir")


def side_by_side(line: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    rule = read_rule(line.get("match", "exact"), "a test")
    question = Question(line["id"], line["question"], [line["answer"]], "here:1", line.get("tags", []), rule)
    old, new = graded(question, Answer(before, True, 2.0)), graded(question, Answer(after, True, 1.0))
    kept = {key: new[key] for key in ("id", "question", "reference", "match", "tags", "source")}
    return kept | {"before": before, "after": after, "base": old["scores"], "tuned": new["scores"]}


def add_preference_training() -> None:
    """What the stages before leave with preference training, after `write_run`: answers of SFT, and held-out pairs."""
    [details] = json.loads(Path("metrics/details/evaluate.json").read_text(encoding="utf-8"))
    for answers, kind, rows in [("answers", "exam", EXAM), ("answers_general", "general", GENERAL)]:
        lines = []
        for line, before, after in rows:
            answer = SFT.get(line["id"], after)
            sft = side_by_side(line, before, answer)["tuned"]
            lines.append(side_by_side(line, before, after) | {"after_sft": answer, "sft": sft})
        put(f"metrics/{answers}.jsonl", *lines)
        base, tuned, sft = ([line[who] for line in lines] for who in ("base", "tuned", "sft"))
        details[kind] = comparison.comparison(base, tuned, sft)
    margins = {
        "known": {"base": -1.0, "sft": 0.5, "tuned": 0.25},
        "unknown": {"base": 0.5, "sft": -0.25, "tuned": -0.5},
    }
    pairs: list[Any] = [
        {"id": tag, "prompt": f"Prompt {tag}?", "chosen": "yes", "rejected": "no " * 40, "tags": [tag]}
        | {who: preferred(margin) for who, margin in of_models.items()}
        for tag, of_models in margins.items()
    ]
    put("metrics/preferences.jsonl", *pairs)
    base, tuned, sft = ([pair[who] for pair in pairs] for who in ("base", "tuned", "sft"))
    details["preferences"] = comparison.comparison(base, tuned, sft, "preferred")
    put("metrics/details/evaluate.json", [details])


def preferred(margin: float) -> dict[str, float]:
    return {"preferred": float(margin > 0), "margin": margin, "chosen": -1.0, "rejected": -1.0 - margin}


def put(path: str, *content: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = [part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in content]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def lock(adapter: str) -> None:
    """A dvc.lock with that hash of the adapter."""
    known = {path: "b" * 32 for path in report.IDENTITY} | {"outputs/adapter": adapter}
    stale = [{"path": path, "md5": "stale"} for path in known]
    entries = [{"path": path, "md5": md5} for path, md5 in known.items()]
    put("dvc.lock", {"stages": {"train_qlora": {"outs": entries}, "report": {"deps": stale}}})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, also the working directory, in which the stages before the report have run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, "bootstrap", functools.partial(comparison.bootstrap, resamples=100))  # seconds less
    write_run(EXAM, GENERAL)
    return tmp_path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        playwright = sync_playwright().start()
    except Exception:  # it says no more than that its node ended
        pytest.skip("no Chromium, as Playwright does not start: apt-get install chromium libatomic1")
    own = playwright.chromium.executable_path
    found = programs.chromium() or (own if Path(own).exists() else None)
    if found:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()
    playwright.stop()
    if not found:
        pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")


@pytest.fixture
def opened(run: Path, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of what is in the working directory; none may log anything or ask for anything but itself."""
    troubles: list[str] = []

    def open_page(width: int = 1280, **context: Any) -> Page:
        report.main()
        page = browser.new_page(viewport={"width": width, "height": 900}, **context)
        page.set_default_timeout(10_000)
        address = (run / "metrics/report.html").as_uri()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: troubles.extend({request.url} - {address}))
        page.goto(address)
        # Chromium may lose a click that comes before its first frame.
        page.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        return page

    yield open_page
    for context in browser.contexts:
        context.close()
    assert not troubles


def shown(page: Page) -> list[str]:
    """The ids of the questions that the filter leaves; the displayed number must agree."""
    ids = page.locator("article:not([hidden]) h3 a").all_text_contents()
    expect(page.locator("output")).to_have_text(f"{len(ids)} of {page.locator('article').count()} questions")
    return ids


def test_the_filter_leaves_the_questions_that_were_asked_for_and_counts_them(opened: Callable[..., Page]) -> None:
    page = opened()
    expect(page.locator("article:visible")).to_have_count(7)
    for name, expected in [
        ("fixed", ["q1", "q5"]),
        ("broken", ["q2", "g2"]),
        ("wrong now", ["q2", "q4", "g2"]),
        ("differs", ["q1", "q2", "q3", "q4", "q5"]),
    ]:
        page.locator("label", has_text=name).click()
        assert shown(page) == expected, name
    page.locator("label", has_text="all").click()
    page.locator("[name=tag]").select_option("b")
    assert shown(page) == ["q1", "q2", "q5"]
    page.locator("[name=tag]").select_option('"odd" <tag>')
    assert shown(page) == ["q4"]
    page.locator("[name=tag]").select_option("")
    page.locator("[name=exam]").select_option("general")
    assert shown(page) == ["g 1/%", "g2"]
    page.locator("[name=exam]").select_option("")
    page.locator("[name=search]").fill("  NEVER ")
    assert shown(page) == ["q4"]
    page.locator("[name=search]").fill("nowhere")
    assert shown(page) == []


def test_links_lead_to_questions_that_the_filter_hides_and_numbers_and_tags_to_theirs(
    opened: Callable[..., Page],
) -> None:
    page = opened()
    page.locator(".card", has_text="general exam").locator("a", has_text="1").click()
    assert shown(page) == ["g2"]
    page.locator(".tag", has_text="odd").click()
    assert shown(page) == ["q4"]
    page.locator(".flips a", has_text="q2").click()
    expect(page.locator("article:target")).to_be_in_viewport()
    assert len(shown(page)) == 7
    page.locator("article h3 a", has_text="g 1/%").click()
    expect(page.locator("article:target h3 a")).to_have_text("g 1/%")


def test_every_answer_is_marked_by_a_sign_not_by_colour_alone(opened: Callable[..., Page]) -> None:
    page = opened()
    signs = "dt => [dt.textContent, getComputedStyle(dt, '::before').content.match(/[✓✗]/)?.[0] ?? '']"
    marked = page.locator("article").nth(1).locator("dt").evaluate_all(f"all => all.map({signs})")
    assert marked == [["Expected", ""], ["Before", "✓"], ["After", "✗"], *([name, "✗"] for name in FILES)]
    tolerant = page.locator("article").nth(4).locator("dt").evaluate_all(f"all => all.map({signs})")
    assert tolerant[-1] == ["model-q8_0.gguf", "✓"]  # by the question's own rule: 10 within 0.5


def test_dark_mode_changes_the_colours_and_stays_readable(opened: Callable[..., Page]) -> None:
    def lightness(page: Page) -> tuple[int, int]:
        colours = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        background, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        return background, ink

    light, dark = lightness(opened(color_scheme="light")), lightness(opened(color_scheme="dark"))
    assert light[0] - light[1] > 500 and dark[1] - dark[0] > 500


def test_nothing_is_wider_than_a_phone(opened: Callable[..., Page]) -> None:
    long = "w" * 300
    write_run(
        [*EXAM, asked(6, long, long, id=long, question=long, tags=[long])], GENERAL, (*FILES, f"model-{long}.gguf")
    )
    page = opened(width=390, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#questions").screenshot()  # lays the questions out, which content-visibility puts off
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_report_names_a_local_base_without_its_path(run: Path) -> None:
    put("models/base.json", {"model": "/home/you/models/x-1b", "revision": None, "fingerprint": "f" * 64})
    parameters = Path("params.yaml").read_text(encoding="utf-8")
    put("params.yaml", parameters.replace("model: models/tiny-base", "model: /home/you/models/x-1b"))
    report.main()
    page, short = (Path(f"metrics/report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert "<h1>x-1b answered " in page and "model: x-1b" in page
    assert "/home/you" not in page + short


def test_2000_questions_open_within_three_seconds_and_filter_within_one(opened: Callable[..., Page]) -> None:
    rows = [asked(n, "no " * (n % 30), "yes" if n % 3 else "no", tags=[f"tag {n % 20}"]) for n in range(2000)]
    write_run(rows, GENERAL)
    page = opened()
    loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    measure = """value => new Promise(done => {
        const search = document.querySelector('[name=search]'), started = performance.now();
        search.value = value;
        search.dispatchEvent(new Event('input', {bubbles: true}));
        requestAnimationFrame(() => setTimeout(() => done(performance.now() - started)));  // it is on the screen
    })"""
    first, again, back = (page.evaluate(measure, value) for value in ("question 19", "question 199", ""))
    print(
        f"2,000 questions: opened in {loaded:.0f} ms, searched in {first:.0f} and {again:.0f} ms, all in {back:.0f} ms"
    )
    assert loaded < 3000 and max(first, again, back) < 1000


def test_what_a_model_answers_is_shown_as_text_whatever_it_is(opened: Callable[..., Page]) -> None:
    long = "long " * 20_000
    hostile = asked(7, HOSTILE, long, id=HOSTILE, question=HOSTILE, answer=HOSTILE, tags=[HOSTILE])
    write_run([hostile], [hostile])
    page = opened()
    assert "run" not in page.title() and page.locator("script").count() == 1 and page.locator("img").count() == 0
    answers = page.locator("article").first.locator("dd").all_text_contents()
    assert answers[:3] == [HOSTILE, HOSTILE, long]
    page.locator("[name=search]").fill("onerror=")
    assert len(shown(page)) == 2
    page.locator("[name=tag]").select_option(index=1)
    assert len(shown(page)) == 2
    text = Path("metrics/report.md").read_text(encoding="utf-8")
    assert all(line.count("`") % 2 == 0 for line in text.splitlines()) and len(text) < 6000


@pytest.mark.parametrize(
    ("exam", "files"),
    [
        pytest.param([asked(1, "no", "yes")], FILES, id="one question"),
        pytest.param([asked(n, "yes", "yes") for n in range(20)], FILES, id="nothing changed"),
        pytest.param(
            [asked(n, "", "") for n in range(20)], ("merged", "model-f16.gguf"), id="no LoRA, no quantized file"
        ),
    ],
)
def test_exams_that_are_short_untagged_or_unchanged_have_a_report(
    opened: Callable[..., Page], exam: list[Row], files: tuple[str, ...]
) -> None:
    write_run(exam, [asked(1, "yes", "yes")], files)
    page = opened()
    assert page.locator("[name=tag]").count() == 0 and page.locator("article").count() == len(exam) + 1
    page.locator("label", has_text="broken").click()
    assert shown(page) == []
    assert "no difference beyond chance" in Path("metrics/report.md").read_text(encoding="utf-8")
    with open("metrics/tags.csv", encoding="utf-8") as lines:
        assert {line["tag"] for line in csv.DictReader(lines)} == {"all questions"}


def test_the_tables_for_plots_count_a_question_for_each_of_its_tags(run: Path) -> None:
    report.main()
    with open("metrics/tags.csv", encoding="utf-8") as lines:
        counted = {(line["tag"], line["variant"]): line for line in csv.DictReader(lines) if line["exam"] == "exam"}
    assert {tag: counted[tag, "after"]["questions"] for tag, _ in counted} == {
        "all questions": "5",
        "(no tag)": "1",
        '"odd" <tag>': "1",
        "b": "3",
        "a": "1",
    }
    assert (counted["b", "before"]["correct"], counted["b", "after"]["correct"]) == ("0.3333", "0.6667")
    with open("metrics/variants.csv", encoding="utf-8") as lines:
        correct = {line["variant"]: line["value"] for line in csv.DictReader(lines) if line["score"] == "correct"}
    assert correct == {"base": "0.4000", "tuned": "0.6000"} | dict.fromkeys(FILES, "0.6000")


def test_the_summary_names_what_broke_first_and_what_was_fixed_up_to_a_few(run: Path) -> None:
    forgot = [asked(n, "yes", "no" if n < 8 else "yes") for n in range(20)]
    write_run([*EXAM, *(asked(n, "no", "yes") for n in range(10, 20))], forgot)
    report.main()
    text = Path("metrics/report.md").read_text(encoding="utf-8")
    assert "- `q2` `Question 2?`: `yes` → `no`, expected `yes`" in text
    assert (
        "differs from chance: a drop of 30.0 points." in text and "## Broken in the general exam: 8" in text
    )  # 6 of 20: p = 0.03
    assert text.index("## Broken: 1") < text.index("## Fixed: 12")
    assert text.count(": `no` → `yes`\n") == 4 and "- and 7 more" in text
    assert "| model-q8_0.gguf  |  60.0 % | 55.0 % |       90.0 % | 0.001 | 2.5 MB |" in text
    conversion = (
        "| model-f16.gguf → model-q8_0.gguf |    −1.0 | +0.012 |       90.0 % |          99.0 % | 0.001 |      0.2 |"
    )
    assert conversion in text


def test_raw_text_has_its_perplexity_before_and_after_in_the_report(run: Path) -> None:
    report.main()
    assert not any("Raw text" in Path(f"metrics/report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    put("metrics/perplexity.json", {"perplexity": {"base": 1234.5678, "tuned": 6.789, "tokens": 2345}})
    lengths = json.loads(Path("metrics/details/lengths.json").read_text(encoding="utf-8"))
    put("metrics/details/lengths.json", [lengths[0] | {"corpus": {"tokens": 5000, "share": 0.2}}])
    report.main()
    for kind in ("md", "html"):
        assert "1,234.57 → 6.79" in Path(f"metrics/report.{kind}").read_text(encoding="utf-8")
    page = Path("metrics/report.html").read_text(encoding="utf-8")
    assert "6 documents of <code>data/corpus</code> are trained on: 5,000 tokens in an epoch, 20.0 % of all" in page


def test_every_score_that_an_exam_has_is_explained() -> None:
    of_question = graded(Question("1", "?", ["yes"], "here:1"), Answer("yes", True, 0.1))["scores"]
    assert of_question.keys() | preferred(1.0).keys() == SCORES.keys()


def test_preference_training_shows_three_models_what_changed_between_each_two_and_the_held_out_pairs(
    opened: Callable[..., Page],
) -> None:
    add_preference_training()
    page = opened()
    card = page.locator(".card", has_text="The exam")
    expect(card.locator(".move")).to_have_text("40.0 % → 80.0 % → 60.0 %")
    expect(card.locator(".facts div").nth(1)).to_contain_text("SFT → aligned")
    expect(card.locator(".facts div").nth(1)).to_contain_text("1 fixed, 2 broken")
    card.locator(".facts div").nth(1).locator("a", has_text="2").click()
    assert shown(page) == ["q2", "q4"]
    page.locator("label", has_text="fixed by SFT").click()
    page.locator("[name=exam]").select_option("")
    assert shown(page) == ["q4", "q5", "known"]
    page.locator("[name=exam]").select_option("preferences")
    answers = page.locator("article:not([hidden]) dd").all_text_contents()
    assert answers == ["yes", "no " * 40, "−1.00", "+0.50", "+0.25"]
    text = Path("metrics/report.md").read_text(encoding="utf-8")
    assert text.startswith("# 2 → 4 → 3 of 5 answers correct\n")
    assert "- SFT → aligned: no difference beyond chance, −20.0 points" in text
    assert "**The preference exam, of held-out pairs: no difference" in text and "50.0 % → 50.0 % → 50.0 % of 2" in text
    assert re.search(r"\| `unknown` +\| +1 \| +1 \| +0 \| +0 \|", text)
    assert "## Broken by preference training: 2\n\n- `q2` `Question 2?`: `yes` → `no`, expected `yes`" in text
    with open("metrics/tags.csv", encoding="utf-8") as lines:
        of_known = [line["variant"] for line in csv.DictReader(lines) if line["tag"] == "known"]
    assert of_known == ["before", "sft", "after"]


@pytest.mark.parametrize("width", [400, 1000, 1200])
def test_three_models_fit_on_the_page(opened: Callable[..., Page], width: int) -> None:
    add_preference_training()
    page = opened(width=width)
    page.locator(".move").evaluate_all("all => all.forEach(move => move.textContent = '100.0 % → 100.0 % → 100.0 %')")
    wider = "all => all.filter(one => one.scrollWidth > one.clientWidth).map(one => one.className)"
    assert page.locator(".card, .move, .tags, form, dl").evaluate_all(wider) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_markdown_is_aligned_in_a_terminal_and_quotes_what_it_did_not_write() -> None:
    assert table(["name", "n"], [["팀장", 10], ["a|b", 9]])[:-1] == [
        "| name |   n |",
        "| ---- | --: |",
        "| 팀장 |  10 |",
        "| a\\|b |   9 |",
    ]
    assert quoted("a `b`\n@all *c*", 9) == "`a 'b' @a…`"


def test_the_same_run_makes_the_same_bytes(run: Path) -> None:
    made = []
    for _ in range(2):
        report.main()
        made.append(
            [(run / "metrics" / name).read_bytes() for name in ("report.html", "report.md", "tags.csv", "variants.csv")]
        )
    assert made[0] == made[1]


def test_a_missing_input_is_named_in_one_line_and_leaves_no_report(run: Path) -> None:
    inputs = [path for path in run.rglob("*.*") if path.is_file()]
    assert len(inputs) == 18
    for path in inputs:
        kept = path.rename(path.with_suffix(".away"))
        with pytest.raises(UserError) as refused:
            report.main()
        assert path.name in str(refused.value) and "\n" not in str(refused.value) and "dvc repro" in str(refused.value)
        kept.rename(path)
    assert not list(run.glob("metrics/report.*"))


def test_the_command_on_the_page_finds_the_commit_that_brought_the_adapter(run: Path) -> None:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, env=environment())
        return done.stdout

    git("init", "-q")
    for adapter in ("1", "2", "3"):
        lock(adapter * 32 + ".dir")
        git("add", "dvc.lock")
        git("commit", "-qm", f"adapter {adapter}")
        if adapter == "2":
            report.main()
    text = Path("metrics/report.html").read_text(encoding="utf-8")
    command = html.unescape(re.findall(r'<code class="copy">(.*?)</code>', text)[0])
    found = subprocess.run(command.split(), capture_output=True, text=True, check=True, env=environment())
    assert found.stdout.splitlines()[-1].endswith(" adapter 2")


def test_the_stage_takes_seconds_and_imports_no_model_library(run: Path) -> None:
    started = time.monotonic()
    imported = "import sys, stages.report; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(["python", "-c", imported], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and time.monotonic() - started < 10
