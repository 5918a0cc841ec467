"""Every parameter of params.yaml.

A stage depends on the sections whose parameters it declares, and not on this list: see tools/deps.py.
"""

from typing import Annotated

from pydantic import Field

from pipeline.common.parameters.align import Align
from pipeline.common.parameters.base import Base
from pipeline.common.parameters.evaluate import Evaluate
from pipeline.common.parameters.gate import Gate
from pipeline.common.parameters.generate import Generate
from pipeline.common.parameters.gguf import Gguf
from pipeline.common.parameters.lora import Lora
from pipeline.common.parameters.merge import Merge
from pipeline.common.parameters.merge_adapter import MergeAdapter
from pipeline.common.parameters.section import Positive, Section
from pipeline.common.parameters.tokenize import Tokenize
from pipeline.common.parameters.train import Train


class Parameters(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    threads: Positive
    base: Base
    generate: Generate
    merge: Merge
    tokenize: Tokenize
    lora: Lora
    train: Train
    align: Align
    evaluate: Evaluate
    merge_adapter: MergeAdapter
    gguf: Gguf
    gate: Gate
