"""The variants of the model: tuned, merged, and each GGUF file."""


def source(variant: str) -> str:
    """The variant that `variant` is made of, by merging, by conversion to GGUF or by quantization."""
    if variant == "merged":
        return "tuned"
    return "merged" if variant.endswith("f16.gguf") else "model-f16.gguf"


def of_same_weights(variant: str, merged_onto: str) -> bool:
    """Whether the weights of a variant and of its source differ by rounding alone.

    A GGUF LoRA runs on the base's own weights. With `merge_adapter.base: dequantized_nf4` the merged model has others.
    """
    return not variant.startswith("adapter-") or merged_onto == "bf16"
