"""Clips and texts to vectors, whatever weights `stoa_jax.load` opened."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from stoa_jax.errors import UserError
from stoa_jax.models.clip import TextTower, VisionTower, text_ends
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import unit
from stoa_jax.models.stoa import Stoa, at_position
from stoa_jax.weights import Report

CHUNK = 16  # frames, or texts, that run at once; a last chunk is padded to a power of two


class Towers(nnx.Module):
    """The two towers alone: all that retrieval by cosine needs."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.visual = VisionTower(c, rngs=rngs)
        self.text = TextTower(c, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(()))


def frame_tokens(model: Towers | Stoa, pixels: Array) -> Array:
    """uint8 [B, T, S, S, 3] -> frame tokens [B, T, d]."""
    b, t = pixels.shape[:2]
    frames, _ = model.visual(pixels.reshape(b * t, *pixels.shape[2:]), frames=t)
    return frames.reshape(b, t, -1)


def video_embedding(model: Towers | Stoa, pixels: Array) -> Array:
    """uint8 [B, T, S, S, 3] -> float32 [B, d] of unit length: the mean of the unit frame tokens."""
    return unit(unit(frame_tokens(model, pixels)).mean(1))


def text_embedding(model: Towers | Stoa, tokens: Array) -> Array:
    """Ids [B, L] -> float32 [B, d] of unit length, at the end token."""
    end, _ = text_ends(tokens, model.text.config.vocab_size)
    return unit(at_position(model.text(tokens), end))


class Model:
    """What `load` returns. `config` has the sizes, `kind` says what was opened."""

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        tokenizer,
        *,
        frames: int,
        encode_frames: Callable[[np.ndarray], np.ndarray],
        encode_tokens: Callable[[np.ndarray], np.ndarray],
        network: Stoa | None = None,
        report: Report | None = None,
    ):
        self.config, self.kind, self.tokenizer, self.frames = config, kind, tokenizer, frames
        self.network, self.report = network, report
        self._encode_frames, self._encode_tokens = encode_frames, encode_tokens

    def encode_video(self, clips: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Clips, each uint8 [T, H, W, 3] with any T, H and W -> float32 [n, d] of unit length.

        A clip of more than `frames` frames is sampled evenly. A shorter one is taken as it is,
        or, where the frames of a clip attend to each other, brought to `frames` by repetition.
        Frames are resized and cropped to the middle as CLIP does.
        """
        ready = [self._prepare(i, clip) for i, clip in enumerate(clips)]
        if not ready:
            return np.zeros((0, self.config.text_width), np.float32)
        if self.config.joint_blocks:
            per = max(1, CHUNK // self.frames)
            tokens = _in_chunks(self._encode_frames, np.stack(ready), per)  # [n, T, d]
        else:
            # One frame is as good as another here, so clips of any length share a chunk.
            tokens = _in_chunks(self._encode_frames, np.concatenate(ready)[:, None], CHUNK)[:, 0]
            ends = np.cumsum([len(frames) for frames in ready])[:-1]
            tokens = np.split(tokens, ends)
        return np.stack([_unit(_unit(frames).mean(0)) for frames in tokens])

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> float32 [n, d] of unit length; what does not fit `text_length` is cut."""
        if isinstance(texts, str):
            raise UserError("encode_text takes a list of texts; put the one text in a list")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"encode_text: text {i} is a {type(text).__name__}, not a str")
        if not len(texts):
            return np.zeros((0, self.config.text_width), np.float32)
        length = self.config.text_length
        tokens = np.stack([self.tokenizer.encode(text, length) for text in texts])
        return _in_chunks(self._encode_tokens, tokens.astype(np.int32), CHUNK)

    def _prepare(self, i: int, clip: np.ndarray) -> np.ndarray:
        clip = np.asarray(clip)
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
            raise UserError(
                f"encode_video: clip {i} is {clip.dtype} {list(clip.shape)}; a clip is uint8 "
                "[T, H, W, 3] with at least one frame, RGB from 0 to 255"
            )
        if len(clip) > self.frames or (self.config.joint_blocks and len(clip) != self.frames):
            # The middle of each of `frames` equal parts.
            at = (np.arange(self.frames) + 0.5) * len(clip) / self.frames
            clip = clip[at.astype(int)]
        return np.stack([resize_and_crop(frame, self.config.image_size) for frame in clip])


def tokenizer_for(path: Path, c: ModelConfig):
    """The directory's own tokenizer, or CLIP's cut to the model's vocabulary."""
    from stoa_jax.text import Tokenizer

    if path.is_dir() and any(
        (path / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")
    ):
        return Tokenizer.from_directory(path, c.vocab_size)
    return Tokenizer(c.vocab_size)


def resize_and_crop(frame: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [S, S, 3]: the short side to S, bicubic, then the middle, as CLIP does."""
    from PIL import Image

    height, width = frame.shape[:2]
    if (height, width) == (size, size):
        return frame
    short, long = sorted((height, width))
    to = size, int(size * long / short)
    width, height = to if width <= height else to[::-1]
    frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return frame[top : top + size, left : left + size]


def _in_chunks(run: Callable, x: np.ndarray, size: int) -> np.ndarray:
    out = []
    for start in range(0, len(x), size):
        part = x[start : start + size]
        rows = min(size, 1 << (len(part) - 1).bit_length())  # few shapes, so few compilations
        pad = np.zeros((rows - len(part), *x.shape[1:]), x.dtype)
        out.append(np.asarray(run(np.concatenate([part, pad])), np.float32)[: len(part)])
    return np.concatenate(out)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
