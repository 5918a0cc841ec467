"""The variants of the model: tuned, merged, and each GGUF file."""


def source(variant: str) -> str:
    """The variant that `variant` is made of, by merging, by conversion to GGUF or by quantization."""
    if variant == "merged" or variant.startswith("adapter-"):
        return "tuned"
    return "merged" if in_16_bits(variant) else "model-f16.gguf"


def in_16_bits(variant: str) -> bool:
    """Whether the weights of `variant` differ from those of the tuned model by rounding alone."""
    return variant == "merged" or variant.endswith("f16.gguf")
