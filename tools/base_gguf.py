"""Write models/base-f16.gguf: the base on which llama.cpp runs models/gguf/adapter-f16.gguf.

    python -m tools.base_gguf

If training had the base in NF4, the file has the weights rounded to NF4: on other weights, the adapter gives other
answers.
"""

from pathlib import Path

from pipeline.common.parameters.params_yaml import check
from pipeline.export.base_gguf import convert_base
from pipeline.export.modelfile import BASE
from pipeline.model.base import located


def main() -> None:
    parameters = check(Path("params.yaml"))
    folder, _ = located()
    file = Path("models", BASE)
    convert_base(folder, parameters.base.quantization, file)
    print(file)


if __name__ == "__main__":
    main()
