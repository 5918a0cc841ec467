"""The base as a GGUF file, for the GGUF LoRA."""

from pathlib import Path

import torch

from pipeline.common.outputs import scratch
from pipeline.export.llama_cpp import run_script
from pipeline.export.merging import merge
from pipeline.model.base import TOKENIZER_FILES, chat_template, copy_tokenizer


def convert_base(base: Path, adapter: Path, quantization: str, dtype: torch.dtype, file: Path) -> None:
    """Write `base` to `file` in float16, with the weights that training had: with NF4, rounded to `dtype` and NF4.

    The chat template is that of `adapter`, which training had too.
    """
    with scratch(file) as folder:
        if quantization == "nf4":
            merge(base, None, folder, on_nf4=True, dtype=dtype)
        else:
            for each in base.iterdir():
                if each.is_file() and each.name not in TOKENIZER_FILES:
                    (folder / each.name).symlink_to(each.resolve())
        copy_tokenizer(base, folder, chat_template(adapter))
        run_script("convert.py", "hf", folder, "--outtype", "f16", "--outfile", file)
