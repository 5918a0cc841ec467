"""Loads the tuned model or its base with Transformers, for the tools that answer questions."""

import json
from typing import Any

import transformers
from transformers import PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.outputs import write_json
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import ADAPTER, BASE
from pipeline.export.merging import read_config
from pipeline.model.base import describe, is_gguf, located, require_same_base
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import load_base, load_tuned, pick_device, pick_dtype, reproducible
from pipeline.model.tensor_files import stored_tensors
from pipeline.model.training_template import training_template


def load_model(parameters: Parameters, tuned: bool) -> tuple[PreTrainedModel, Any]:
    """The base as in the exam, with the adapter if `tuned`; and the tokenizer.

    Raises:
        UserError: a file is missing or damaged, or the adapter was trained on another base.
    """
    if tuned:
        if not (ADAPTER / "adapter_model.safetensors").exists():
            raise UserError(f"{ADAPTER}/adapter_model.safetensors is missing: run dvc repro model_card, or dvc pull")
        if not BASE.exists():  # after dvc pull of only the adapter
            fetch_base(parameters.base.model)
    folder, base = located()
    if tuned:
        require_same_base(ADAPTER, base)
        read_config(ADAPTER)  # this line and the next refuse damaged files
        stored_tensors(ADAPTER / "adapter_model.safetensors")
    device = pick_device(parameters.base.device)
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    reproducible(0, parameters.threads)
    transformers.utils.logging.disable_progress_bar()
    how = parameters.base.quantization, device, dtype
    model = load_tuned(folder, ADAPTER, *how) if tuned else load_base(folder, *how)
    return model.eval(), load_tokenizer(ADAPTER) if tuned else load_tokenizer(folder, training_template())


def fetch_base(local: str) -> None:
    """Download the adapter's hub model, or use the folder `local`, and write models/base.json as prepare_base does.

    Raises:
        UserError: the model does not exist, or the adapter was trained on another base.
    """
    trained_on = json.loads((ADAPTER / "base.json").read_text(encoding="utf-8"))
    if is_gguf(local):
        from pipeline.model.gguf_base import unpack_if_gguf  # needs gguf, which requirements-infer.txt lacks

        unpack_if_gguf(local, 1)
    base = describe(trained_on["model"] if trained_on["revision"] else local, trained_on["revision"])
    require_same_base(ADAPTER, base)
    write_json(BASE, base)
