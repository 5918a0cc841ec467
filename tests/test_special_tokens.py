"""Control tokens with untrained embeddings in the base: found by their embeddings, and trained."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import ROOT, Project
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.common.errors import UserError
from pipeline.common.paths import EXAM
from pipeline.evaluation.answers import answer_questions
from pipeline.evaluation.questions import read_questions
from pipeline.model.base import copy_tokenizer, located
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import load_tuned
from pipeline.model.special_tokens import trainable_tokens, untouched, untrained
from stages import generate, merge, prepare_base, tokenize, train_qlora

TINY = ROOT / "models/tiny-base"
EMBEDDINGS = "model.embed_tokens.weight"
CONTROL = [1, 2]  # <|im_start|>, <|im_end|>


def to_zero(rows: torch.Tensor) -> None:
    rows[CONTROL] = 0


def to_the_mean(rows: torch.Tensor) -> None:
    rows[CONTROL] = rows.mean(0)


def to_each_other(rows: torch.Tensor) -> None:
    rows[1] = rows[2]


def to_new_ones(rows: torch.Tensor) -> None:
    torch.manual_seed(0)
    rows[CONTROL] = 0.02 * torch.randn(2, rows.shape[1])  # its config.json's initializer_range


def changed_base(folder: Path, change: Callable[[torch.Tensor], None]) -> Path:
    """The built-in base, whose embeddings (float32, of shape (tokens, hidden)) `change` has changed."""
    folder.mkdir()
    weights = load_file(TINY / "model.safetensors")
    embeddings = weights[EMBEDDINGS].float()
    change(embeddings)
    save_file(weights | {EMBEDDINGS: embeddings.bfloat16()}, folder / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    copy_tokenizer(TINY, folder)
    return folder


@pytest.mark.parametrize("change", [to_zero, to_the_mean, to_each_other, to_new_ones])
def test_untouched_control_tokens_are_found(
    tmp_path: Path, change: Callable[[torch.Tensor], None], capsys: pytest.CaptureFixture[str]
) -> None:
    base = changed_base(tmp_path / "base", change)
    assert trainable_tokens("auto", base, load_tokenizer(base)) == CONTROL
    assert capsys.readouterr().out == (
        "lora.trainable_tokens: also training <|im_start|>, <|im_end|>: their embeddings in the base are untrained\n"
    )


def test_trained_control_tokens_are_left_as_they_are() -> None:
    assert untrained(TINY, load_tokenizer(TINY)) == []


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_tokens_that_were_added_to_a_base_are_found(tmp_path: Path, mean_resizing: bool) -> None:
    tokenizer, model = load_tokenizer(TINY), AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}<|end|><|im_end|>{% endfor %}"
    model.resize_token_embeddings(len(tokenizer), mean_resizing=mean_resizing)
    model.save_pretrained(tmp_path)
    assert untrained(tmp_path, tokenizer) == ["<|user|>", "<|end|>"]


def test_of_a_head_of_its_own_only_what_ends_an_answer_must_be_trained_on(tmp_path: Path) -> None:
    for token, found in [(1, []), (2, ["<|im_end|>"])]:
        base = changed_base(tmp_path / str(token), lambda rows: None)
        weights = load_file(base / "model.safetensors")
        head = weights[EMBEDDINGS].clone()
        head[token] = 0
        save_file(weights | {"lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
        assert untrained(base, load_tokenizer(base)) == found


def test_the_rule_takes_no_ordinary_token_for_new_and_hardly_a_new_one_for_trained() -> None:
    with safe_open(TINY / "model.safetensors", "pt") as tensors:
        assert untouched(tensors.get_slice(EMBEDDINGS), list(range(3, 2048)), [0, 1, 2], 0.02) == []
        rows = tensors.get_tensor(EMBEDDINGS).float()
    torch.manual_seed(0)
    rows[::2] = 0.02 * torch.randn(1024, 256)
    assert len(untouched(Slice(rows), list(range(0, 2048, 2)), [0, 1, 2], 0.02)) >= 1020


class Slice(torch.Tensor):
    """A tensor that is read as one in a safetensors file is."""

    def get_shape(self) -> list[int]:
        return list(self.shape)


@pytest.mark.parametrize("text", ["no token", "", "<|im_end|><|im_end|>"])
def test_a_text_that_is_no_single_token_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"lora\.trainable_tokens: .* is \d+ tokens of this base, not one"):
        trainable_tokens(["<|im_end|>", text], TINY, load_tokenizer(TINY))


def test_tokens_are_trained_as_asked() -> None:
    tokenizer = load_tokenizer(TINY)
    assert trainable_tokens(["<|im_end|>", "<|im_start|>", "<|im_end|>"], TINY, tokenizer) == CONTROL
    assert trainable_tokens([], TINY, tokenizer) == []


def test_a_base_that_cannot_end_an_answer_learns_to_by_its_control_tokens(project: Project) -> None:
    project.set(base__model=str(changed_base(Path("models/untouched"), to_the_mean)), train__epochs=0.5)
    for stage in (prepare_base, generate, merge, tokenize):
        stage.main()
    stopped: dict[str, float] = {}
    for name, wanted in {"auto": "auto", "none": list[str]()}.items():
        project.set(lora__trainable_tokens=wanted)
        train_qlora.main()
        folder, _ = located()
        model = load_tuned(folder, Path("outputs/trained"), "nf4", torch.device("cpu"), torch.float32)
        answers = answer_questions(
            model, load_tokenizer(folder), read_questions(EXAM)[:40], batch_size=40, max_new_tokens=24
        )
        stopped[name] = fmean(answer.stopped for answer in answers)
    assert stopped["auto"] > 0.9 and stopped["none"] < 0.1  # of 40 answers, after 13 steps
