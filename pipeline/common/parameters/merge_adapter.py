"""params.yaml, `merge_adapter`: the merged model."""

from typing import Literal

from pipeline.common.parameters.section import Section


class MergeAdapter(Section):
    base: Literal["auto", "bf16", "dequantized_nf4"]
