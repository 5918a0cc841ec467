"""The adapter with a model card in the hub's format (https://huggingface.co/docs/hub/model-cards).

    python -m stages.model_card

outputs/aligned/, models/base.json, data/train_merged.jsonl, metrics/ -> outputs/adapter/: the adapter with
its README.md, as people share it
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from pipeline.common.markdown import table
from pipeline.common.outputs import atomic_output, read_details, read_json
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import (
    ADAPTER,
    ALIGN_METRICS,
    ALIGNED,
    ANSWERS,
    BASE,
    CORPUS_DETAILS,
    DATA_DETAILS,
    EXAM_DETAILS,
    LICENSE,
    PERPLEXITY,
    TRAIN_DETAILS,
    TRAIN_METRICS,
    TRAIN_ROWS,
    TUNED_PREFERENCES,
)
from pipeline.common.rows import read_jsonl
from pipeline.model.base import file_hash, public_name
from pipeline.model.chat_template import TEMPLATE_ARGUMENTS
from pipeline.report.readable import (
    detectable,
    further_lines,
    interval,
    p_value,
    percent,
    perplexities,
    score_lines,
    verdict,
)
from stages import run

METHODS = {  # of preference training
    "dpo": "[DPO](https://arxiv.org/abs/2305.18290)",
    "kto": "[KTO](https://arxiv.org/abs/2402.01306)",
    "orpo": "[ORPO](https://arxiv.org/abs/2403.07691)",
}


def main() -> None:
    parameters = load("model_card")
    base, data = read_json(BASE), read_details(DATA_DETAILS)
    train, training = read_json(TRAIN_METRICS), read_details(TRAIN_DETAILS)
    details = read_details(EXAM_DETAILS)
    exam, general = details["exam"], details["general"]
    answers, perplexity = read_jsonl(ANSWERS), read_json(PERPLEXITY).get("perplexity")
    name = f"{Path(public_name(base)).name}-qlora"
    trained_with = {
        "seed": parameters.seed,
        "tokenize": dict(parameters.tokenize),
        "lora": dict(parameters.lora),
        "train": dict(parameters.train),
    }
    method = parameters.align.method
    text = template().render(
        metadata=metadata(name, base, parameters.base.quantization, method, exam["tuned"]),
        name=name,
        base=base,
        base_name=public_name(base),
        quantization=parameters.base.quantization,
        data=data,
        sources=table(
            ["source", "rows read", "trained on"],
            [[s, of["read"], of["train"]] for s, of in data["sources"].items()],
        ),
        documents=read_details(CORPUS_DETAILS)["documents"],
        perplexity=perplexity,
        reads_raw_text=perplexity and parameters.tokenize.corpus_share != 0,
        written_by=parameters.generate.model,
        rows_hash=file_hash(TRAIN_ROWS),
        train=train,
        tokens=training["tokens"],
        trained_with=trained_with,
        parameters=yaml.safe_dump(trained_with, sort_keys=False),
        libraries=training["libraries"],
        method=METHODS.get(method),
        align=read_json(ALIGN_METRICS),
        of_pairs=of_pairs,
        align_parameters=yaml.safe_dump({"align": dict(parameters.align)}, sort_keys=False),
        exam=exam,
        general=general,
        preferences=details.get("preferences"),
        pairs=len(read_jsonl(TUNED_PREFERENCES)),
        quantized=base.get("quantized"),
        on_hub=base["revision"] and "quantized" not in base,
        tool=a_tool() if "tools" in data["kinds"] else None,
        questions=len(answers),
        question=answers[0]["question"],
        template_arguments=TEMPLATE_ARGUMENTS,
    )
    with atomic_output(ADAPTER) as aside:
        shutil.copytree(ALIGNED, aside, copy_function=shutil.copyfile)
        (aside / "README.md").write_text(text, encoding="utf-8", newline="\n")


def a_tool() -> dict[str, Any]:
    """The first tool of the training rows."""
    with open(TRAIN_ROWS, encoding="utf-8") as rows:
        tool: dict[str, Any] = next(row["tools"][0] for row in map(json.loads, rows) if row.get("tools"))
    return tool


def of_pairs(align: dict[str, Any]) -> list[str]:
    """A Markdown table of what the validation pairs measured, from metrics/align.json."""
    shown = {
        "loss": "loss of the method",
        "accuracy": "share that goes the right way (with DPO and KTO: since this training began)",
        "reward_margin": "margin of the better answers",
        "chosen_nll": "loss of the chosen answers, nats per token",
    }
    lines = [[name, *(f"{align[key][when]:.3f}" for when in ("before", "after"))] for key, name in shown.items()]
    return table(["measure", "before", "after"], lines)


def template() -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for shape in (detectable, further_lines, interval, p_value, percent, perplexities, repr, score_lines, verdict):
        environment.globals[shape.__name__] = shape
    return environment.from_string(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))


def metadata(name: str, base: dict[str, Any], quantization: str, method: str, scores: dict[str, float]) -> str:
    """The YAML of the card. It names the base by its id on the hub; a base in a local folder has none."""
    found = {"correct": "accuracy", "exact_match": "exact_match", "f1": "f1", "chrf": "chrf"}
    results = [
        EvalResult(
            task_type="question-answering",
            dataset_type="json",
            dataset_name="the project's own exam",
            metric_type=metric,
            metric_name=score,
            metric_value=scores[score],
        )
        for score, metric in found.items()
    ]
    return ModelCardData(
        base_model=base["model"] if base["revision"] else None,
        base_model_relation="adapter" if base["revision"] else None,
        library_name="peft",
        **read_json(LICENSE),
        pipeline_tag="text-generation",
        tags=["lora"] + ["qlora"] * (quantization == "nf4") + [method] * (method != "none"),
        model_name=name,
        eval_results=results,
    ).to_yaml()


if __name__ == "__main__":
    run(main)
