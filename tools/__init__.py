"""What a person runs by hand beside the pipeline."""

import os
import warnings

# As in stages/__init__.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
