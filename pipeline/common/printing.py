"""What the libraries print: no warning that nobody can act on, and progress in lines where there is no terminal."""

import logging
import os
import sys
import warnings

# tqdm's defaults by the environment (https://tqdm.github.io/docs/tqdm/): a line every ten seconds, and none of a bar
# that takes less. One step is enough for a line, so that a slow step after fast ones does not wait for several.
LINES = {"MININTERVAL": "10", "DELAY": "10", "MINITERS": "1", "BAR_FORMAT": "{l_bar}{bar}{r_bar}\n"}


def calm_libraries() -> None:
    """To be called before tqdm is imported, which reads its defaults once."""
    # transformers warns of its own calls to what it is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # bitsandbytes misses a package that would fetch a kernel from the hub in the middle of a run, and does without.
    no_kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    no_kernels.addFilter(lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward"))
    if not sys.stderr.isatty():
        for name, value in LINES.items():
            os.environ.setdefault(f"TQDM_{name}", value)
