"""Makes a folder in which the train_qlora stage can run alone: with a base, parameters and dvc.yaml."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pipeline.common.outputs import write_json
from pipeline.model.base import copy_tokenizer, describe, fetched
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.gguf_base import unpack_if_gguf

ROOT = Path(__file__).parent.parent
TINY = ROOT / "models/tiny-base"


def make_project(project: Path, config: PreTrainedConfig | None, parameters: dict[str, Any]) -> None:
    """Write the files into the empty folder `project`. `parameters`, such as {"lora.r": 8}, replace the defaults.

    The base is the built-in one. With `config` it has that shape, random weights, and the built-in base's tokenizer.
    """
    (project / "base").mkdir()
    (project / "data/tokens").mkdir(parents=True)
    (project / "metrics").mkdir()
    if config is None:
        shutil.copytree(TINY, project / "base", dirs_exist_ok=True, ignore=shutil.ignore_patterns("recipe", ".dvc*"))
    else:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(project / "base")
        copy_tokenizer(TINY, project / "base")
    write_base(project)
    for name in ("dvc.yaml", "libraries.yaml"):
        shutil.copy(ROOT / name, project)
    shutil.copy(ROOT / "params.yaml", project)
    set_parameters(project, {"base.device": "cpu", "base.compute_dtype": "float32"} | parameters)


def write_base(project: Path) -> None:
    """What prepare_base makes of the folder `base`."""
    write_json(project / "models/base.json", describe(str(project / "base"), None))
    template = load_tokenizer(project / "base").get_chat_template()
    (project / "models/chat_template.jinja").write_text(template, encoding="utf-8")


def name_and_value(text: str) -> tuple[str, Any]:
    """Parse an argument, such as lora.r=8, for argparse."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value, such as lora.r=8")
    return name, YAML(typ="safe").load(value)


def set_parameters(project: Path, parameters: dict[str, Any]) -> None:
    """Change params.yaml of `project`: {"lora.r": 8}."""
    yaml = YAML()
    yaml.width = 2**16  # no line is folded
    values = yaml.load(project / "params.yaml")
    for name, value in parameters.items():
        *sections, key = name.split(".")
        (values[sections[0]] if sections else values)[key] = value
    yaml.dump(values, project / "params.yaml")


def with_base(project: Path, model: Path) -> None:
    """Replace the base of the project by `model`, a GGUF file."""
    shutil.rmtree(project / "base")
    unpack_if_gguf(str(model), 2)
    shutil.copytree(fetched(str(model), None)[0], project / "base")
    write_base(project)
