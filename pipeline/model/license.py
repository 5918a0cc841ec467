"""Reads the license in a model card."""

from pathlib import Path

from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

MODEL_CARD = "README.md"  # not a file of the model: it may change or be missing


def license_of(folder: Path) -> dict[str, str]:
    """The license, license_name and license_link of a model card, without missing keys.

    https://huggingface.co/docs/hub/repositories-licenses
    """
    file = folder / MODEL_CARD
    try:
        card = metadata_load(file) if file.exists() else None
    except (YAMLError, ValueError):  # no valid front matter
        card = None
    keys = ("license", "license_name", "license_link")
    return {key: card[key] for key in keys if card and isinstance(card.get(key), str)}
