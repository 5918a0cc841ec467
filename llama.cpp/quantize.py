"""Quantize a GGUF file as llama-quantize does.

    python llama.cpp/quantize.py SOURCE DESTINATION q4_k_m [--importance FILE]

FILE is from pipeline/export/importance.py: {weight name in Transformers: importance of each input}.
The use of cyllama beyond its documentation is `give_importance`; tests/test_library_internals.py tests it.
"""

import argparse
import ctypes
import sys
from typing import Any

from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
from fetch import CONVERTER
from safetensors.numpy import load_file

sys.path.insert(0, str(CONVERTER / "gguf-py"))  # before PyPI's gguf, which is older
import gguf


class Importance(ctypes.Structure):
    """struct llama_model_imatrix_data of llama.cpp's include/llama.h: the importance of one tensor."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class Parameters(ctypes.Structure):
    """struct llama_model_quantize_params."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("tensor_types", ctypes.c_int * 2),
        ("flags", ctypes.c_bool * 6),
        ("imatrix", ctypes.POINTER(Importance)),
        ("others", ctypes.c_void_p * 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("source", "destination", "type", "--importance"):
        parser.add_argument(name)
    options = parser.parse_args()
    wanted = LlamaModelQuantizeParams()
    wanted.ftype = gguf.LlamaFileType[f"MOSTLY_{options.type.upper()}"].value
    importance = importance_by_tensor(options.source, options.importance) if options.importance else {}
    kept = give_importance(wanted, importance) if importance else None  # which llama.cpp reads
    model_quantize(options.source, options.destination, wanted)
    del kept


def give_importance(wanted: LlamaModelQuantizeParams, importance: dict[str, Any]) -> Parameters:
    """Set the importance matrix of quantization parameters, one float32 array a tensor. The return value holds the
    arrays: keep the value until the file is quantized.

    The property `imatrix` of cyllama can be neither set nor read. The C struct is the end of the Python object:
    https://github.com/shakfu/cyllama/blob/main/src/cyllama/llama/llama_cpp.pyx (LlamaModelQuantizeParams)
    https://github.com/ggml-org/llama.cpp/blob/b9190/include/llama.h (llama_model_quantize_params)
    """
    parameters = Parameters.from_address(id(wanted) + type(wanted).__basicsize__ - ctypes.sizeof(Parameters))
    assert parameters.ftype == wanted.ftype and not parameters.imatrix, "this version of cyllama has another struct"
    entries = [
        Importance(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
        for name, values in importance.items()
    ]
    parameters.imatrix = (Importance * (len(entries) + 1))(*entries)  # an entry without a name marks the end
    return parameters


def importance_by_tensor(model: str, file: str) -> dict[str, Any]:
    """{tensor name in the GGUF file `model`: array of `file`}. Prints how many matrices have no array."""
    reader = gguf.GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    blocks = reader.fields[f"{architecture}.block_count"].contents()
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, blocks)
    found = {
        names.get_name(name.replace("language_model.", ""), (".weight",)): values
        for name, values in load_file(file).items()
    }
    matrices = [tensor.name for tensor in reader.tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    if unknown := sorted(set(matrices) - set(found)):  # such as experts, which are no linear layers in Transformers
        print(f"{len(unknown)} of {len(matrices)} matrices are quantized without importance, such as {unknown[0]}")
    return {name: found[name] for name in matrices if name in found}


if __name__ == "__main__":
    main()
