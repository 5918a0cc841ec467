"""Fetch llama.cpp's converter at the version that source.txt pins, once per environment.

    python llama.cpp/fetch.py

The converter is stored in the environment, not the checkout, so that `dvc exp run --temp` and queued experiments
find it.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("source.txt")
VERSION = re.search(r"==(\S+)", SOURCE.read_text()).group(1)  # type: ignore[union-attr]
CONVERTER = Path(sys.prefix, "share", f"llama.cpp-{VERSION}")
WANTED = re.compile(
    r"[^/]+/vendor/llama\.cpp/((?:convert_(?:hf|lora)_to_gguf\.py|LICENSE|(?:conversion|gguf-py/gguf)/.+))"
)


def main() -> None:
    if CONVERTER.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        subprocess.run([*download, "--requirement", str(SOURCE)], check=True)
        unpack(next(Path(scratch).glob("*.tar.gz")))


def unpack(archive: Path) -> None:
    aside = CONVERTER.with_name(f"{CONVERTER.name}.partial")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 (Debian 12) lacks it
        for member in tar:
            if member.isfile() and (wanted := WANTED.fullmatch(member.name)):
                member.name = wanted[1]
                tar.extract(member, aside)
    aside.rename(CONVERTER)


if __name__ == "__main__":
    main()
