"""Run llama.cpp's own converters.

    python llama.cpp/convert.py hf   MODEL   --outtype f16 --outfile FILE
    python llama.cpp/convert.py lora ADAPTER --base BASE --outtype f16 --outfile FILE

The converter knows a byte-level BPE tokenizer by a hash over the token ids of one text, so it refuses every tokenizer
that it has not seen, and has no option to say which it is like. Here a tokenizer that it refuses is looked up by its
split pattern, which is all that llama.cpp needs to know of it.
"""

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
    if not CONVERTER.exists():
        sys.exit(f"llama.cpp's converter is not at {CONVERTER}: run python llama.cpp/fetch.py")
    sys.path[:0] = [str(CONVERTER), str(CONVERTER / "gguf-py")]  # before PyPI's gguf, which is older
    from conversion.base import TextModel  # type: ignore[import-not-found]

    upstream = TextModel.get_vocab_base_pre

    def by_hash_or_pattern(model: Any, tokenizer: Any) -> str:
        try:
            return upstream(model, tokenizer)
        except NotImplementedError:
            return by_pattern(Path(model.dir_model))

    TextModel.get_vocab_base_pre = by_hash_or_pattern
    program = str(CONVERTER / PROGRAMS[sys.argv[1]])
    sys.argv[:2] = [program]
    runpy.run_path(program, run_name="__main__")


def by_pattern(folder: Path) -> str:
    pre_tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if name := SPLIT_PATTERNS.get(step.get("pattern", {}).get("Regex")):
            return name
    sys.exit(f"{folder}/tokenizer.json splits text in a way that llama.cpp has no name for: choose another base.model")


if __name__ == "__main__":
    main()
