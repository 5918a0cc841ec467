"""A GGUF file as the base: its weights and tokenizer as the files that Transformers and PEFT train on."""

import os
from itertools import product
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.outputs import atomic_output
from pipeline.model.llama_server import Server, served

# Text on which tokenizers differ: other scripts, joined emoji, runs of white space, digits, code, control tokens.
FRAGMENTS = [
    "Hello, world!",
    "don't WE'LL x'S",
    " two  three   four",
    "\ttab\n\nlines\r\n",
    "1234567890 3.14",
    "대한민국의 수도",
    "日本語の文",
    "مرحبا بالعالم",
    "naïve café",
    "👩‍👩‍👧 🇰🇷 👍🏽",
    "def f(x):\n    return x[0]",
    "<b>&amp;</b> {}",
    "user@example.com https://a.b/c?d=1",
    "<|im_end|> </s>",
]
# How the tokenizers of the usual families split text, from their tokenizer.json, by llama.cpp's names:
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": [GPT_2],
    "smollm": [r"\p{N}", GPT_2],
    "llama-bpe": [LLAMA_3],
    "qwen2": [LLAMA_3.replace("{1,3}", "")],
}
TEXTS = [*FRAGMENTS, *map("".join, product(FRAGMENTS, FRAGMENTS))]
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "What is 2 + 2?"},
    ],
]


def is_gguf(model: str) -> bool:
    return model.endswith(".gguf")


def unpacked(file: Path, digest: str) -> Path:
    """The folder with the content of the GGUF file as safetensors, made once for each `digest` (SHA-256) of a file.

    The folder is in the Hugging Face home (HF_HOME), neither in git nor in DVC's cache.

    Raises:
        UserError: Transformers cannot read the file, or makes another tokenizer of the file than llama.cpp.
    """
    folder = unpacked_folder(digest)
    if not folder.exists():
        with atomic_output(folder) as aside:
            aside.mkdir()
            unpack(file, aside)
            require_same_tokenizer(file, aside)
    return folder


def unpacked_folder(digest: str) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "unpacked_gguf", digest)


def unpack(file: Path, folder: Path) -> None:
    import torch
    from gguf import LlamaFileType
    from transformers import AutoModelForCausalLM, AutoTokenizer

    of_file = {"gguf_file": file.name}
    try:
        kind = LlamaFileType(int(read_field(file, "general.file_type") or 0)).name
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **of_file)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **of_file)
        split_like_llama_cpp(tokenizer, read_field(file, "tokenizer.ggml.pre"))
    except Exception as error:  # the type depends on what Transformers cannot read
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"base.model {file}: Transformers cannot read this GGUF file ({type(error).__name__}: {reason}): name the "
            "model on the Hugging Face hub that the file was made of"
        ) from None
    # save_pretrained refuses a model that it takes for quantized; its weights are in 32 bits here.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    # bfloat16 has no more digits than float16 except in files of bfloat16, which float16 could not hold.
    exact = {"ALL_F32": torch.float32, "MOSTLY_BF16": torch.bfloat16}
    model.to(exact.get(kind, torch.float16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind not in (*exact, "MOSTLY_F16"):
        rounded = kind.removeprefix("MOSTLY_")
        print(f"base.model {file.name} is quantized ({rounded}): training starts from these weights")


def split_like_llama_cpp(tokenizer: Any, name: str | None) -> None:
    """Split text as the GGUF file says, by the name in `tokenizer.ggml.pre`. Transformers does not read this name:
    https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/ggml.py"""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    if patterns := SPLITS.get(name or ""):
        splits = [Split(Regex(pattern), "isolated") for pattern in patterns]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [*splits, ByteLevel(add_prefix_space=False, use_regex=False)]
        )


def read_field(file: Path, name: str) -> Any:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field(name)
    return field and field.contents()


def require_same_tokenizer(file: Path, folder: Path) -> None:
    """Raises UserError for the first text, conversation or end token that llama.cpp reads differently."""
    from pipeline.model.chat_template import end_tokens, load_generation_config, load_tokenizer, token_ids

    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template is None:
        raise UserError(f"base.model {file} has no chat template: choose its instruct or chat variant")
    with served(file, 512, os.cpu_count() or 1) as server:
        for text in TEXTS:
            ours = tokenizer.encode(text, add_special_tokens=False)
            require_equal(file, text, ours, server.tokenize(text, parse_special=True))
        for messages in CONVERSATIONS:
            prompt = token_ids(tokenizer, messages, add_generation_prompt=True)
            require_equal(file, messages[-1]["content"], prompt, server.tokens(messages))
        require_same_ends(file, server, prompt, end_tokens(load_generation_config(folder)))


def require_equal(file: Path, text: str, ours: list[int], theirs: list[int]) -> None:
    if ours != theirs:
        raise UserError(
            f"base.model {file}: {text!r} is {ours} in Transformers and {theirs} in llama.cpp: name the model on the "
            "Hugging Face hub that the file was made of"
        )


def require_same_ends(file: Path, server: Server, prompt: list[int], ends: set[int]) -> None:
    for end in ends:
        if not server.stops_at(prompt, end):
            raise UserError(f"base.model {file}: token {end} ends answers in Transformers, but not in llama.cpp")
