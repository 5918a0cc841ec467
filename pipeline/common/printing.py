"""Hides warnings that the user cannot act on, and prints progress as lines where there is no terminal."""

import logging
import os
import sys
import warnings

# Environment variables with defaults of tqdm (https://tqdm.github.io/docs/tqdm/): one line every ten seconds, and none
# for a shorter bar. MINITERS 1 prints after each slow step, even if the steps before were fast.
LINES = {"MININTERVAL": "10", "DELAY": "10", "MINITERS": "1", "BAR_FORMAT": "{l_bar}{bar}{r_bar}\n"}


def calm_libraries() -> None:
    """Call this before tqdm is imported: tqdm reads its defaults once."""
    # transformers warns about its own calls of names that it will rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # bitsandbytes warns that it cannot download a kernel from the hub; it works without the kernel.
    no_kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    no_kernels.addFilter(lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward"))
    # transformers warns of what load_base asks for.
    dequantized = logging.getLogger("transformers.integrations.bitsandbytes")
    dequantized.addFilter(lambda record: not str(record.msg).startswith("The modules are dequantized"))
    if not sys.stderr.isatty():
        for name, value in LINES.items():
            os.environ.setdefault(f"TQDM_{name}", value)
