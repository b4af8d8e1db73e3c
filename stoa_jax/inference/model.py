"""The model that `stoa_jax.load` returns: vectors, matches, captions, answers and explanations.

The file is long because `Model` is the public class: every call is documented here with an example.
Decoding, batching, compiled programs and drawing have their own modules.

Shapes: n videos, m texts, T frames, L text positions, d shared width.
"""

import dataclasses
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import jax
import numpy as np

from stoa_jax.errors import InputError, MissingHead, NotCalibrated, UserError
from stoa_jax.inference import batching, fingerprints, programs
from stoa_jax.inference.sidecars import Calibration
from stoa_jax.inference.videos import Clip, Failure, Prepared, Preprocessing, Video, prepare
from stoa_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from stoa_jax.inference.explain import Explanation
    from stoa_jax.models.stoa import Stoa
    from stoa_jax.text import Tokenizer
    from stoa_jax.weights import Report

TEXTS_AT_ONCE = 256
PAIRS_PER_VIDEO = 8  # pairs fused at once, per video of a batch; texts are short
OnError = Literal["raise", "skip"]

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


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to a question, and its probability among all answers."""

    text: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """The candidate that fits best, and the probability of each candidate."""

    index: int
    probabilities: np.ndarray  # [candidates], sums to 1


class Model:
    """A model ready for use, as `stoa_jax.load` returns it.

    `config` has the sizes, `kind` says what was opened, `has` what the model can do, and `source`
    where it came from.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        tokenizer: "Tokenizer",
        *,
        frames: int,
        network: "programs.Towers | Stoa | None" = None,
        encode_frames: Callable[[np.ndarray], Any] | None = None,
        encode_tokens: Callable[[np.ndarray], Any] | None = None,
        truncate: bool = False,
        answers: Sequence[str] = (),
        calibration: Calibration | None = None,
        untrained: Sequence[str] = (),
        record: Mapping[str, Any] | None = None,
        report: "Report | None" = None,
        source: str | Path = "",
        weights_hash: str = "",
    ):
        self.config, self.kind, self.tokenizer, self.frames = config, kind, tokenizer, frames
        self.network, self.report, self.source = network, report, str(source)
        self.truncate, self.answers, self.calibration = truncate, tuple(answers), calibration
        self.untrained = frozenset(untrained)
        self.record: Mapping[str, Any] = dict(record or {})  # of the training run, for the card
        self._weights_hash = weights_hash
        self._encode_frames = encode_frames or self._network_frames
        self._encode_tokens = encode_tokens or self._network_tokens
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        can = ", ".join(sorted(self.has))
        return f"<stoa_jax model {self.source or self.kind!r}: {can}; {self.fingerprint}>"

    # Properties

    @property
    def whole(self) -> "Stoa | None":
        """The whole STOA-VLP; None for a CLIP or an export, which have only the two towers."""
        from stoa_jax.models.stoa import Stoa

        return self.network if isinstance(self.network, Stoa) else None

    @property
    def has(self) -> set[str]:
        """What the model can do: embed, match, caption, answer, trajectories, actions."""
        can = {"embed"}
        if self.whole is None:
            return can
        can |= {"match", "caption"}
        if self.answers or self.config.answer_head == "first_piece":
            can.add("answer")
        if self.config.objects:
            can.add("trajectories")
        if self.config.actions:
            can.add("actions")
        return can - self.untrained

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and preprocessing; equal fingerprints give equal vectors.

        >>> model.fingerprint == stoa_jax.load("synthetic").fingerprint
        True
        """
        return fingerprints.of_model(self.weights_hash, self.tokenizer, self.preprocessing())

    @property
    def weights_hash(self) -> str:
        """Hash of all parameters by name."""
        if not self._weights_hash:
            self._weights_hash = fingerprints.of_weights(self.network)
        return self._weights_hash

    @property
    def threshold(self) -> float:
        """The calibrated threshold: a pair at or above it is a match.

        >>> bool(model.match([clip], ["a zebra drinks"])[0, 0] >= model.threshold)
        False
        """
        if self.calibration is None or self.calibration.threshold is None:
            raise NotCalibrated(
                f"{self.source}: this model was not calibrated and has no threshold; calibrate "
                f"it on a validation split: python -m stoa_jax.main --mode=calibrate "
                f"--config=configs/retrieval.py --workdir={self.source}"
            )
        return self.calibration.threshold

    def preprocessing(self, *, fused: bool = False) -> Preprocessing:
        """Return how a video becomes input, for vectors or for the fusion encoder."""
        c = self.config
        return Preprocessing(
            frames=c.frames if fused else self.frames,
            size=c.image_size,
            objects=c.objects_per_frame if fused and c.objects else 0,
            exact=fused or bool(c.joint_blocks),
        )

    # Vectors

    @overload
    def encode_video(
        self,
        videos: Sequence[Video | Clip],
        *,
        batch_size: int = ...,
        progress: bool = ...,
        on_error: Literal["raise"] = ...,
    ) -> np.ndarray: ...

    @overload
    def encode_video(
        self,
        videos: Sequence[Video | Clip],
        *,
        batch_size: int = ...,
        progress: bool = ...,
        on_error: Literal["skip"],
    ) -> tuple[np.ndarray, list[Failure]]: ...

    def encode_video(
        self,
        videos: Sequence[Video | Clip],
        *,
        batch_size: int = 16,
        progress: bool = False,
        on_error: OnError = "raise",
    ) -> Any:
        """Return unit vectors of videos, float32 [n, d]: the mean of their unit frame vectors.

        `frames` frames are sampled from a file. A shorter array is used as it is, unless the
        model's frames attend to each other.

        >>> model.encode_video(["example.mp4", clip]).shape
        (2, 128)
        >>> vectors, failed = model.encode_video([clip, "no.mp4"], on_error="skip")
        >>> len(vectors), failed[0].index
        (1, 1)
        """
        call = "encode_video"
        videos = _listed(videos, call, "videos")
        how, failed, out = self.preprocessing(), [], []
        for batch in batching.prepared(
            videos,
            lambda i, video: prepare(video, how).pixels,
            batch_size=batch_size,
            call=call,
            on_error=on_error,
            failed=failed,
            progress=progress,
        ):
            out.append(self._frame_vectors(batch, batch_size))
            if len(out) > 1:
                out[-2] = out[-2]()
        if out:
            out[-1] = out[-1]()
        found = np.concatenate([np.zeros((0, self.config.text_width), np.float32), *out])
        return (found, failed) if on_error == "skip" else found

    def encode_text(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = TEXTS_AT_ONCE,
        truncate: bool | None = None,
    ) -> np.ndarray:
        """Return unit vectors of texts, float32 [n, d].

        A text of more than `config.text_length` pieces raises InputError; with `truncate` (by
        default the model's) it is cut.

        >>> words = model.encode_text(["the red star rises", "a big ball shrinks"])
        >>> cosines = model.encode_video([clip]) @ words.T
        >>> cosines.shape
        (1, 2)
        """
        batching.check_batch_size(batch_size, "encode_text")
        tokens = self.tokens(texts, "encode_text", truncate)
        return batching.in_batches(self._encode_tokens, batch_size, tokens).astype(np.float32)

    # Calls of the fusion encoder

    def match(
        self,
        videos: Sequence[Video | Clip],
        texts: Sequence[str],
        *,
        pairs: bool = False,
        batch_size: int = 16,
        progress: bool = False,
        truncate: bool | None = None,
        on_error: OnError = "raise",
    ) -> Any:
        """Return the probability that each text describes each video, float32 [n, m].

        With `pairs`, text i is compared with video i only: [n]. Probabilities are calibrated if
        the model is; a pair is a match if its probability is at least `threshold`.

        >>> model.match([clip], ["the red star rises", "a big ball shrinks"]).shape
        (1, 2)
        >>> model.match([clip, clip], ["the star rises", "it shrinks"], pairs=True).shape
        (2,)
        """
        network = self.needs("match", "match")
        if self.calibration is None:
            self._say_once(
                "calibration",
                "match: this model was not calibrated; its probabilities are the raw output of the "
                "match head",
            )
        logits, failed = self._match_logits(
            network, "match", videos, texts, pairs, batch_size, progress, truncate, on_error
        )
        probability = self.probability(logits)
        return (probability, failed) if on_error == "skip" else probability

    def caption(
        self,
        videos: Sequence[Video | Clip],
        *,
        beam: int = 5,
        max_pieces: int = 30,
        batch_size: int = 16,
        progress: bool = False,
        on_error: OnError = "raise",
    ) -> Any:
        """Return a caption of each video: the best of `beam` beams, greedy with `beam=1`.

        A caption has at most `max_pieces` pieces, and never more than the model's text length.

        >>> (caption,) = model.caption([clip])
        >>> len(caption.split()) > 3
        True
        """
        network = self.needs("caption", "caption")
        for name, value in (("beam", beam), ("max_pieces", max_pieces)):
            if not isinstance(value, int) or value < 1:
                raise InputError(
                    f"caption: {name} is {value!r}; it must be an integer of 1 or more"
                )
        pieces = min(max_pieces, self.config.text_length - 2)
        failed: list[Failure] = []
        out: list[str] = []
        for _, features in self._features(
            network, "caption", videos, batch_size, progress, on_error, failed
        ):
            tokens = batching.in_batches(
                lambda x: programs.caption_tokens(network, x, beams=beam, max_pieces=pieces),
                batch_size,
                features,
            )
            out += [self.tokenizer.decode(row).strip() for row in tokens]
        return (out, failed) if on_error == "skip" else out

    def answer(
        self,
        videos: Sequence[Video | Clip],
        questions: Sequence[str],
        *,
        top: int = 1,
        batch_size: int = 16,
        progress: bool = False,
        truncate: bool | None = None,
        on_error: OnError = "raise",
    ) -> Any:
        """Return the `top` likeliest answers to one question for each video, best first.

        >>> (answers,) = model.answer([clip], ["how many triangles are there"], top=3)
        >>> [type(a.text).__name__ for a in answers], answers[0].probability > 0.2
        (['str', 'str', 'str'], True)
        """
        network = self.needs("answer", "answer")
        if not isinstance(top, int) or top < 1:
            raise InputError(f"answer: top is {top!r}; it must be an integer of 1 or more")
        videos = _listed(videos, "answer", "videos")
        tokens = self.tokens(questions, "answer", truncate, what="question")
        if len(videos) != len(tokens):
            raise InputError(
                f"answer: {len(videos)} videos and {len(tokens)} questions; give one question for "
                "each video"
            )
        failed: list[Failure] = []
        out: list[list[Answer]] = []
        for which, features in self._features(
            network, "answer", videos, batch_size, progress, on_error, failed
        ):
            logits = batching.in_batches(
                lambda x, t: programs.answer_logits(network, x, programs.text_features(network, t)),
                batch_size,
                features,
                tokens[which],
            )
            out += [self._best_answers(row, top) for row in logits]
        return (out, failed) if on_error == "skip" else out

    def choose(
        self, video: Video | Clip, candidates: Sequence[str], *, truncate: bool | None = None
    ) -> Choice:
        """Return the candidate text that fits a video best, by the match head.

        >>> choice = model.choose(clip, ["the star rises", "the ball shrinks"])
        >>> choice.index in (0, 1), choice.probabilities.shape
        (True, (2,))
        """
        network = self.needs("match", "choose")
        logits, _ = self._match_logits(
            network, "choose", [video], candidates, False, 1, False, truncate, "raise"
        )
        margin = np.asarray(logits[0, :, 1] - logits[0, :, 0], np.float64) / self._temperature
        weights = np.exp(margin - margin.max())
        return Choice(int(margin.argmax()), (weights / weights.sum()).astype(np.float32))

    def explain(self, video: Video | Clip, text: str) -> "Explanation":
        """Return which trajectories and actions the model matches to which words of a text.

        >>> why = model.explain(clip, "a triangle moves")
        >>> why.trajectories[0].boxes.shape, why.trajectories[0].word in (None, "triangle")
        ((8, 4), True)
        >>> why.draw("why.png")
        """
        from stoa_jax.inference.explain import explain

        return explain(self, video, text)

    # Keeping and sharing

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the model to a new directory that `stoa_jax.load` opens to the same numbers.

        >>> model.save("copy")
        >>> stoa_jax.load("copy").fingerprint == model.fingerprint
        True
        """
        from stoa_jax.inference.saving import save

        save(self, Path(directory))

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Upload the model to the Hugging Face Hub as `name`, and return the address.

        >>> model.push_to_hub("you/name", private=True)

        `options` are those of `huggingface_hub.ModelHubMixin.push_to_hub`: private, token, branch.
        """
        from stoa_jax.inference.hub import push

        return push(self, name, **options)

    # Internals

    def needs(self, head: str, call: str) -> "Stoa":
        """Return the network, or raise MissingHead if it lacks what a call needs."""
        network = self.whole
        if head in self.has and network is not None:
            return network
        where = self.source or self.kind
        if head == "answer" and network is not None and self.config.num_answers:
            raise MissingHead(
                f"{call}: {where} has an answer head but no list of answers; put answers.json, a "
                "JSON list in the order of the classes, beside the weights"
            )
        raise MissingHead(f"{call}: {where} has no {_HEADS[head]}; {_TRAIN[head]}")

    def note_missing_detections(self, call: str, clips: Sequence[Prepared]) -> None:
        """Warn once if clips without detections meet a model that was trained with objects."""
        if self.config.objects and not all(clip.detected for clip in clips):
            self._say_once(
                "detections",
                f"{call}: videos without detections: the model was trained with objects and now "
                "sees padding instead; pass stoa_jax.Clip(video, detections=...)",
            )

    def _say_once(self, key: str, message: str) -> None:
        with self._lock:
            if key in self._said:
                return
            self._said.add(key)
        warnings.warn(message, stacklevel=3)

    def tokens(
        self, texts: Sequence[str], call: str, truncate: bool | None, what: str = "text"
    ) -> np.ndarray:
        """Return ids int32 [n, L] of checked texts."""
        truncate = self.truncate if truncate is None else truncate
        rows = [
            self._encoded(text, f"{call}: {what} {i}", truncate)
            for i, text in enumerate(_listed(texts, call, f"{what}s"))
        ]
        return np.stack(rows)

    def _encoded(self, text: str, where: str, truncate: bool) -> np.ndarray:
        if not isinstance(text, str):
            raise InputError(f"{where} is a {type(text).__name__}, not a str")
        pieces = self.tokenizer.pieces(text)
        count, room = sum(len(piece.ids) for piece in pieces), self.config.text_length - 2
        if not count:
            raise InputError(f"{where} is {text!r}, which has no words")
        if count > room and not truncate:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise InputError(
                f"{where} has {count} pieces and the model reads {room} ({shown!r}); shorten it, "
                "or pass truncate=True (--truncate) to cut it"
            )
        return self.tokenizer.pack(pieces, self.config.text_length)

    def _frame_vectors(
        self, clips: Sequence[np.ndarray], batch_size: int
    ) -> Callable[[], np.ndarray]:
        """Start the video tower on a batch; calling the result waits for the vectors [b, d]."""
        b, lengths = len(clips), [len(clip) for clip in clips]
        if self.config.joint_blocks:
            tokens = batching.run_padded(self._encode_frames, np.stack(clips))
            return lambda: _mean_vectors(np.asarray(tokens, np.float32)[:b])
        # Frames do not attend to each other, so clips of any length share a batch.
        flat = np.concatenate(clips)[:, None]
        count, unit = len(flat), self.frames
        if count < unit:
            rows = min(unit, batching.power_of_two(count))
        else:
            rows = unit * batching.power_of_two(-(-count // unit))
        tokens = self._encode_frames(batching.padded(flat, rows))

        def wait() -> np.ndarray:
            frames = np.asarray(tokens, np.float32)[:count, 0]
            parts = np.split(frames, np.cumsum(lengths)[:-1])
            return np.concatenate([_mean_vectors(part[None]) for part in parts])

        return wait

    def _network_frames(self, pixels: np.ndarray) -> jax.Array:
        return programs.run_frame_tokens(self.network, pixels)

    def _network_tokens(self, tokens: np.ndarray) -> jax.Array:
        return programs.run_text_embedding(self.network, tokens)

    def _features(
        self,
        network: "Stoa",
        call: str,
        videos: Sequence[Video | Clip],
        batch_size: int,
        progress: bool,
        on_error: str,
        failed: list[Failure],
    ):
        """Yield (indices, features) of batches of videos, on the host, in order."""
        videos = _listed(videos, call, "videos")
        how = self.preprocessing(fused=True)

        def ready(i: int, video: Video | Clip) -> tuple[int, Prepared]:
            return i, prepare(video, how)

        waiting = None
        for batch in batching.prepared(
            videos,
            ready,
            batch_size=batch_size,
            call=call,
            on_error=on_error,
            failed=failed,
            progress=progress,
        ):
            which = np.array([i for i, _ in batch])
            clips = [clip for _, clip in batch]
            self.note_missing_detections(call, clips)
            started = batching.run_padded(
                lambda *x: programs.video_features(network, *x), *features_input(clips)
            )
            if waiting is not None:
                yield waiting[0], batching.on_host(waiting[1], len(waiting[0]))
            waiting = which, started
        if waiting is not None:
            yield waiting[0], batching.on_host(waiting[1], len(waiting[0]))

    def _match_logits(
        self,
        network: "Stoa",
        call: str,
        videos: Sequence[Video | Clip],
        texts: Sequence[str],
        pairs: bool,
        batch_size: int,
        progress: bool,
        truncate: bool | None,
        on_error: str,
    ) -> tuple[np.ndarray, list[Failure]]:
        """Return logits [n, m, 2], or [n, 2] of pairs, and the videos that failed."""
        videos = _listed(videos, call, "videos")
        tokens = self.tokens(
            texts, call, truncate, what="candidate" if call == "choose" else "text"
        )
        if pairs and len(videos) != len(tokens):
            raise InputError(
                f"{call}: pairs=True with {len(videos)} videos and {len(tokens)} texts; give one "
                "text for each video"
            )
        batching.check_batch_size(batch_size, call)
        size = batch_size * PAIRS_PER_VIDEO
        text = batching.in_batches(
            lambda x: programs.text_features(network, x), TEXTS_AT_ONCE, tokens
        )
        failed: list[Failure] = []
        # The head of `released` normalises over all pairs of the call, so it runs last.
        apart = self.config.match_head != "bilinear"
        found, fused = [], []
        for which, features in self._features(
            network, call, videos, batch_size, progress, on_error, failed
        ):
            if pairs:
                rows, columns = np.arange(len(which)), which
            else:
                rows = np.repeat(np.arange(len(which)), len(tokens))
                columns = np.tile(np.arange(len(tokens)), len(which))
            for start in range(0, len(rows), size):
                row, column = rows[start : start + size], columns[start : start + size]
                pair = jax.tree.map(lambda x, at=row: x[at], features)
                words = jax.tree.map(lambda x, at=column: x[at], text)
                out = batching.run_padded(lambda *x: programs.fuse_pairs(network, *x), pair, words)
                if apart:
                    found.append(np.asarray(programs.match_logits(network, *out))[: len(row)])
                else:
                    fused.append(batching.on_host(out, len(row)))
        if fused:
            cls, sep = (np.concatenate(x) for x in zip(*fused, strict=True))
            rows = batching.power_of_two(len(cls))
            # The norms over all rows must not change, so the padding is zero.
            cls, sep = (np.pad(x, ((0, rows - len(x)), (0, 0))) for x in (cls, sep))
            count = sum(len(x[0]) for x in fused)
            found = [np.asarray(programs.match_logits(network, cls, sep))[:count]]
        logits = np.concatenate([np.zeros((0, 2), np.float32), *found])
        return (logits if pairs else logits.reshape(-1, len(tokens), 2)), failed

    @property
    def _temperature(self) -> float:
        return 1.0 if self.calibration is None else self.calibration.temperature

    def probability(self, logits: np.ndarray) -> np.ndarray:
        """Return calibrated match probabilities [...] of logits [..., 2]."""
        margin = (logits[..., 1] - logits[..., 0]).astype(np.float64) / self._temperature
        return (0.5 * (1 + np.tanh(margin / 2))).astype(np.float32)

    def _best_answers(self, logits: np.ndarray, top: int) -> list[Answer]:
        if self.config.answer_head == "first_piece":
            names: Callable[[int], str] = lambda i: self.tokenizer.decode([i]).strip()  # noqa: E731
        else:
            names = self.answers.__getitem__
        x = logits.astype(np.float64)
        p = np.exp(x - x.max())
        p /= p.sum()
        if self.config.answer_head == "classifier":
            p = p[: len(self.answers)]  # the head may have more classes than there are answers
        order = np.argsort(-p, kind="stable")[:top]
        return [Answer(names(int(i)), float(p[i])) for i in order]


def features_input(clips: Sequence[Prepared]) -> tuple[np.ndarray, ...]:
    """Return pixels, boxes, classes and scores of clips as one batch."""
    return tuple(np.stack([getattr(clip, name) for clip in clips]) for name in Prepared._fields[:4])


def _listed(items: Any, call: str, what: str) -> Sequence[Any]:
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


def _mean_vectors(frames: np.ndarray) -> np.ndarray:
    """Average unit frame vectors [b, T, d] to unit vectors [b, d]."""
    return _unit(_unit(frames).mean(1))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


__all__ = ["Answer", "Choice", "Model", "UserError"]
