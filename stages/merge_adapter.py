"""The base's weights with the adapter added.

    python -m stages.merge_adapter

models/base.json, outputs/trained/ -> models/merged/
"""

import shutil

from pipeline.common.outputs import atomic_output
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import MERGED, TRAINED
from pipeline.export.disk import room_for
from pipeline.export.merging import merge
from pipeline.model.base import SMALL_FILES, located, require_same_base, weight_files
from stages import run


def main() -> None:
    parameters = load("merge_adapter")
    folder, base = located()
    require_same_base(TRAINED, base)
    size = sum(file.stat().st_size for file in weight_files(folder))
    with room_for(size, MERGED), atomic_output(MERGED) as aside:
        aside.mkdir()
        merge(folder, TRAINED, aside, on_nf4=parameters.merge_adapter.base == "dequantized_nf4")
        for pattern in SMALL_FILES:
            for file in folder.glob(pattern):
                shutil.copyfile(file, aside / file.name)


if __name__ == "__main__":
    run(main)
