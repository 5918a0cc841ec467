"""One module a stage, named like its entry in dvc.yaml; each runs alone as `python -m stages.<name>`."""

import os
import sys
import warnings
from types import TracebackType

# Before torch is imported: spinning OpenMP threads cost eight times the time on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The tokenizer's own threads deadlock in forked processes: https://github.com/huggingface/transformers/issues/5486
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# transformers warns of its own calls to what it is about to rename.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C ends a stage in one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted: dvc repro goes on from here", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = without_traceback
