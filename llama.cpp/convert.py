"""Run llama.cpp's own converters.

    python llama.cpp/convert.py hf   MODEL   [--card CARD] --outtype f16 --outfile FILE
    python llama.cpp/convert.py lora ADAPTER --base BASE [--card CARD] --outtype f16 --outfile FILE

CARD is a JSON file of what FILE is to tell of itself: by the names of a model card as upstream reads them, or by keys
of its own, which have a dot. Without it, upstream guesses by the names of folders.

The converter knows a byte-level BPE tokenizer by a hash over the token ids of one text, so it refuses every tokenizer
that it has not seen, and has no option to say which it is like. Here a tokenizer that it refuses is looked up by its
split pattern, which is all that llama.cpp needs to know of it.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from fetch import CONVERTER

PROGRAMS = {"hf": "convert_hf_to_gguf.py", "lora": "convert_lora_to_gguf.py"}
# llama.cpp's names of the split patterns in the tokenizer.json files of Qwen 2 and Llama 3.
WORDS, REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLIT_PATTERNS = {
    rf"{WORDS}|\p{{N}}|{REST}": "qwen2",  # one digit a token
    rf"{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--card", type=Path)
    options, upstreams = parser.parse_known_args()
    if not CONVERTER.exists():
        sys.exit(f"llama.cpp's converter is not at {CONVERTER}: run python llama.cpp/fetch.py")
    sys.path[:0] = [str(CONVERTER), str(CONVERTER / "gguf-py")]  # before PyPI's gguf, which is older
    know_split_patterns()
    prefix_spaces_as_transformers_does()
    if options.card:
        tell(json.loads(options.card.read_text(encoding="utf-8")))
    program = str(CONVERTER / PROGRAMS[options.program])
    sys.argv = [program, *upstreams]
    runpy.run_path(program, run_name="__main__")


def know_split_patterns() -> None:
    from conversion.base import TextModel  # type: ignore[import-not-found]

    upstream = TextModel.get_vocab_base_pre

    def by_hash_or_pattern(model: Any, tokenizer: Any) -> str:
        try:
            return upstream(model, tokenizer)
        except NotImplementedError:
            return by_pattern(Path(model.dir_model))

    TextModel.get_vocab_base_pre = by_hash_or_pattern


def by_pattern(folder: Path) -> str:
    pre_tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if name := SPLIT_PATTERNS.get(step.get("pattern", {}).get("Regex")):
            return name
    sys.exit(f"{folder}/tokenizer.json splits text in a way that llama.cpp has no name for: choose another base.model")


def prefix_spaces_as_transformers_does() -> None:
    """SentencePiece puts a space before a text. Before one that follows a control token, as BOS in a chat template,
    Transformers puts it only for a `legacy` tokenizer, llama.cpp unless the file forbids it."""
    from conversion.base import TextModel
    from transformers import AutoTokenizer

    upstream = TextModel._set_vocab_sentencepiece

    def as_transformers(model: Any, *arguments: Any) -> None:
        upstream(model, *arguments)
        tokenizer = AutoTokenizer.from_pretrained(model.dir_model)
        after_bos = tokenizer.tokenize(f"{tokenizer.bos_token}x")[1]
        model.gguf_writer.add_add_space_prefix(after_bos.startswith("\u2581"))

    TextModel._set_vocab_sentencepiece = as_transformers


def tell(card: dict[str, str]) -> None:
    import gguf

    patched: Any = gguf.Metadata
    upstream = patched.set_gguf_meta_model

    def with_own_keys(metadata: Any, writer: Any) -> None:
        upstream(metadata, writer)
        for key, value in card.items():
            if "." in key:
                writer.add_string(key, value)

    patched.load_model_card = staticmethod(lambda folder: card)
    patched.load_hf_parameters = staticmethod(lambda folder: {})  # _name_or_path is where the base once lay
    patched.set_gguf_meta_model = with_own_keys


if __name__ == "__main__":
    main()
