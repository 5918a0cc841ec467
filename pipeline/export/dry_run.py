"""Finds before training what cannot be merged after training, with the code that will merge.

Names, types and shapes decide. The adapter of a dry run has the header of a trained adapter's file, and no bytes.
"""

import tempfile
from pathlib import Path

from peft import get_peft_model_state_dict

from pipeline.common.errors import UserError
from pipeline.common.parameters.lora import Lora
from pipeline.export.merging import AGAIN, joined, model_weights, parts_by_weight, read_config
from pipeline.model.adapter import lora_config, require_possible, with_adapter
from pipeline.model.skeleton import skeleton
from pipeline.model.tensor_files import write_without_bytes


def require_mergeable(base: Path, lora: Lora, tokens: list[int]) -> None:
    """Check that an adapter with these parameters and trained `tokens` can be merged into the base.

    Raises:
        UserError: the base does not support such an adapter, or merging would refuse the adapter.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), base, lora, tokens)
        files, names = model_weights(base)
        try:
            parts_by_weight(Path(folder), read_config(Path(folder)), joined(files), names)
        except UserError as error:
            reason = str(error).replace(folder, "a trained adapter").removesuffix(f": {AGAIN}")
            raise UserError(f"{reason}: change lora in params.yaml, or choose another base.model") from None


def write_adapter(folder: Path, base: Path, lora: Lora, tokens: list[int]) -> None:
    """Write the files of an adapter as after training, without the bytes of its weights."""
    model = skeleton(base)
    require_possible(lora, model)
    tuned = with_adapter(model, lora_config(lora, tokens))
    weights = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    write_without_bytes(folder / "adapter_model.safetensors", weights)
    tuned.peft_config["default"].save_pretrained(folder)
