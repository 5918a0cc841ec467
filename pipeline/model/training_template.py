"""The chat template that prepare_base wrote, for the stages that make prompts with it."""

from pipeline.common.outputs import existing
from pipeline.common.paths import CHAT_TEMPLATE


def training_template() -> str:
    """Raises UserError if the file is missing."""
    return existing(CHAT_TEMPLATE).read_text(encoding="utf-8")
