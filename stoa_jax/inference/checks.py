"""Checks of the arguments of a model's calls, and the errors that they raise."""

from collections.abc import Sized
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from stoa_jax.errors import InputError
from stoa_jax.inference.videos import Clip

if TYPE_CHECKING:
    from stoa_jax.text import Tokenizer

_TRAIN = {
    "match": "fine-tune it with --config=configs/retrieval.py, or load a STOA-VLP checkpoint",
    "caption": "fine-tune it with --config=configs/captioning.py, or load a STOA-VLP checkpoint",
    "answer": "fine-tune it with --config=configs/qa.py, or load a checkpoint that was",
    "trajectories": "train one with --config.model.objects=true",
    "actions": "train one with --config.model.actions=true",
}
_HEADS = {
    "match": "match head",
    "caption": "language-model head",
    "answer": "answer head",
    "trajectories": "trajectory encoder",
    "actions": "action encoder",
}


def missing_head(call: str, where: str, head: str, unlisted: bool) -> str:
    """Return the message for a head that `where` lacks; `unlisted`: its answers have no names."""
    if unlisted:
        return (
            f"{call}: {where} has an answer head but no list of answers; put answers.json, a "
            "JSON list in the order of the classes, beside the weights"
        )
    return f"{call}: {where} has no {_HEADS[head]}; {_TRAIN[head]}"


def listed(items: Any, call: str, what: str) -> list[Any]:
    """Return a list of videos or texts, or raise InputError if it is empty or not a list."""
    one = what.removesuffix("s")
    if isinstance(items, str | bytes | PathLike | Clip):
        raise InputError(f"{call} takes a list of {what}; put the single {one} in a list")
    if isinstance(items, np.ndarray) and what == "videos" and items.ndim == 4:
        raise InputError(f"{call} takes a list of videos; put the single array in a list")
    try:
        items = list(items)
    except TypeError:
        raise InputError(f"{call} takes a list of {what}, not a {type(items).__name__}") from None
    if not items:
        raise InputError(f"{call}: the list of {what} is empty; pass at least one {one}")
    return items


def one_for_each(call: str, videos: Sized, texts: Sized, what: str) -> None:
    """Raise InputError unless there are as many texts as videos."""
    if len(videos) != len(texts):
        raise InputError(
            f"{call}: {len(videos)} videos and {len(texts)} {what}s; give one {what} for each video"
        )


def positive(call: str, **values: Any) -> None:
    """Raise InputError for a value that is not an integer of 1 or more."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{call}: {name} is {value!r}; it must be an integer of 1 or more")


def token_row(
    tokenizer: "Tokenizer", text: str, length: int, where: str, truncate: bool
) -> np.ndarray:
    """Return the ids [length] of a text, or raise InputError if it is empty or too long."""
    if not isinstance(text, str):
        raise InputError(f"{where} is a {type(text).__name__}, not a str")
    pieces = tokenizer.pieces(text)
    count, room = sum(len(piece.ids) for piece in pieces), length - 2
    if not count:
        raise InputError(f"{where} is {text!r}, which has no words")
    if count > room and not truncate:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise InputError(
            f"{where} has {count} pieces and the model reads {room} ({shown!r}); shorten it, "
            "or pass truncate=True (--truncate) to cut it"
        )
    return tokenizer.pack(pieces, length)
