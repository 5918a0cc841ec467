"""What a language model has replied, kept in data/replies.jsonl: {"key", "reply", "tokens"} a line.

The file is an output of DVC that persists: no run deletes it, each adds to it, and it is cached and pushed. A reply is
in a journal beside DVC's cache before it is used, and stays there: no kill and no checkout loses what was paid
for. To ask about everything anew, delete both.
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

# Experiments that run in folders of their own share it.
JOURNAL = Path(os.environ.get("DVC_ROOT", "."), ".dvc/tmp/replies.jsonl")


@dataclass
class Replies:
    """Every reply there is, by its key. Threads may share it."""

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
    """All replies so far, and in the end the file of all, in the order of their keys: they arrive in a random one.

    Raises:
        UserError: another process adds to them, or they were not pulled.
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
    """Raises UserError if dvc.lock knows replies, which another clone has paid for, and none are here."""
    lock = Path("dvc.lock")
    if REPLIES.exists() or not lock.exists():
        return
    outs = read_yaml(lock).get("stages", {}).get("generate", {}).get("outs", [])
    if any(out["path"] == str(REPLIES) and out["size"] > 1 for out in outs):
        raise UserError(
            f"{REPLIES} is not here, and dvc.lock knows one, which was paid for: run dvc pull {REPLIES}, or make an "
            "empty file there to pay anew"
        )
