"""Compare the exam's scores with those of common packages, on 200 unusual answers.

    pip install torchmetrics rouge-score
    python -m bench.scores

The references are SQuAD's exact match and F1 in TorchMetrics, which contains SQuAD's own code; ROUGE-L in Google's
rouge-score; chrF as sacrebleu's corpus score of one sentence. It prints the largest difference of each score, and the
answers whose scores differ.
"""

import random
from collections.abc import Callable

from sacrebleu import corpus_chrf

from pipeline.common.errors import UserError
from pipeline.common.paths import EXAM
from pipeline.evaluation.questions import read_questions
from pipeline.evaluation.rules import CHARACTER, normalised_words
from pipeline.evaluation.scores import chrf, exact_match, f1, rouge_l

try:
    from rouge_score.rouge_scorer import RougeScorer
    from torchmetrics.functional.text import squad
except ImportError:
    raise UserError("pip install torchmetrics rouge-score, with which the scores are compared") from None

ODD = [
    *["", " ", ".", "The", "a the an", "?!", "\n\n", "\t7\u00a0000"],
    *["ÉCOLE", "école", "ﬁre", "🙂", "C++", "-5", "5", "á", "i̇"],
]
Pair = tuple[str, tuple[str, ...]]  # an answer, and the accepted ones
Score = Callable[[str, list[str]], float]


class OurWords:
    """A tokenizer for rouge-score, whose own tokenizer drops every letter that is not ASCII, for example Korean."""

    def tokenize(self, text: str) -> list[str]:
        return normalised_words(text)


def main() -> None:
    pairs = odd_pairs(200)
    latin = [(answer, accepted) for answer, accepted in pairs if not CHARACTER.search(answer + "".join(accepted))]
    rouge = RougeScorer(["rougeL"], tokenizer=OurWords())
    compare("exact match, SQuAD", pairs, exact_match, lambda a, r: squads(a, r)["exact_match"])
    compare("F1, SQuAD (without Korean)", latin, f1, lambda a, r: squads(a, r)["f1"])
    compare("ROUGE-L, rouge-score", pairs, rouge_l, lambda a, r: max(rouge.score(x, a)["rougeL"].fmeasure for x in r))
    compare("chrF, sacrebleu", pairs, chrf, lambda a, r: corpus_chrf([a], [[x] for x in r]).score / 100)


def odd_pairs(count: int) -> list[Pair]:
    """Return pairs of an answer and accepted answers of the exam.

    The answer is an accepted answer that is shuffled, cut, doubled, misspelt or extended, or an unusual text.
    """
    rng = random.Random(0)
    accepted = [question.answers for question in read_questions(EXAM)]
    changes: list[Callable[[str], str]] = [
        lambda text: " ".join(rng.sample(text.split(), len(text.split()))),
        lambda text: text[: rng.randrange(len(text) + 1)],
        lambda text: f"{text} {text}",
        lambda text: f"The answer is: {text}.",
        lambda text: text.upper().replace(" ", " , "),
        lambda text: text.replace(rng.choice(text), rng.choice("aé서 ")),
        lambda _: rng.choice(ODD),
        lambda _: rng.choice(rng.choice(accepted)),
    ]
    pairs = []
    for number in range(count):
        references = rng.choice(accepted) + ([rng.choice(rng.choice(accepted))] if number % 5 == 0 else [])
        pairs.append((rng.choice(changes)(references[0]), tuple(references)))
    return pairs


def squads(answer: str, accepted: list[str]) -> dict[str, float]:
    scores = squad(
        [{"prediction_text": answer, "id": "1"}],
        [{"answers": {"text": accepted, "answer_start": [0] * len(accepted)}, "id": "1"}],
    )
    return {name: float(score) / 100 for name, score in scores.items()}


def compare(name: str, pairs: list[Pair], ours: Score, theirs: Score) -> None:
    differences = {pair: abs(ours(pair[0], list(pair[1])) - theirs(pair[0], list(pair[1]))) for pair in pairs}
    print(f"{name:28} {len(pairs)} answers, largest difference {max(differences.values()):.1e}")
    for (answer, accepted), difference in differences.items():
        if difference > 1e-6:
            print(f"    {answer!r} for {accepted}: {difference:.3f}")


if __name__ == "__main__":
    main()
