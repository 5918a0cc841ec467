"""A GGUF file as the base: its weights and tokenizer as the files that Transformers and PEFT train on."""

from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

from gguf import GGUFReader, LlamaFileType
from jinja2 import TemplateError

from pipeline.common.errors import UserError
from pipeline.model.base import file_hash, is_gguf
from pipeline.model.chat_template import end_tokens, load_generation_config, load_tokenizer, token_ids
from pipeline.model.hub_cache import made_once, unpacked
from pipeline.model.license import MODEL_CARD
from pipeline.model.llama_server import Server, served
from pipeline.model.transformers_internals import forget_quantization

REMEDY = "name the model on the Hugging Face hub that the file was made of"
NOT_READ = ["*.rope.scaling.type", "*.rope.scaling.factor", "split.count"]
UNQUANTIZED = ("ALL_F32", "MOSTLY_F16", "MOSTLY_BF16")
TOLERANCE = 1.0  # nats: llama.cpp also rounds the inputs of quantized layers

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


def unpack_if_gguf(model: str, threads: int) -> None:
    """If `model` is a GGUF file, write its content as safetensors to the Hugging Face home (HF_HOME), once.

    Raises:
        UserError: Transformers cannot read the file, or llama.cpp makes other tokens or probabilities of the file.
    """
    file = Path(model)
    if not is_gguf(model) or not file.exists():
        return

    def make(folder: Path) -> None:
        require_same_answers(file, folder, unpack(file, folder), threads)

    made_once(unpacked(file_hash(file)), make)


def say_if_quantized(model: str) -> None:
    """`model` is a base.model that `unpack_if_gguf` has accepted."""
    if is_gguf(model) and (kind := type_of(GGUFReader(model))) not in UNQUANTIZED:
        rounded = kind.removeprefix("MOSTLY_")
        print(f"base.model {Path(model).name} is quantized ({rounded}): training starts from these weights")


def unpack(file: Path, folder: Path) -> dict[int, float]:
    """Write the files. Returns the five likeliest first tokens of an answer, with their log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    of_file: dict[str, Any] = {"gguf_file": file.name}
    try:
        header = GGUFReader(file)
        kind = type_of(header)
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **of_file
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **of_file)
    except Exception as error:  # the type depends on what Transformers cannot read
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"base.model {file}: Transformers cannot read this GGUF file ({type(error).__name__}: {reason}): fetch "
            f"the file again if it is incomplete, or {REMEDY}"
        ) from None
    if lost := [*sorted(report["missing_keys"]), *not_read(header)]:
        raise UserError(f"base.model {file}: Transformers does not read {', '.join(lost[:3])} of this file: {REMEDY}")
    if tokenizer.chat_template is None:
        raise UserError(f"base.model {file} has no chat template: choose its instruct or chat variant")
    split_like_llama_cpp(tokenizer, field(header, "tokenizer.ggml.pre"))
    forget_quantization(model)
    model.to(torch.float32 if kind == "ALL_F32" else torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if name := field(header, "general.license"):
        (folder / MODEL_CARD).write_text(f"---\nlicense: {name}\n---\n", encoding="utf-8")
    with torch.inference_mode():
        prompt = token_ids(load_tokenizer(folder), CONVERSATIONS[0], add_generation_prompt=True)
        logits = model.float()(torch.tensor([prompt])).logits[0, -1]
    values, tokens = logits.log_softmax(-1).topk(5)
    return dict(zip(tokens.tolist(), values.tolist(), strict=True))


def type_of(header: GGUFReader) -> str:
    """The type of most weights, such as ALL_F32 or MOSTLY_Q4_0."""
    return LlamaFileType(int(field(header, "general.file_type") or 0)).name


def not_read(header: GGUFReader) -> list[str]:
    """What Transformers leaves out in silence: the scaling of positions, and the other parts of a split file."""
    scaling = [tensor.name for tensor in header.tensors if tensor.name.startswith("rope_freqs")]
    return scaling + [name for name in NOT_READ if field(header, name) not in (None, "none", 1)]


def field(header: GGUFReader, name: str) -> Any:
    """A value in the header; None without it. `name` may begin with * for the architecture."""
    architecture = header.fields["general.architecture"].contents()
    found = header.get_field(name.replace("*", str(architecture)))
    return found and found.contents()


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


def require_same_answers(file: Path, folder: Path, likeliest: dict[int, float], threads: int) -> None:
    """Raises UserError for the first text or conversation of which llama.cpp makes other tokens, the first end token
    that does not end its answers, or other probabilities."""
    tokenizer = load_tokenizer(folder)
    with served(file, 512, threads) as server:
        require_same_tokens(file, tokenizer, server)
        prompt = token_ids(tokenizer, CONVERSATIONS[0], add_generation_prompt=True)
        ends = sorted(end_tokens(load_generation_config(folder)))
        for end in ends:
            if not server.stops_at(prompt, end):
                raise UserError(
                    f"base.model {file}: token {end} ends answers in Transformers, but not in llama.cpp: {REMEDY}"
                )
        theirs = server.likeliest(prompt, 64, ends[0])
    if any(abs(logprob - theirs.get(token, -100)) > TOLERANCE for token, logprob in likeliest.items()):
        raise UserError(
            f"base.model {file}: the first token of an answer has other probabilities in Transformers ({likeliest}) "
            f"than in llama.cpp: {REMEDY}"
        )


def require_same_tokens(file: Path, tokenizer: Any, server: Server) -> None:
    for text in TEXTS:
        ours = tokenizer.encode(text, add_special_tokens=False)
        require_equal(file, text, ours, server.tokenize(text, parse_special=True))
    for messages in CONVERSATIONS:
        try:
            ours = token_ids(tokenizer, messages, add_generation_prompt=True, date=datetime.now())
        except TemplateError:  # some templates have no system message
            continue
        require_equal(file, messages[-1]["content"], ours, server.tokens(messages))


def require_equal(file: Path, text: str, ours: list[int], theirs: list[int]) -> None:
    if ours != theirs:
        raise UserError(f"base.model {file}: {text!r} is {ours} in Transformers and {theirs} in llama.cpp: {REMEDY}")
