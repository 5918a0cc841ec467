"""The one schema of params.yaml, and each stage's view of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.common.errors import UserError

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Every key is required, of exactly its type, and no other is accepted: params.yaml hides no default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise AttributeError(f"parameter {name!r} is read but not declared: add it to the stage in dvc.yaml")
            return super().__getattr__(name)


class Base(Section):
    model: Annotated[str, Field(min_length=1)]
    revision: str | None
    device: Literal["auto", "cpu", "cuda"]
    compute_dtype: Literal["auto", "float32", "bfloat16"]


class Generate(Section):
    phrasings_per_fact: Positive
    endpoint: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")] | None  # a key or password has no place in it
    model: Annotated[str, Field(min_length=1)] | None
    passage_length: Annotated[int, Field(ge=100)]
    questions_per_passage: Positive
    paraphrases: Annotated[int, Field(ge=0)]
    grounding: Annotated[float, Field(ge=0, le=1)]
    concurrency: Positive
    token_budget: Positive


# What merge tells the formats of rows apart by.
Column = Literal[
    "messages",
    "conversations",
    "system",
    "question",
    "answer",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
]


class Merge(Section):
    columns: dict[Column, str]
    on_invalid: Literal["raise", "skip"]
    on_leak: Literal["raise", "drop"]
    near_leak: Annotated[float, Field(ge=0.5, le=1)]
    near_duplicate: Annotated[float, Field(ge=0.5, lt=1)] | None
    valid_share: Annotated[float, Field(gt=0, lt=1)]
    split_by: Literal["row", "source"]


class Lora(Section):
    r: Positive
    alpha: Positive
    dropout: Share
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
    use_rslora: bool
    use_dora: bool
    modules_to_save: list[str]
    trainable_tokens: Literal["auto"] | list[str]


class Train(Section):
    max_length: Annotated[int, Field(ge=2)]
    on_overflow: Literal["raise", "drop", "truncate"]
    mask_history: bool
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
    optimizer: Literal["auto", "adamw_torch", "paged_adamw_8bit", "paged_adamw_32bit"]
    gradient_checkpointing: Literal["auto"] | bool
    activation_offloading: bool
    adapter_dtype: Literal["float32", "bfloat16"]
    eval_steps: Positive
    early_stopping_patience: Positive | None
    load_best_model_at_end: bool


class MergeAdapter(Section):
    base: Literal["bf16", "dequantized_nf4"]


class Evaluate(Section):
    max_new_tokens: Positive
    batch_size: Positive
    max_kl: Annotated[float, Field(gt=0)]
    repeats: Annotated[int, Field(ge=3)]


Quantization = Literal[
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q4_k_m",
    "q4_k_s",
    "q4_0",
    "iq4_nl",
    "iq4_xs",
    "q3_k_l",
    "q3_k_m",
    "iq3_m",
    "q3_k_s",
    "q2_k",
]


def in_lower_case(name: Any) -> Any:
    """Many write Q4_K_M, as llama.cpp does."""
    return name.lower() if isinstance(name, str) else name


class Gguf(Section):
    quantize: list[Annotated[Quantization, BeforeValidator(in_lower_case)]]
    imatrix: bool
    num_ctx: Positive
    temperature: Annotated[float, Field(ge=0)]


class Gate(Section):
    minimum: dict[str, float]
    max_drop: dict[str, Annotated[float, Field(ge=0)]]
    max_conversion_drop: Annotated[float, Field(ge=0, le=1)]
    max_general_drop: Annotated[float, Field(ge=0, le=1)]


class Parameters(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    threads: Positive
    base: Base
    generate: Generate
    merge: Merge
    lora: Lora
    train: Train
    evaluate: Evaluate
    merge_adapter: MergeAdapter
    gguf: Gguf
    gate: Gate


def load(stage: str) -> Parameters:
    """Read and check the whole params.yaml; return only what `stage` declares in dvc.yaml.

    Reading any other parameter raises AttributeError, so that DVC always knows what a stage depends on.

    Raises:
        UserError: params.yaml has an unknown, missing or wrong value.
    """
    declared = read_yaml(Path("dvc.yaml"))["stages"][stage].get("params", [])
    return only(check(Path("params.yaml")), declared)


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
