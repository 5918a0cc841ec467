"""What the SFT adapter answers to questions, several times each. The answers are kept in .dvc/tmp/samples.jsonl."""

import json
from pathlib import Path

from pipeline.common.outputs import write_jsonl
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import TRAINED
from pipeline.common.rows import hash64, read_jsonl
from pipeline.evaluation.answers import answer_of, batches_by_length, prompts
from pipeline.evaluation.examination import load_examinee
from pipeline.evaluation.questions import Answer, Question
from pipeline.evaluation.sampling import sample
from pipeline.model.base import file_hash, located, require_same_base
from pipeline.model.chat_template import end_tokens, load_generation_config, load_tokenizer
from pipeline.model.supervision import thought_of
from pipeline.model.training_template import training_template

KEPT = Path(".dvc/tmp/samples.jsonl")

Sampled = list[tuple[Answer, str]]  # the answers to a question, each with its thinking


def sampled_answers(
    questions: list[Question],
    parameters: Parameters,
    samples: int,
    temperature: float,
    batch_size: int,
    max_new_tokens: int,
) -> list[Sampled]:
    """`samples` answers to each question, of which the model gives those that are not kept.

    An answer is kept after each batch. Its key is a hash of the adapter, the base, the question and all settings.
    """
    folder, base = located()
    require_same_base(TRAINED, base)
    tokenizer, ends = load_tokenizer(folder, training_template()), end_tokens(load_generation_config(folder))
    how = [file_hash(TRAINED / "adapter_model.safetensors"), base["fingerprint"], parameters.base.quantization]
    how += [parameters.base.compute_dtype, parameters.seed, samples, temperature, max_new_tokens]
    asked = prompts(tokenizer, questions)
    keys = [f"{hash64(json.dumps([how, one.id, ids])):016x}" for one, ids in zip(questions, asked, strict=True)]
    kept = {line["key"]: line["answers"] for line in (read_jsonl(KEPT) if KEPT.exists() else [])}
    if missing := [at for at, key in enumerate(keys) if key not in kept]:
        model, _ = load_examinee(parameters, TRAINED)
        model.eval()
        lengths = [[len(asked[at])] for at in missing]
        for batch in batches_by_length(lengths, max(1, batch_size // samples), "samples"):
            of = [missing[at] for at in batch]
            names = [f"{parameters.seed} {questions[at].id}" for at in of]
            drawn = sample(model, names, [asked[at] for at in of], ends, samples, temperature, max_new_tokens)
            kept |= {keys[at]: answers for at, answers in zip(of, drawn, strict=True)}
            write_jsonl(KEPT, ({"key": key, "answers": answers} for key, answers in kept.items()))
    return [
        [(answer_of(tokenizer, one, ids, tokens, ends), thought_of(tokenizer, ids, tokens)) for tokens in kept[key]]
        for one, ids, key in zip(questions, asked, keys, strict=True)
    ]
