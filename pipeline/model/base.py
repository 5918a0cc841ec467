"""The files of the base model: their location, their hashes, and checks that they did not change."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.paths import BASE
from pipeline.model.hub_cache import snapshot, unpacked

# Copied unchanged wherever the tokenizer is needed: saving a loaded tokenizer changes files that llama.cpp reads.
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
SMALL_FILES = ["config.json", "generation_config.json", "*.safetensors.index.json", *TOKENIZER_FILES]
MODEL_FILES = [*SMALL_FILES, "*.safetensors"]
DEQUANTIZED = ["bitsandbytes", "fp8", "mxfp4"]  # methods whose weights Transformers dequantizes without a GPU


def describe(model: str, revision: str | None) -> dict[str, Any]:
    """The identity of a base: `model`, `revision` (the commit of a hub model, else None), `files` (SHA-256 of each),
    `tokenizer` and `chat_template` (a hash each), and `fingerprint` (a hash of all files). If the files have quantized
    weights, `quantized` is the method.

    Raises:
        UserError: the folder or hub model does not exist, or has no safetensors weights or no chat template.
    """
    folder, template = fetched(model, revision)
    if not has_weights(folder):
        raise UserError(f"base.model {model} has no .safetensors weights: choose a model that has them")
    files, made = hashes_of(model, folder), file_hashes(folder)
    return {
        "model": model,
        "revision": None if is_local(model) else folder.name,
        "fingerprint": joint_hash(files),
        "tokenizer": joint_hash({name: made[name] for name in TOKENIZER_FILES if name in made}),
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
        "files": files,
    } | ({"quantized": method} if (method := quantization_of(folder)) else {})


def fetched(model: str, revision: str | None, files: list[str] = MODEL_FILES) -> tuple[Path, str]:
    """The base's folder, and its chat template. Of a hub model, only `files` (names and patterns) are downloaded.

    Raises:
        UserError: the folder or hub model does not exist, has no chat template, a damaged config.json or quantized
            weights; or a local folder has no weights.
    """
    if is_local(model) and revision is not None:
        raise UserError(
            f"base.revision is {revision!r}, but base.model {model} is a local folder or file: set it to null"
        )
    folder = local_folder(model) if is_local(model) else download(model, revision, files)
    if not (folder / "config.json").exists():
        raise UserError(f"base.model {model} has no config.json: name the folder or hub id of a model for Transformers")
    try:
        method = quantization_of(folder)
    except ValueError as error:
        raise UserError(f"base.model: {folder}/config.json is damaged ({error}): fetch it again") from None
    if method and method not in DEQUANTIZED:
        raise UserError(
            f"base.model {model} is quantized already ({method}), and this pipeline cannot dequantize it: name the "
            "model that it was made of"
        )
    if Path(model).is_dir() and not has_weights(folder):
        raise UserError(
            f"base.model {model} has no .safetensors weights, or not all: add model.safetensors, or every file "
            "that model.safetensors.index.json names"
        )
    template = chat_template(folder)
    if template is None:
        raise UserError(f"base.model {model} has no chat template: choose its instruct or chat variant")
    return folder, template


def is_local(model: str) -> bool:
    """Whether `model` is a folder or a GGUF file of this machine, and not of the hub."""
    return Path(model).is_dir() or is_gguf(model)


def is_gguf(model: str) -> bool:
    """Whether `model` is a file. The files of Ollama's models have no suffix."""
    return model.endswith(".gguf") or Path(model).is_file()


def local_folder(model: str) -> Path:
    """The folder `model`, or the folder that pipeline.model.gguf_base made of the GGUF file `model`.

    Raises:
        UserError: the file does not exist, or was not unpacked since it changed.
    """
    if not is_gguf(model):
        return Path(model)
    if not Path(model).exists():
        raise UserError(f"base.model {model} does not exist: correct the path of the GGUF file")
    folder = unpacked(file_hash(Path(model)))
    if not folder.exists():
        raise UserError(f"base.model {model} is new or has changed: run dvc repro -f prepare_base")
    return folder


