"""How much disk a run of the pipeline fills."""

from collections.abc import Sequence

from pipeline.common.paths import GGUF, MERGED
from pipeline.export.disk import gguf_bytes

CHECKPOINTS = 4  # training keeps three, and writes one


def disk_needed(
    parameters: int,
    itemsize: int,
    adapter: int,
    optimizer: int,
    quantize: Sequence[str],
    copies: int,
    aligned: bool = False,
) -> dict[str, int]:
    """{folder: bytes} that a run needs. `scratch` is the temporary maximum: checkpoints, then the base, rounded to NF4
    and as GGUF.

    The base has `parameters` weights of `itemsize` bytes. `adapter` and `optimizer` (its states) are in bytes. `copies`
    of each output: 2 if DVC's cache has a copy, 1 if it links. `aligned`: preference training makes another adapter.
    """
    return {
        # As trained, aligned, and with its card; DVC's cache stores equal files once.
        "outputs": (3 * copies - 2 + aligned) * adapter,
        str(MERGED): copies * parameters * itemsize,
        str(GGUF): copies * (gguf_bytes(parameters, quantize) + adapter),
        "scratch": max(CHECKPOINTS * (adapter + optimizer), (itemsize + 2) * parameters),
    }
