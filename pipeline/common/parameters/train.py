"""params.yaml, `train`: the training."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.common.parameters.section import Positive, Section, Share


class Train(Section):
    learning_rate: Annotated[float, Field(gt=0)]
    epochs: Annotated[float, Field(gt=0)]
    batch_size: Positive
    gradient_accumulation: Positive
    processes: Positive
    strategy: Literal["ddp", "fsdp"]
    warmup_share: Share
    schedule: Literal["cosine", "linear", "constant_with_warmup"]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    kernels: Literal["auto", "liger", "none"]
    optimizer: Literal["auto", "adamw_torch", "paged_adamw_8bit", "paged_adamw_32bit"]
    gradient_checkpointing: Literal["auto"] | bool
    activation_offloading: Literal["auto"] | bool
    adapter_dtype: Literal["float32", "bfloat16"]
    eval_steps: Positive
    early_stopping_patience: Positive | None
    load_best_model_at_end: bool
