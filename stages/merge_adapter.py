"""Add the adapter to the base's weights.

    python -m stages.merge_adapter

models/base.json, outputs/trained/ -> models/merged/
"""

import shutil
from pathlib import Path

from pipeline.base import SMALL_FILES, located, require_same_base, weight_files
from pipeline.disk import room_for
from pipeline.merging import merge
from pipeline.outputs import whole
from pipeline.parameters import load
from pipeline.refusal import run

TRAINED = Path("outputs/trained")
MERGED = Path("models/merged")


def main() -> None:
    parameters = load("merge_adapter")
    folder, base = located()
    require_same_base(TRAINED, base)
    size = sum(file.stat().st_size for file in weight_files(folder))
    with room_for(size, MERGED), whole(MERGED) as aside:
        aside.mkdir()
        merge(folder, TRAINED, aside, on_nf4=parameters.merge_adapter.base == "dequantized_nf4")
        for pattern in SMALL_FILES:
            for file in folder.glob(pattern):
                shutil.copyfile(file, aside / file.name)


if __name__ == "__main__":
    run(main)
