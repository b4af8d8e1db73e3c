"""The record of videos that could not be added: one JSON object per line, beside the index."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from stoa_jax.errors import UserError
from stoa_jax.index import files


class Failures:
    """`failures.jsonl`: written as failures occur, without videos that succeed later."""

    def __init__(self, path: Path | None):
        self._path = path
        self._now: dict[str, dict] = {}

    def record(self, identity: str, video: str | None, error: str) -> None:
        """Record that a video failed."""
        entry = {
            "id": identity,
            "video": video,
            "error": error,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._now[identity] = entry
        if self._path is not None:
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(_line(entry))
            except OSError as problem:
                raise UserError(f"{self._path}: cannot be written: {problem.strerror}") from problem

    def finish(self, tried: set[str]) -> None:
        """Keep the newest failure of each video; drop those of `tried` that did not fail again."""
        if self._path is None or not self._path.exists():
            return
        kept = {e["id"]: e for e in read(self._path) if e["id"] not in tried} | self._now
        if kept:
            files.replace(self._path, "".join(map(_line, kept.values())).encode())
        else:
            os.unlink(self._path)


def read(path: Path) -> Iterator[dict]:
    """Yield the recorded failures, without a last line that was cut short by a kill."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "id" in entry:
            yield entry


def _line(entry: dict) -> str:
    return json.dumps(entry) + "\n"  # ASCII, because ids may contain text that UTF-8 cannot encode
