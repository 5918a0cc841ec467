"""Write models/base-f16.gguf: the base on which llama.cpp runs models/gguf/adapter-f16.gguf.

    python -m tools.base_gguf

If training had the base in NF4, the file has the weights rounded to NF4: on other weights, the adapter gives other
answers.
"""

from pathlib import Path

from pipeline.common.outputs import atomic_output
from pipeline.common.parameters.params_yaml import check
from pipeline.common.paths import ADAPTER
from pipeline.export.base_gguf import convert_base
from pipeline.export.modelfile import BASE
from pipeline.model.base import located
from pipeline.model.loading import pick_device, pick_dtype


def main() -> None:
    parameters = check(Path("params.yaml"))
    folder, _ = located()
    file = Path("models", BASE)
    dtype = pick_dtype(parameters.base.compute_dtype, pick_device(parameters.base.device))
    with atomic_output(file) as aside:
        convert_base(folder, ADAPTER, parameters.base.quantization, dtype, aside)
    print(file)


if __name__ == "__main__":
    main()