def quantization_of(folder: Path) -> str | None:
    """How the weights in the folder are quantized, by Transformers' name of the method; None if they are not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if not isinstance(config, dict):
        return str(config) if config else None
    return config.get("quant_method", "bitsandbytes")  # the first uploads have only load_in_4bit or load_in_8bit


def usable(folder: Path, fingerprint: str) -> Path:
    """The folder, or the one that pipeline.model.quantized_base made of it because its weights are quantized.

    Raises:
        UserError: that folder does not exist.
    """
    if quantization_of(folder) is None:
        return folder
    if not (made := unpacked(fingerprint)).exists():
        raise UserError(f"base.model {folder} is quantized, and not unpacked: run dvc repro -f prepare_base")
    return made


def has_weights(folder: Path) -> bool:
    """Whether the folder has all weight files: a download may be incomplete."""
    return all(file.exists() for file in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files that Transformers loads: model.safetensors, else the files in the index."""
    return [folder / name for name in sorted({*weights_index(folder).values()} or {"model.safetensors"})]


def weights_index(folder: Path) -> dict[str, str]:
    """{weight: file}; empty if there is a model.safetensors or no index."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return {}
    return json.loads(index.read_text(encoding="utf-8"))["weight_map"]


def download(model: str, revision: str | None, files: list[str]) -> Path:
    """The hub model's folder in the Hugging Face cache, named by its commit; only missing files are fetched."""
    try:
        return snapshot(model, revision, files)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"base.model {model!r} (base.revision {revision or 'null'}) is not a local folder, and the download from "
            f"the Hugging Face hub failed: check both names, the network, and HF_TOKEN for a gated model "
            f"({type(error).__name__}: {reason})"
        ) from None


def located() -> tuple[Path, dict[str, Any]]:
    """The folder of the base, and the content of models/base.json. Never uses the network.

    Raises:
        UserError: models/base.json is missing, the files have changed since, or the cache does not have them.
    """
    if not BASE.exists():
        raise UserError(f"{BASE} is missing: run dvc repro prepare_base, or dvc pull")
    described = json.loads(BASE.read_text(encoding="utf-8"))
    if described["revision"] is None:
        model = described["model"]
        folder = local_folder(model)
        if not folder.is_dir() or joint_hash(hashes_of(model, folder)) != described["fingerprint"]:
            raise UserError(f"base.model {model} has changed since prepare_base ran: run dvc repro -f prepare_base")
        return usable(folder, described["fingerprint"]), described
    try:
        folder = snapshot(described["model"], described["revision"], MODEL_FILES, local_files_only=True)
        for name in described["files"]:  # `make check` alone leaves a folder without weights in the cache
            (folder / name).stat()
        return usable(folder, described["fingerprint"]), described
    except FileNotFoundError:
        fetch = f"hf download {described['model']} --revision {described['revision']}"
        raise UserError(f"base.model {described['model']} is not in the Hugging Face cache: run {fetch}") from None


def public_name(base: dict[str, Any]) -> str:
    """The base's name in shared files: the hub id, or the name of a local folder or file (its path is private)."""
    return base["model"] if base["revision"] else Path(base["model"]).absolute().name.removesuffix(".gguf")


def require_same_base(adapter: Path, base: dict[str, Any]) -> None:
    """Raises UserError if the adapter was not trained on `base`."""
    trained_on = json.loads((adapter / "base.json").read_text(encoding="utf-8"))
    if trained_on["fingerprint"] != base["fingerprint"] and trained_on["model"] == public_name(base):
        raise UserError(
            f"{adapter}: the files of {base['model']} changed after training: restore them, or run dvc repro"
        )
    if trained_on["fingerprint"] != base["fingerprint"]:
        raise UserError(
            f"{adapter} was trained on {trained_on['model']} ({trained_on['fingerprint'][:12]}), but base.model is "
            f"{base['model']} ({base['fingerprint'][:12]}): set base.model to that base, or run dvc repro align"
        )


def hashes_of(model: str, folder: Path) -> dict[str, str]:
    """{name: SHA-256} of what identifies a base: the GGUF file `model`, or the files of the model in `folder`."""
    return {Path(model).name: file_hash(Path(model))} if is_gguf(model) else file_hashes(folder)


def file_hashes(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of the files of the model."""
    return {path.name: file_hash(path) for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))}


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joint_hash(files: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(files.items())).encode()).hexdigest()


def chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.exists() else None
    return template if template is None or isinstance(template, str) else json.dumps(template)


def copy_tokenizer(folder: Path, to: Path, template: str | None = None) -> None:
    """Copy the tokenizer's files, with the chat template `template` if it is given and another."""
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            (to / name).write_bytes((folder / name).read_bytes())
    if template is not None and template != chat_template(folder):
        (to / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")
        config = json.loads((to / "tokenizer_config.json").read_text(encoding="utf-8"))
        if config.pop("chat_template", None):  # llama.cpp's converter would prefer it
            (to / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
