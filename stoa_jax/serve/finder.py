"""What the page does, without the page: search, look at a clip, ask, explain."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.serve.library import GoneError, Library, printable
from stoa_jax.serve.uploads import Uploads

RESULTS = 8  # of a search
ANSWERS = 3  # of a question
MAX_TEXT = 500  # letters of a query


@dataclasses.dataclass(frozen=True)
class Moment:
    """A segment of a video of the library."""

    row: int
    name: str
    start: float | None
    end: float | None
    score: float = 0.0
    probability: float | None = None
    matched: bool | None = None
    gone: str = ""  # why it cannot be shown


class Finder:
    """An index with its model and the library of its videos.

    `detections` is a file or a directory of detections of the videos, as `stoa_jax.Clip` takes it.
    """

    def __init__(
        self,
        index: Any,
        model: Any,
        library: Library,
        uploads: Uploads,
        detections: str | Path | None = None,
    ):
        self.index, self.model, self.library, self.uploads = index, model, library, uploads
        self.detections = detections
        self.has = set(model.has)

    @property
    def explains(self) -> bool:
        """Whether the model can say what it matches to which word."""
        return "match" in self.has and bool(self.has & {"trajectories", "actions"})

    def search(self, text: str) -> list[Moment]:
        """Return the moments that fit a text best."""
        return [self._moment(hit) for hit in self.index.search(checked(text), RESULTS)]

    def search_clip(self, token: str) -> list[Moment]:
        """Return the moments that look most like an uploaded clip, which is then deleted."""
        with self.uploads.taken(token) as path:
            try:
                hits = self.index.search(path, RESULTS)  # a Path: a string would be a text
            except UserError as error:
                raise UserError(str(error).replace(str(path), "the uploaded clip")) from None
        return [self._moment(hit) for hit in hits]

    def _moment(self, hit: Any) -> Moment:
        row, gone = self.library.row(hit.id), ""
        name = printable(os.path.basename(hit.video or "") or hit.id)
        if row is None:
            gone = f"{name}: added after the page was started; start it again"
        else:
            try:
                self.library.check(row)
            except GoneError as error:
                gone = str(error)
        return Moment(
            -1 if row is None else row,
            name,
            *(hit.start, hit.end, hit.score, hit.probability, hit.matched),
            gone,
        )

    def caption(self, moment: Moment) -> str:
        """Return the model's sentence about a moment."""
        (text,) = self._ask("caption", moment, lambda clip: self.model.caption([clip]))
        return text

    def answer(self, moment: Moment, question: str) -> list[Any]:
        """Return the likeliest answers to a question, with their probabilities."""
        question = checked(question)
        (found,) = self._ask(
            "answer", moment, lambda clip: self.model.answer([clip], [question], top=ANSWERS)
        )
        return found

    def explain(self, moment: Moment, text: str) -> Any:
        """Return which trajectory and action is matched to which word of a text."""
        text = checked(text)
        return self._ask("match", moment, lambda clip: self.model.explain(clip, text))

    def frames(self, moment: Moment) -> list[np.ndarray]:
        """Return the frames that the model samples from a moment."""
        from stoa_jax.data.video import read_frames

        def read(clip: Any) -> list[np.ndarray]:
            frames, _ = read_frames(clip.video, self.model.config.frames, clip.start, clip.end)
            return frames

        return self._ask("embed", moment, read)

    def _ask(self, head: str, moment: Moment, call: Any) -> Any:
        """Call with the moment as a clip; errors name the video, not where it lies."""
        import stoa_jax

        if head not in self.has:
            raise UserError(f"this model cannot do that: it has {', '.join(sorted(self.has))}")
        opened = self.library.open(moment.row)
        opened.file.close()
        from stoa_jax.inference.detections import names_video  # here: it imports the data readers

        found = self.detections
        if found is not None and not names_video(found, opened.path):
            found = None  # a library may hold videos that the detector did not see
        clip = stoa_jax.Clip(str(opened.path), moment.start, moment.end, found)
        try:
            return call(clip)
        except UserError as error:
            raise UserError(str(error).replace(str(opened.path), moment.name)) from None


def checked(text: str) -> str:
    """Return a typed text without surrounding space, or say what is wrong with it."""
    text = (text or "").strip()
    if not text:
        raise UserError("type something first")
    if len(text) > MAX_TEXT:
        raise UserError(f"the text has {len(text)} letters, and {MAX_TEXT} are the limit")
    return text
