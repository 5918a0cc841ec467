"""The variants of the model: tuned, merged, and each GGUF file."""


def source(variant: str) -> str:
    """The variant of the model that this one is made of: by merging, conversion or quantization."""
    if variant == "merged":
        return "tuned"
    return "merged" if variant.endswith("f16.gguf") else "model-f16.gguf"


def of_same_weights(variant: str, merged_onto: str) -> bool:
    """Whether a variant has its source's weights, but for their rounding. A LoRA runs on the base's own weights, which are
    others than those that `merge_adapter.base: dequantized_nf4` merges onto."""
    return not variant.startswith("adapter-") or merged_onto == "bf16"
