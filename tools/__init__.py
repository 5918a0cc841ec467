"""Tools that people run by hand, beside the pipeline."""

import os
import sys
from types import TracebackType

from pipeline.common.printing import calm_libraries

# As in stages/__init__.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
calm_libraries()


def without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line after Ctrl-C, during imports too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = without_traceback
