"""Lets torch's CPU build run autograd on tensors of a GPU that does not exist. Import this module before torch.

The build knows no devices of CUDA. cuda_guard.cpp registers these; a C++ compiler compiles the file in seconds. A build
for CUDA needs nothing.
"""

import ctypes
import os
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path


def load_guard() -> None:
    """Raises CalledProcessError if the C++ file cannot be compiled."""
    found = find_spec("torch")
    assert found and found.origin
    torch = Path(found.origin).parent
    if (torch / "lib/libtorch_cuda.so").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "guard.so")
        libraries = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        source = [f"-I{torch / 'include'}", str(Path(__file__).with_suffix(".cpp"))]
        options = ["-std=c++20", "-O1", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "c++"), *options, *source, "-o", str(built), *libraries], check=True)
        ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)


load_guard()
