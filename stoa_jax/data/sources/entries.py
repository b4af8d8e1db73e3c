"""What a source is made of: entries, and the rows that could not become one."""

import dataclasses
import reprlib
import unicodedata
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A clip that has not been decoded.

    Captions: `texts` only. Questions: `answers[j]` answers `texts[j]`. Multiple choice: five texts
    an item and `answers[j]` the index of the right one.
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
    line: int  # or the number of the item in a JSON list; 0: the whole file

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.video}: {self.error}" if self.video else f"{place}: {self.error}"


class Undetected(Skipped):
    """A clip without detections: it is built, and its objects are padding."""


class RowError(Exception):
    """What is wrong with one row; the row is skipped and named."""


class SkippedRows:
    """Collects rows that were left out."""

    def __init__(self):
        self.rows: list[Skipped] = []

    def add(self, video: object, error: object, file: object, line: int) -> None:
        """Notes one row."""
        name = "" if video is None else clean(str(video))[:200]
        self.rows.append(Skipped(name, " ".join(str(error).split()), str(file), line))


def clean(text: str) -> str:
    """A caption fit to be stored: no control characters, no lone surrogates, single spaces.

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
    """A cleaned text; refuses what is none."""
    if not isinstance(text, str):
        raise RowError(f"{name}: {shown(text)} is no text")
    cleaned = clean(text)
    if not cleaned:
        raise RowError(f"{name}: empty")
    return cleaned


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 2, 60, 60, 60


def file_name(text: str, name: str) -> str:
    """A video's name that is also the stem of a file, and nothing that leads elsewhere."""
    if not text or text != clean(text) or text in (".", "..") or set(text) & set("/\\"):
        raise RowError(f"{name}: {shown(text)} is no name of a file")
    return text


def shown(value: object) -> str:
    """A value in an error message, cut short."""
    text = _short.repr(value)  # what a pickle holds may be without end when spelt out
    return text if len(text) <= 60 else f"{text[:57]}..."
