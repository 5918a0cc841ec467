"""Run llama.cpp's own converters.

    python llama.cpp/convert.py hf   MODEL   [--card CARD] --outtype f16 --outfile FILE
    python llama.cpp/convert.py lora ADAPTER --base BASE [--card CARD] --outtype f16 --outfile FILE

CARD is a JSON file with metadata for FILE. Its keys are model card keys, or GGUF keys, which have a dot. Without CARD,
the converter guesses metadata from names of folders.

The converter identifies a byte-level BPE tokenizer by a hash over the token ids of one text. It refuses every unknown
tokenizer, and has no option to name a similar one. This script identifies a refused tokenizer by its split pattern,
which is all that llama.cpp needs to know.
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
    rf"{WORDS}|\p{{N}}|{REST}": "qwen2",  # one digit per token
    rf"{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--card", type=Path)
    options, upstreams = parser.parse_known_args()
    if not CONVERTER.exists():
        sys.exit(f"llama.cpp's converter is missing ({CONVERTER}): run python llama.cpp/fetch.py")
    sys.path[:0] = [str(CONVERTER), str(CONVERTER / "gguf-py")]  # before PyPI's gguf, which is older
    know_split_patterns()
    leave_out_further_heads()
    read_kinds_of_layers_as_written()
    if options.program == "lora":
        convert_adapters_of_mistral()
    begin_texts_as_transformers_does()
    if options.card:
        write_metadata(json.loads(options.card.read_text(encoding="utf-8")))
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
    sys.exit(f"{folder}/tokenizer.json has a split pattern that llama.cpp does not know: choose another base.model")


def leave_out_further_heads() -> None:
    """Leave out heads that predict further tokens (MTP): training does not adapt them, and not every base has them.

    The option --no-mtp does the same, and is an error for most architectures:
    https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
    """
    from conversion.base import ModelBase

    ModelBase.no_mtp = True


def read_kinds_of_layers_as_written() -> None:
    """Read the kinds of layers from config.json. Transformers renames them, and the converter knows the old names.

    https://github.com/ggml-org/llama.cpp/blob/master/conversion/granite.py (get_attn_layers)
    """
    from conversion.base import ModelBase

    upstream = ModelBase.load_hparams

    def as_written(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        config = upstream(folder, is_mistral_format)
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for into, of in ((config, written), (config.get("text_config", {}), written.get("text_config", {}))):
            into.update({key: of[key] for key in ("layer_types", "layers_block_type") if key in of})
        return config

    ModelBase.load_hparams = staticmethod(as_written)


def convert_adapters_of_mistral() -> None:
    """Use the class that converts Mistral 3 and Ministral. Upstream's wraps this class, and converts no adapter.

    Mistral 4 has another class, and then the conversion fails at the first name.
    https://github.com/ggml-org/llama.cpp/blob/master/conversion/mistral3.py
    """
    from conversion.base import ModelBase, ModelType
    from conversion.mistral3 import Mistral3Model  # type: ignore[import-not-found]

    text_models = ModelBase._model_classes[ModelType.TEXT]
    for name, of in list(text_models.items()):
        if of is Mistral3Model:
            text_models[name] = Mistral3Model.Ministral3Model


def begin_texts_as_transformers_does() -> None:
    """Write into the file whether texts begin with a BOS and with SentencePiece's space, as in Transformers.

    After a control token, such as the BOS of a chat template, Transformers adds the space only for a `legacy`
    tokenizer. llama.cpp adds both unless the file forbids it.
    """
    from conversion.base import TextModel
    from transformers import AutoTokenizer

    upstream = TextModel._set_vocab_sentencepiece

    def as_transformers(model: Any, *arguments: Any) -> None:
        upstream(model, *arguments)
        tokenizer = AutoTokenizer.from_pretrained(model.dir_model)
        after_bos = tokenizer.tokenize(f"{tokenizer.bos_token}x")[1]
        model.gguf_writer.add_add_space_prefix(after_bos.startswith("\u2581"))
        model.gguf_writer.add_add_bos_token(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id])

    TextModel._set_vocab_sentencepiece = as_transformers


def write_metadata(card: dict[str, str]) -> None:
    import gguf

    patched: Any = gguf.Metadata
    upstream = patched.set_gguf_meta_model

    def with_own_keys(metadata: Any, writer: Any) -> None:
        upstream(metadata, writer)
        for key, value in card.items():
            if "." in key:
                writer.add_string(key, value)

    patched.load_model_card = staticmethod(lambda folder: card)
    patched.load_hf_parameters = staticmethod(lambda folder: {})  # _name_or_path is a local path of the base's author
    patched.set_gguf_meta_model = with_own_keys


if __name__ == "__main__":
    main()
