"""One clip as sources yield it, and as an ArrayRecord file stores it.

Features are Text and Tensor only, which TFDS reads without TensorFlow; this module never imports
it. Frames are JPEG bytes, so that training decodes images and not video.

T frames, K objects per frame, n texts.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from stoa_jax.errors import UserError

if TYPE_CHECKING:  # TFDS is imported only where records are read or written
    import tensorflow_datasets as tfds

JPEG_QUALITY = 95
TEXT_LENGTH = 77  # of CLIP; the pipeline truncates it to the model's text length
START, END = 49406, 49407
OPTIONS = 5  # of a multiple-choice question

Kind = Literal["caption", "qa", "multiple_choice"]


@dataclasses.dataclass
class Clip:
    """A clip before encoding, as every source yields it."""

    video_id: str
    frames: Sequence[np.ndarray | bytes]  # T of uint8 [H, W, 3] (RGB) or JPEG bytes
    boxes: np.ndarray  # [T, K, 4] float32, xyxy in [0, 1] of the frame
    classes: np.ndarray  # [T, K] int32, -1 is padding
    scores: np.ndarray  # [T, K] float32
    texts: list[str]
    answers: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)  # what the source left out


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A clip as the dictionary that TFDS writes, and descriptions of what was left out."""

    example: dict[str, Any]
    dropped: list[str]


# texts -> (tokens [77] int32, tags [77] uint8) for each; `text.parse_many` bound to a tagger.
Parse = Callable[[list[str]], Sequence[tuple[np.ndarray, np.ndarray]]]


def features(frames: int, objects: int) -> "tfds.features.FeaturesDict":
    """Return the TFDS features of a record with `frames` frames of `objects` boxes each."""
    import tensorflow_datasets as tfds

    text, tensor = tfds.features.Text, tfds.features.Tensor
    return tfds.features.FeaturesDict(
        {
            "video_id": text(),
            "frames": tfds.features.Sequence(text(), length=frames),
            "boxes": tensor(shape=(frames, objects, 4), dtype=np.float32),
            "classes": tensor(shape=(frames, objects), dtype=np.int32),
            "scores": tensor(shape=(frames, objects), dtype=np.float32),
            "texts": tfds.features.Sequence(text()),
            "tokens": tensor(shape=(None, TEXT_LENGTH), dtype=np.int32),
            "tags": tensor(shape=(None, TEXT_LENGTH), dtype=np.uint8),
            "answers": tfds.features.Sequence(text()),
        }
    )


def kind_of(texts: Sequence[str], answers: Sequence[str]) -> Kind:
    """Return the kind of a clip's texts: captions, questions, or groups of five options."""
    if not answers:
        return "caption"
    if len(texts) == len(answers):
        return "qa"
    if len(texts) == OPTIONS * len(answers):
        return "multiple_choice"
    raise ValueError(f"{len(texts)} texts and {len(answers)} answers are neither QA nor a choice")


def encode(clip: Clip, parse: Parse, frames: int, objects: int) -> Encoded:
    """Check and encode a clip; raise ValueError with a one-line reason if nothing is left of it."""
    if len(clip.frames) != frames:
        raise ValueError(f"{len(clip.frames)} frames instead of {frames}")
    sizes = {f.shape for f in clip.frames if not isinstance(f, bytes)}
    if len(sizes) > 1:
        raise ValueError(f"frames of several sizes: {', '.join(map(str, sorted(sizes)))}")
    texts, answers, tokens, tags, dropped = _texts(clip, parse)
    boxes, classes, scores = _objects(clip, objects)
    example = {
        "video_id": _utf8(clip.video_id),
        "frames": [f if isinstance(f, bytes) else encode_jpeg(f) for f in clip.frames],
        "boxes": boxes,
        "classes": classes,
        "scores": scores,
        "texts": texts,
        "tokens": tokens,
        "tags": tags,
        "answers": answers,
    }
    return Encoded(example, [*clip.notes, *dropped])


