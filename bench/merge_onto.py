"""Measure the difference between the merged and the trained model, for both values of `merge_adapter.base`.

    python -m bench.merge_onto    # after dvc repro evaluate; also works with your own model

bench/README.md has the results.

The trained model has its base in NF4. The adapter is merged onto the base's own weights and onto their NF4 values, at
several strengths. The table has the score, the negative log-likelihood of the reference answers (NLL), and the KL
divergence of the next-token distributions from those of the trained model, over all tokens of the reference answers.
NLL and KL are in nats per token.
"""

import json
import shutil
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from pipeline.common.parameters.params_yaml import check
from pipeline.common.paths import EXAM
from pipeline.evaluation.answers import answer_questions, prompt_and_reference
from pipeline.evaluation.questions import Question, read_questions
from pipeline.evaluation.rules import correct
from pipeline.export.merging import merge
from pipeline.model.base import located
from pipeline.model.chat_template import end_tokens, load_tokenizer
from pipeline.model.loading import load_merged, load_tuned, pick_device, pick_dtype

ADAPTER = Path("outputs/aligned")
STRENGTHS = [0.25, 0.5, 0.75, 1.0]


def main() -> None:
    parameters = check(Path("params.yaml"))
    device = pick_device(parameters.base.device)
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    folder, _ = located()
    tokenizer, evaluate = load_tokenizer(folder), parameters.evaluate
    questions = read_questions(EXAM)
    print(f"{'':25}  correct     NLL   mean KL  largest KL  same answers")
    for strength in STRENGTHS:
        with tempfile.TemporaryDirectory() as scratch:
            adapter = weakened(Path(scratch), strength)
            trained = load_tuned(folder, adapter, parameters.base.quantization, device, dtype)
            models = {"as trained": trained}
            for name, on_nf4 in {"bf16": False, "dequantized_nf4": True}.items():
                merged = Path(scratch, name)
                merged.mkdir()
                merge(folder, adapter, merged, on_nf4, dtype)
                models[name] = load_merged(merged, device, dtype)
        given = {}
        for name, model in models.items():
            answers = answer_questions(model, tokenizer, questions, evaluate.batch_size, evaluate.max_new_tokens)
            given[name] = [answer.text for answer in answers]
            same = fmean(ours == theirs for ours, theirs in zip(given[name], given["as trained"], strict=True))
            right = fmean(correct(a.text, q.answers, q.rule) for a, q in zip(answers, questions, strict=True))
            nats = torch.cat([divergences(trained, model, tokenizer, question) for question in questions])
            print(
                f"{strength:<7}  {name:16}{right:9.1%}{fmean(a.nll for a in answers):8.4f}"
                f"{nats.mean():10.1e}{nats.max():12.1e}{same:14.1%}",
                flush=True,
            )


def weakened(scratch: Path, strength: float) -> Path:
    """Copy the adapter, with its output multiplied by `strength`."""
    adapter = scratch / "adapter"
    shutil.copytree(ADAPTER, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * strength}))
    return adapter


@torch.inference_mode()
def divergences(trained: PreTrainedModel, model: PreTrainedModel, tokenizer: Any, question: Question) -> torch.Tensor:
    """Return KL(trained || model) in nats at each token of the reference answer."""
    prompt, reference, _ = prompt_and_reference(tokenizer, question, end_tokens(trained.generation_config))
    ids = torch.tensor([prompt + reference[:-1]], device=trained.device)
    ours, theirs = (m(ids).logits[0, len(prompt) - 1 :].float().log_softmax(-1) for m in (model, trained))
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).cpu()


if __name__ == "__main__":
    main()
