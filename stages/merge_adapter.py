"""The base's weights with the adapter added.

    python -m stages.merge_adapter

models/base.json, outputs/aligned/ -> models/merged/
"""

from pipeline.common.outputs import atomic_output
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import ALIGNED, MERGED
from pipeline.export.disk import room_for
from pipeline.export.merging import merge, merges_onto_nf4
from pipeline.model.base import copy_tokenizer, located, require_same_base, weight_files
from pipeline.model.loading import pick_device, pick_dtype
from stages import run


def main() -> None:
    parameters = load("merge_adapter")
    on_nf4 = merges_onto_nf4(parameters.merge_adapter.base, parameters.base.quantization)
    dtype = pick_dtype(parameters.base.compute_dtype, pick_device(parameters.base.device))
    folder, base = located()
    require_same_base(ALIGNED, base)
    size = sum(file.stat().st_size for file in weight_files(folder))
    with room_for(size, MERGED), atomic_output(MERGED) as aside:
        aside.mkdir()
        merge(folder, ALIGNED, aside, on_nf4, dtype)
        copy_tokenizer(ALIGNED, aside)  # with the chat template of training


if __name__ == "__main__":
    run(main)
