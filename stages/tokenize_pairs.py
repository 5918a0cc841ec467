"""The pairs as token ids and labels, for preference training.

    python -m stages.tokenize_pairs

models/base.json, models/chat_template.jinja, data/pairs_train.jsonl, data/pairs_valid.jsonl -> data/pair_tokens/
(train.arrow and valid.arrow: Arrow streams with the columns input_ids, labels, other_ids, other_labels and desirable;
overflow.jsonl: pairs that were left out). If align.method is none, the folder only says so.

With DPO and ORPO a row is a pair: the chosen answer, and as the other the rejected one. With KTO a row is one answer,
desirable or not, and the other is the answer to another prompt, by which KTO measures how far the model has moved.
"""

from pipeline.common.outputs import atomic_output
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import PAIR_TOKENS, PAIRS_TRAIN, PAIRS_VALID
from stages import run

SIDES = {"train": PAIRS_TRAIN, "valid": PAIRS_VALID}


def main() -> None:
    parameters = load("tokenize_pairs")
    with atomic_output(PAIR_TOKENS) as aside:
        aside.mkdir()
        if parameters.align.method == "none":
            (aside / "none.txt").write_text("align.method is none\n", encoding="utf-8")
        else:
            from pipeline.training.pair_tokens import write_pair_tokens  # Transformers takes seconds

            write_pair_tokens(aside, SIDES, parameters)


if __name__ == "__main__":
    run(main)
