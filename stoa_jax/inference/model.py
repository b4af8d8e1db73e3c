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

from stoa_jax.errors import MissingHead, NotCalibrated, UserError
from stoa_jax.inference import batching, checks, embedding, fingerprints, fusing, programs
from stoa_jax.inference.fusing import Request
from stoa_jax.inference.sidecars import Calibration
from stoa_jax.inference.videos import Clip, Failure, Prepared, Preprocessing, Video, prepare
from stoa_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from stoa_jax.inference.explain import Explanation
    from stoa_jax.models.stoa import Stoa
    from stoa_jax.text import Tokenizer
    from stoa_jax.weights import Report

OnError = Literal["raise", "skip"]


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
        encode_frames: "Callable[[np.ndarray], jax.Array] | None" = None,
        encode_tokens: "Callable[[np.ndarray], jax.Array] | None" = None,
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
            assert self.network is not None  # an export brings its hash
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
        videos = checks.listed(videos, call, "videos")
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
            start = embedding.start_clip_vectors
            joint = bool(self.config.joint_blocks)
            out.append(start(self._encode_frames, batch, unit=self.frames, joint=joint))
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
        batch_size: int = fusing.TEXTS_AT_ONCE,
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
        request = Request("match", batch_size, progress, on_error)
        tokens = self.tokens(texts, "match", truncate)
        logits = fusing.match_logits(self, network, videos, tokens, request, pairs=pairs)
        return request.result(self.probability(logits))

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
        checks.positive("caption", beam=beam, max_pieces=max_pieces)
        pieces = min(max_pieces, self.config.text_length - 2)
        request = Request("caption", batch_size, progress, on_error)
        out: list[str] = []
        for _, features in fusing.video_features(self, network, videos, request):
            tokens = batching.in_batches(
                lambda x: programs.caption_tokens(network, x, beams=beam, max_pieces=pieces),
                batch_size,
                features,
            )
            out += [self.tokenizer.decode(row).strip() for row in tokens]
        return request.result(out)

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
        checks.positive("answer", top=top)
        videos = checks.listed(videos, "answer", "videos")
        tokens = self.tokens(questions, "answer", truncate, what="question")
        checks.one_for_each("answer", videos, tokens, "question")
        request = Request("answer", batch_size, progress, on_error)
        out: list[list[Answer]] = []
        for which, features in fusing.video_features(self, network, videos, request):
            logits = batching.in_batches(
                lambda x, t: programs.answer_logits(network, x, programs.text_features(network, t)),
                batch_size,
                features,
                tokens[which],
            )
            out += [self._best_answers(row, top) for row in logits]
        return request.result(out)

    def choose(
        self, video: Video | Clip, candidates: Sequence[str], *, truncate: bool | None = None
    ) -> Choice:
        """Return the candidate text that fits a video best, by the match head.

        >>> choice = model.choose(clip, ["the star rises", "the ball shrinks"])
        >>> choice.index in (0, 1), choice.probabilities.shape
        (True, (2,))
        """
        network = self.needs("match", "choose")
        tokens = self.tokens(candidates, "choose", truncate, what="candidate")
        logits = fusing.match_logits(
            self, network, [video], tokens, Request("choose", batch_size=1)
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
        unlisted = head == "answer" and network is not None and self.config.num_answers > 0
        raise MissingHead(checks.missing_head(call, self.source or self.kind, head, unlisted))

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
        length = self.config.text_length
        return np.stack(
            [
                checks.token_row(self.tokenizer, text, length, f"{call}: {what} {i}", truncate)
                for i, text in enumerate(checks.listed(texts, call, f"{what}s"))
            ]
        )

    def _network_frames(self, pixels: np.ndarray) -> jax.Array:
        return programs.run_frame_tokens(self.network, pixels)

    def _network_tokens(self, tokens: np.ndarray) -> jax.Array:
        return programs.run_text_embedding(self.network, tokens)

    @property
    def _temperature(self) -> float:
        return 1.0 if self.calibration is None else self.calibration.temperature

    def probability(self, logits: np.ndarray) -> np.ndarray:
        """Return calibrated match probabilities [...] of logits [..., 2]."""
        margin = (logits[..., 1] - logits[..., 0]).astype(np.float64) / self._temperature
        return (0.5 * (1 + np.tanh(margin / 2))).astype(np.float32)

    def _best_answers(self, logits: np.ndarray, top: int) -> list[Answer]:
        x = logits.astype(np.float64)
        p = np.exp(x - x.max())
        p /= p.sum()
        if self.config.answer_head == "classifier":
            p = p[: len(self.answers)]  # the head may have more classes than there are answers
        order = np.argsort(-p, kind="stable")[:top]
        return [Answer(self._answer_name(int(i)), float(p[i])) for i in order]

    def _answer_name(self, i: int) -> str:
        if self.config.answer_head == "first_piece":
            return self.tokenizer.decode([i]).strip()
        return self.answers[i]


__all__ = ["Answer", "Choice", "Model", "UserError"]
