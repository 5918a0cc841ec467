"""Which base model: its revision and the hash of every file.

    python -m stages.prepare_base

base.model, base.revision -> models/base.json, models/license.json (from the model card), models/chat_template.jinja
(the base's chat template, with base.thinking and tokenize.tool_format applied; it ships with the model). The weights
of a hub model are downloaded into the Hugging Face cache and stay there; quantized weights are also there in 16 bits.
Only this stage downloads files, and only for a hub id.
"""

import os

from pipeline.common.outputs import atomic_output, write_json
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import BASE, CHAT_TEMPLATE, LICENSE
from pipeline.export.llama_cpp import require_convertible
from pipeline.model.base import MODEL_FILES, describe, fetched
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.gguf_base import say_if_quantized, unpack_if_gguf
from pipeline.model.license import MODEL_CARD, license_of
from pipeline.model.quantized_base import unpack_if_quantized
from pipeline.model.tensor_files import weights_by_file
from pipeline.model.trained_template import trained_template
from stages import run


def main() -> None:
    parameters = load("prepare_base")
    unpack_if_gguf(parameters.base.model, os.cpu_count() or 1)
    base = describe(parameters.base.model, parameters.base.revision)
    say_if_quantized(parameters.base.model)
    folder, _ = fetched(base["model"], base["revision"], [*MODEL_FILES, MODEL_CARD])
    folder = unpack_if_quantized(folder, base["fingerprint"])
    weights_by_file(folder)  # raises UserError if a file is damaged
    require_convertible(folder)
    write_json(BASE, base)
    write_json(LICENSE, license_of(folder))
    template = trained_template(load_tokenizer(folder), parameters.base.thinking, parameters.tokenize.tool_format)
    with atomic_output(CHAT_TEMPLATE) as aside:
        aside.write_text(template, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run(main)
