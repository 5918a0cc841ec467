"""params.yaml, read and checked."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.common.errors import UserError
from pipeline.common.parameters.schema import Parameters


def load(stage: str) -> Parameters:
    """Read and check the complete params.yaml; return only what `stage` declares in dvc.yaml.

    Reading any other parameter raises AttributeError, so that DVC always knows what a stage depends on.

    Raises:
        UserError: params.yaml has an unknown, missing or wrong value.
    """
    declared = read_yaml(Path("dvc.yaml"))["stages"][stage].get("params", [])
    return only(check(Path("params.yaml")), [key for key in declared if isinstance(key, str)])


def check(path: Path) -> Parameters:
    """Raises UserError, naming every key that is unknown, missing or of a wrong type or value."""
    try:
        return Parameters.model_validate(read_yaml(path) or {})
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(explained(error))}") from None


def read_yaml(path: Path) -> Any:
    """As DVC reads it: by YAML 1.2, in which 2e-4 is a number. By YAML 1.1, PyYAML's, it is text."""
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def explained(error: ValidationError) -> list[str]:
    """Each wrong key once: its name, what was given, what is accepted."""
    sentences: dict[str, str] = {}
    for mistake in error.errors():
        key, given, message = ".".join(map(str, mistake["loc"][:2])), mistake["input"], mistake["msg"]
        message = message[0].lower() + message[1:]
        if mistake["type"] == "extra_forbidden":
            sentences[key] = f"{key} is not a parameter; accepted here: {', '.join(siblings(key))}"
        elif mistake["type"] == "missing":
            sentences[key] = f"{key} is missing"
        elif key in sentences:  # a key that may be of two types has one error for each
            sentences[key] += f", or {message}"
        else:
            sentences[key] = f"{key} is {given!r}: {message}"
    return list(sentences.values())


def siblings(key: str) -> list[str]:
    section, dot, _ = key.partition(".")
    owner = Parameters.model_fields[section].annotation if dot else Parameters
    return list(owner.model_fields)  # type: ignore[union-attr]


def only(parameters: Parameters, declared: list[str]) -> Parameters:
    """`parameters` without the values of keys that `declared` ("seed", "lora", "train.epochs", ...) does not name."""
    kept: dict[str, Any] = {}
    for name, value in parameters:
        if name in declared:
            kept[name] = value
        elif keys := [key.partition(".")[2] for key in declared if key.startswith(f"{name}.")]:
            kept[name] = type(value).model_construct(**{key: getattr(value, key) for key in keys})
    return Parameters.model_construct(**kept)
