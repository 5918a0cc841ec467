"""Stores the replies of a language model in data/replies.jsonl: {"key", "reply", "tokens"} per line.

The file is a persistent output of DVC: each run adds to it, no run deletes it, and it is cached and pushed. Before a
reply is used, it is also written to a journal beside DVC's cache. So neither a killed run nor a checkout loses replies
that were paid for. To request everything again, delete both files.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from pipeline.common.errors import UserError
from pipeline.common.outputs import write_jsonl
from pipeline.common.parameters.params_yaml import read_yaml
from pipeline.common.paths import REPLIES
from pipeline.common.rows import read_jsonl

# Experiments in temporary folders share the journal.
JOURNAL = Path(os.environ.get("DVC_ROOT", "."), ".dvc/tmp/replies.jsonl")


@dataclass
class Replies:
    """All stored replies by key. Thread-safe."""

    journal: BinaryIO
    by_key: dict[str, dict[str, Any]]
    lock: Lock = field(default_factory=Lock)

    def add(self, key: str, reply: str, tokens: int) -> None:
        with self.lock:
            self.by_key[key] = {"key": key, "reply": reply, "tokens": tokens}
            self.journal.write(json.dumps(self.by_key[key]).encode() + b"\n")
            self.journal.flush()


@contextmanager
def kept_replies() -> Iterator[Replies]:
    """Yield the stored replies. At the end, write the file, sorted by key, because replies arrive in random order.

    Raises:
        UserError: another run adds replies, or the replies of dvc.lock were not pulled.
    """
    require_pulled()
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    with open(JOURNAL, "ab") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{JOURNAL}: another run is adding to it: wait until it ends, or end it") from None
        journal.truncate(JOURNAL.read_bytes().rfind(b"\n") + 1)  # a killed run may have left half a line
        so_far = [reply for file in (REPLIES, JOURNAL) if file.exists() for reply in read_jsonl(file)]
        replies = Replies(journal, {reply["key"]: reply for reply in so_far})
        try:
            yield replies
        finally:
            write_jsonl(REPLIES, sorted(replies.by_key.values(), key=lambda reply: reply["key"]))


def require_pulled() -> None:
    """Raises UserError if dvc.lock has replies (another clone paid for them), but the file is missing."""
    lock = Path("dvc.lock")
    if REPLIES.exists() or not lock.exists():
        return
    outs = read_yaml(lock).get("stages", {}).get("generate", {}).get("outs", [])
    if any(out["path"] == str(REPLIES) and out["size"] > 1 for out in outs):
        raise UserError(
            f"{REPLIES} is missing, and dvc.lock has one that was paid for: run dvc pull {REPLIES}, or create an "
            "empty file there to pay again"
        )
