"""Describe the base model: which one, which revision, every file's hash.

    python -m stages.prepare_base

base.model, base.revision -> models/base.json, models/license.json (by the base's model card). A hub model's weights are
fetched into the Hugging Face cache, and stay there; only this stage uses the network, and only for a hub id.
"""

from pipeline.base import DESCRIPTION, LICENSE, describe, license_of
from pipeline.outputs import write_json
from pipeline.parameters import load
from pipeline.refusal import run


def main() -> None:
    parameters = load("prepare_base")
    base = describe(parameters.base.model, parameters.base.revision)
    write_json(DESCRIPTION, base)
    write_json(LICENSE, license_of(base["model"], base["revision"]))


if __name__ == "__main__":
    run(main)
