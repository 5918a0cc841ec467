"""One module a stage, named like its entry in dvc.yaml; each runs alone as `python -m stages.<name>`."""

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
# A dvc that is killed would leave its stage running, and the next one start another; so would a launcher. Linux alone
# has prctl.
if (LAUNCHED or "DVC_STAGE" in os.environ) and hasattr(ctypes.CDLL(None), "prctl"):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if LAUNCHED:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once, and the launcher tells of it
# Before torch is imported: spinning OpenMP threads cost eight times the time on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The tokenizer's own threads deadlock in forked processes: https://github.com/huggingface/transformers/issues/5486
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
calm_libraries()


def without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C ends a stage in one line, during its imports too, and what DVC deleted before it started it comes back."""
    if issubclass(kind, KeyboardInterrupt):
        if "DVC_STAGE" in os.environ:
            put_back_outputs(os.environ["DVC_STAGE"])
        print("interrupted: run dvc repro again to go on", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def run(stage: Callable[[], None]) -> None:
    """Run a stage's main function; if it fails, put back the outputs that DVC deleted before it started the stage."""
    try:
        stage()
    except (Exception, SystemExit) as error:
        if "DVC_STAGE" in os.environ and find_spec("dvc"):  # not in a Python other than the environment's
            put_back_outputs(os.environ["DVC_STAGE"])
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which not every stage imports
            raise UserError(OUT_OF_MEMORY) from None
        raise


sys.excepthook = without_traceback
# Before the stage's own imports, which may fail with other versions.
run(lambda: require_pinned(REQUIREMENTS))
run(require_listed)
