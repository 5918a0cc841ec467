"""Train the adapter further on pairs of a better and a worse answer (DPO, KTO, ORPO), or hand it on as it is.

    python -m stages.align

models/base.json, outputs/trained/, data/pair_tokens/, data/tokens/ -> outputs/aligned/, metrics/align.json,
metrics/align.csv, metrics/details/align.json; and metrics/align_cost.json, which DVC does not track
"""

import shutil

from pipeline.common.outputs import atomic_output, existing, write_details, write_json
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import ALIGN_DETAILS, ALIGN_METRICS, ALIGN_TABLE, ALIGNED, TRAINED
from stages import run


def main() -> None:
    parameters = load("align")
    if parameters.align.method == "none":
        hand_on()
    else:
        from pipeline.training.alignment import align  # torch takes seconds

        align(parameters)


def hand_on() -> None:
    """Copy the adapter of train_qlora, and write metrics without numbers."""
    with atomic_output(ALIGNED) as aside:
        shutil.copytree(existing(TRAINED), aside, copy_function=shutil.copyfile)
    with atomic_output(ALIGN_TABLE) as aside:
        aside.write_text("step,train,valid,accuracy,reward_margin,chosen_nll\n", encoding="utf-8")
    write_json(ALIGN_METRICS, {})
    write_details(ALIGN_DETAILS, {})


if __name__ == "__main__":
    run(main)