def _texts(clip: Clip, parse: Parse):
    """Return the texts with their tokens and tags; leave out and report items without a word."""
    kind = kind_of(clip.texts, clip.answers)
    texts = [_utf8(text) for text in clip.texts]
    answers = [_utf8(answer).strip() for answer in clip.answers]
    parsed = parse([text.decode() for text in texts])
    tokens = np.asarray([p[0] for p in parsed], np.int32).reshape(-1, TEXT_LENGTH)
    tags = np.asarray([p[1] for p in parsed], np.uint8).reshape(-1, TEXT_LENGTH)
    wordless = tokens[:, 1] == END  # no token between start and end
    width = OPTIONS if kind == "multiple_choice" else 1
    name = {"caption": "caption", "qa": "question", "multiple_choice": "multiple choice"}[kind]
    keep, dropped = [], []
    for item in range(len(texts) // width):
        if wordless[item * width : (item + 1) * width].any():
            dropped.append(f"{name} {item + 1} has no words; left out")
        elif answers and not answers[item]:
            dropped.append(f"{name} {item + 1} has no answer; left out")
        else:
            keep.append(item)
    if not keep:
        raise ValueError(f"no {name} with words" if texts else f"no {name}")
    rows = [item * width + j for item in keep for j in range(width)]
    answers = [answers[item] for item in keep] if answers else []
    return [texts[r] for r in rows], answers, tokens[rows], tags[rows], dropped


def _objects(clip: Clip, objects: int):
    """Return the `objects` most confident boxes of each frame, best first, then padding."""
    boxes = np.asarray(clip.boxes, np.float32)
    classes, scores = np.asarray(clip.classes, np.int32), np.asarray(clip.scores, np.float32)
    count = len(clip.frames)
    if boxes.shape != (*classes.shape, 4) or scores.shape != classes.shape:
        raise ValueError(f"boxes {boxes.shape}, classes {classes.shape} and scores disagree")
    if len(boxes) != count:
        raise ValueError(f"boxes for {len(boxes)} frames, but the clip has {count}")
    finite = np.isfinite(boxes).all(-1) & np.isfinite(scores)
    boxes = np.clip(np.where(finite[..., None], boxes, 0), 0, 1)
    real = finite & (classes >= 0) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
    order = np.argsort(np.where(real, -scores, np.inf), axis=1, kind="stable")[:, :objects]
    missing = objects - order.shape[1]
    take = functools.partial(np.take_along_axis, axis=1)
    real = np.pad(take(real, order), ((0, 0), (0, missing)))
    boxes = np.pad(take(boxes, order[..., None]), ((0, 0), (0, missing), (0, 0)))
    classes = np.pad(take(classes, order), ((0, 0), (0, missing)))
    scores = np.pad(take(scores, order), ((0, 0), (0, missing)))
    return (
        np.where(real[..., None], boxes, np.float32(0)),
        np.where(real, classes, np.int32(-1)),
        np.where(real, scores, np.float32(0)),
    )


def _utf8(text: str) -> bytes:
    # JSON escapes can produce a lone surrogate, which UTF-8 cannot encode.
    return text.encode("utf-8", "replace")


def serialize(spec: "tfds.features.FeaturesDict", example: Mapping[str, Any]) -> bytes:
    """Serialize a record; equal examples give equal bytes."""
    # protobuf leaves the order of map entries open unless asked for a deterministic one
    message = _serializer(spec).get_tf_example(spec.encode_example(example))
    return message.SerializeToString(deterministic=True)


def _serializer(spec: "tfds.features.FeaturesDict"):
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    info: Any = spec.get_serialized_info()  # TFDS annotates a wider type
    return ExampleSerializer(info)


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encode an RGB image uint8 [H, W, 3] as JPEG bytes."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"a frame is {image.dtype} {image.shape}, not uint8 [H, W, 3]")
    ok, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not ok:
        raise ValueError(f"a frame of {image.shape} could not be written as JPEG")
    return data.tobytes()


def decode_jpeg(data: bytes) -> np.ndarray:
    """Decode JPEG bytes to an RGB image uint8 [H, W, 3]."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise ValueError(f"{len(data)} bytes are not a JPEG image")
    return image


def write_class_names(directory: Path, names: Sequence[str]) -> None:
    """Write the class names, in order of their ids, beside the data set."""
    (directory / "classes.json").write_text(json.dumps(list(names), ensure_ascii=False) + "\n")


def read_class_names(directory: Path) -> tuple[str, ...]:
    """Read the names that `write_class_names` wrote; return () if there are none."""
    path = directory / "classes.json"
    if not path.exists():
        return ()
    try:
        return tuple(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON list of class names ({error}); build again") from None
