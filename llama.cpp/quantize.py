"""Quantize a GGUF file as llama-quantize does.

python llama.cpp/quantize.py SOURCE DESTINATION q4_k_m
"""

import sys

from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize

# enum llama_ftype of llama.cpp's include/llama.h
FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}


def main() -> None:
    source, destination, name = sys.argv[1:]
    parameters = LlamaModelQuantizeParams()
    parameters.ftype = FILE_TYPES[name]
    model_quantize(source, destination, parameters)


if __name__ == "__main__":
    main()
