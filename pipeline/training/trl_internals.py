"""Uses of TRL, and of Transformers' trainer below TRL's, that their documentation does not cover.

tests/test_library_internals.py tests each use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from trl import SFTTrainer
from trl.trainer import utils as trl_utils

from pipeline.model.peft_internals import adapter_weights

# Without Triton, such as on a CPU, TRL computes the logits of all tokens, to spare compilers of other devices new
# shapes. Most tokens are those of prompts, and no option leaves them out:
# https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py (add_fused_lm_head, "compact")
trl_utils._use_triton = lambda device: True


class TokenCountingTrainer(SFTTrainer):
    """Does not count rows without supervised tokens: `num_input_tokens_seen` is the same for any number of processes.

    Transformers counts by the attention mask alone, and documents no other way to count:
    https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py (_track_num_input_tokens)
    """

    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]) -> None:
        supervised = (inputs["labels"] != -100).any(1, keepdim=True)
        super()._track_num_input_tokens(inputs | {"attention_mask": inputs["attention_mask"] * supervised})


def loss_and_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the sum of the losses of a batch and the number of its supervised tokens; shape (2,).

    SFTTrainer replaces the model's forward function by one that never has the logits of all tokens in memory.
    SFTTrainer's own losses are means over a batch:
    https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py (add_fused_lm_head)
    """
    outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    return torch.stack([-outputs.log_probs.sum(), outputs.label_mask.sum()])


@contextmanager
def adapter_kept_as(dtype: torch.dtype, model: PeftModel) -> Iterator[None]:
    """After the block, give the adapter of `model` its values from before the block, as `dtype`.

    The block makes an SFTTrainer, which rounds an adapter on a quantized base to bfloat16. No option prevents this:
    https://github.com/huggingface/trl/blob/main/trl/trainer/sft_trainer.py ("When using QLoRA")
    """
    initial = {name: weight.detach().clone() for name, weight in adapter_weights(model).items()}
    yield
    for name, weight in adapter_weights(model).items():
        weight.data = initial[name].to(dtype)
