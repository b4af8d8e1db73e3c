"""Entries of a source, and the rows that could not become one."""

import dataclasses
import reprlib
import unicodedata
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A clip that has not been decoded.

    Captions: `texts` only. Questions: `answers[j]` answers `texts[j]`. Multiple choice: five texts
    per item, and `answers[j]` is the index of the right one.
    """

    video_id: str
    video_path: str
    texts: Sequence[str] = ()
    answers: Sequence[str] = ()
    start: float | None = None  # seconds
    end: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out while reading."""

    video: str
    error: str
    file: str
    line: int  # or index in a JSON list; 0: the whole file

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.video}: {self.error}" if self.video else f"{place}: {self.error}"


class Undetected(Skipped):
    """A clip without detections. It is built, and its objects are padding."""


class RowError(Exception):
    """The reason why one row is skipped."""


class SkippedRows:
    """The rows of a source that were left out, and why."""

    def __init__(self):
        self.rows: list[Skipped] = []

    def add(self, video: object, error: object, file: object, line: int) -> None:
        """Record one row that is left out."""
        name = "" if video is None else clean(str(video))[:200]
        self.rows.append(Skipped(name, " ".join(str(error).split()), str(file), line))


def clean(text: str) -> str:
    """Return a caption without control characters, lone surrogates and repeated spaces.

    Emoji, right-to-left text and its marks stay as they are.
    """
    if not text.isascii() or not text.isprintable():
        text = "".join(map(_clean_character, text))
    return " ".join(text.split())


def _clean_character(c: str) -> str:
    category = unicodedata.category(c)
    if category == "Cs":
        return "\ufffd"
    if category != "Cc":
        return c
    return " " if c.isspace() or c == "\x00" else ""


def caption(text: object, name: str = "caption") -> str:
    """Return the cleaned text, or raise RowError if it is empty or not a string."""
    if not isinstance(text, str):
        raise RowError(f"{name}: {shown(text)} is not a string")
    cleaned = clean(text)
    if not cleaned:
        raise RowError(f"{name}: empty")
    return cleaned


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 2, 60, 60, 60


def file_name(text: str, name: str) -> str:
    """Return a video's name if it is a valid file stem without directories, else raise RowError."""
    if not text or text != clean(text) or text in (".", "..") or set(text) & set("/\\"):
        raise RowError(f"{name}: {shown(text)} is not a file name")
    return text


def shown(value: object) -> str:
    """Return the representation of a value for an error message, at most 60 characters."""
    text = _short.repr(value)  # a full repr of pickled data could be endless
    return text if len(text) <= 60 else f"{text[:57]}..."
