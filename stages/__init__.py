"""One module for each stage, named like the stage in dvc.yaml. `python -m stages.<name>` runs a stage alone."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import TracebackType

from pipeline.common.dvc_outputs import put_back_outputs
from pipeline.common.errors import OUT_OF_MEMORY, UserError
from pipeline.common.pinned import REQUIREMENTS, require_listed, require_pinned
from pipeline.common.printing import calm_libraries

PR_SET_PDEATHSIG = 1  # https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html

LAUNCHED = "LOCAL_RANK" in os.environ  # one of several processes, by accelerate launch
# Without this, a killed dvc or launcher leaves its stage running. Only Linux has prctl.
if (LAUNCHED or "DVC_STAGE" in os.environ) and hasattr(ctypes.CDLL(None), "prctl"):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if LAUNCHED:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once; the launcher prints the message
# To be set before torch is imported: on a busy machine, spinning OpenMP threads take eight times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The tokenizer's own threads deadlock in forked processes: https://github.com/huggingface/transformers/issues/5486
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
calm_libraries()


def without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a stage with one line after Ctrl-C, also during imports, and restore the outputs that DVC deleted."""
    if issubclass(kind, KeyboardInterrupt):
        if "DVC_STAGE" in os.environ:
            put_back_outputs(os.environ["DVC_STAGE"])
        print("interrupted: run dvc repro again to go on", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def run(stage: Callable[[], None]) -> None:
    """Run the main function of a stage. If it fails, restore the outputs that DVC deleted before the stage."""
    try:
        stage()
    except (Exception, SystemExit) as error:
        if "DVC_STAGE" in os.environ and find_spec("dvc"):  # not in a Python other than the environment's
            put_back_outputs(os.environ["DVC_STAGE"])
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which not every stage imports
            raise UserError(OUT_OF_MEMORY) from None
        raise


sys.excepthook = without_traceback
# Before the imports of the stage, which other versions may break.
run(lambda: require_pinned(REQUIREMENTS))
run(require_listed)
