"""Byte ranges and validators of HTTP (RFC 9110, sections 13 and 14)."""

import email.utils
import re
from typing import NamedTuple

_ONE = re.compile(r"bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})", re.ASCII | re.IGNORECASE)


class Range(NamedTuple):
    """Bytes from `start` to `end`, both included."""

    start: int
    end: int


class Unsatisfiable(Exception):
    """No byte of the file is in the requested range."""


def parse(header: str | None, size: int) -> Range | None:
    """Return the range that a Range header requests, or None for the whole file.

    Several ranges, another unit or a malformed header get the whole file, as the standard allows,
    so that no answer is larger than the file.
    """
    found = _ONE.fullmatch(header.strip()) if header else None
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:  # a suffix range: the last bytes
        count = int(found[2])
        if not count or not size:
            raise Unsatisfiable
        return Range(max(0, size - count), size - 1)
    start = int(found[1])
    end = int(found[2]) if found[2] else size - 1
    if found[2] and end < start:
        return None
    if start >= size:
        raise Unsatisfiable
    return Range(start, min(end, size - 1))


def names_tag(header: str | None, tag: str) -> bool:
    """Return whether If-None-Match contains this entity tag."""
    if header is None:
        return False
    tags = [part.strip().removeprefix("W/") for part in header.split(",")]
    return "*" in tags or tag in tags


def range_still_valid(header: str | None, tag: str, modified: float) -> bool:
    """Return whether If-Range allows a part: no header, exactly this tag, or exactly this date."""
    if header is None:
        return True
    header = header.strip()
    if header.startswith('"'):
        return header == tag
    try:
        date = email.utils.parsedate_to_datetime(header)
        return date.timestamp() == int(modified)
    except (ValueError, TypeError, OverflowError):
        return False  # a weak tag, or not a date


def http_date(seconds: float) -> str:
    """Format a time as an HTTP date."""
    return email.utils.formatdate(int(seconds), usegmt=True)
