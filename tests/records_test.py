import subprocess
import sys

import cv2
import numpy as np
import pytest

from stoa_jax.data import records

WORDS = np.array([[records.START, 320, records.END] + [0] * 74], np.int32)


def parse(texts):
    """Tokenize by one token per word."""
    rows = []
    for text in texts:
        row = np.zeros(77, np.int32)
        ids = [records.START, *(1000 + len(w) for w in text.split()), records.END][:77]
        row[: len(ids)] = ids
        rows.append((row, (np.arange(77) == 1).astype(np.uint8)))
    return rows


def clip(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "video_id": "a",
        "frames": [rng.integers(0, 255, (9, 12, 3), np.uint8) for _ in range(2)],
        "boxes": np.tile(np.array([0.1, 0.2, 0.5, 0.6], np.float32), (2, 3, 1)),
        "classes": np.zeros((2, 3), np.int32),
        "scores": np.array([[0.1, 0.9, 0.5]] * 2, np.float32),
        "texts": ["a cat runs"],
    }
    return records.Clip(**{**fields, **changes})


def test_record_is_read_as_it_was_written():
    spec = records.features(2, 3)
    example = records.encode(clip(texts=["ein Hund läuft 🐕", "two"]), parse, 2, 3).example
    data = records.serialize(spec, example)
    back = spec.deserialize_example_np(data)
    assert back["video_id"] == b"a"
    assert [t.decode() for t in back["texts"]] == ["ein Hund läuft 🐕", "two"]
    assert list(back["answers"]) == []
    for name in ("boxes", "classes", "scores", "tokens", "tags"):
        np.testing.assert_array_equal(back[name], example[name])
        assert back[name].dtype == example[name].dtype
    assert [bytes(f) for f in back["frames"]] == example["frames"]
    assert records.decode_jpeg(back["frames"][0]).shape == (9, 12, 3)
    assert data == records.serialize(spec, dict(reversed(example.items())))


def test_jpeg_keeps_colours_in_their_places():
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 200
    back = records.decode_jpeg(records.encode_jpeg(image))
    np.testing.assert_allclose(back, image, atol=6)


def test_gray_pictures_are_rgb_and_others_are_named():
    gray = cv2.imencode(".jpg", np.full((5, 7), 90, np.uint8))[1].tobytes()
    assert (records.decode_jpeg(gray) == np.full((5, 7, 3), 90)).all()
    with pytest.raises(ValueError, match="9 bytes are not a JPEG image"):
        records.decode_jpeg(b"no JPEG  ")


def test_best_objects_first_and_padding_last():
    example = records.encode(clip(), parse, 2, 5).example
    np.testing.assert_allclose(example["scores"][0], [0.9, 0.5, 0.1, 0, 0], rtol=1e-6)
    assert example["classes"][0].tolist() == [0, 0, 0, -1, -1]
    assert example["boxes"].shape == (2, 5, 4) and not example["boxes"][:, 3:].any()
    fewer = records.encode(clip(), parse, 2, 1).example
    np.testing.assert_allclose(fewer["scores"], [[0.9]] * 2)


@pytest.mark.parametrize(
    "box",
    [
        [np.nan, 0, 1, 1],
        [0.5, 0.2, 0.1, 0.6],
        [0.1, 0.6, 0.5, 0.2],
        [2, 2, 3, 3],
        [0, 0, np.inf, 1],
    ],
)
def test_a_box_that_is_none_becomes_padding(box):
    boxes = clip().boxes
    boxes[1, 1] = box
    example = records.encode(clip(boxes=boxes), parse, 2, 3).example
    assert example["classes"].tolist() == [[0, 0, 0], [0, 0, -1]]
    assert np.isfinite(example["boxes"]).all() and not example["boxes"][1, 2].any()


def test_items_without_words_are_left_out_and_named():
    encoded = records.encode(clip(texts=["", "a dog", " \t"]), parse, 2, 3)
    assert encoded.example["texts"] == [b"a dog"]
    assert encoded.example["tokens"].shape == (1, 77)
    assert encoded.dropped == [f"caption {i} has no words; left out" for i in (1, 3)]
    encoded = records.encode(clip(texts=["who?", "what?"], answers=["", "cat"]), parse, 2, 3)
    assert encoded.example["answers"] == [b"cat"]
    assert encoded.dropped == ["question 1 has no answer; left out"]
    options = [*"abcde", "f", "", *"hij"]
    encoded = records.encode(clip(texts=options, answers=["0", "1"]), parse, 2, 3)
    assert encoded.example["texts"] == [b"a", b"b", b"c", b"d", b"e"]
    assert encoded.dropped == ["multiple choice 2 has no words; left out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": []}, "no caption"),
        ({"texts": [" "]}, "no caption with words"),
        ({"texts": ["a", "b"], "answers": ["c"]}, "neither QA nor a choice"),
        ({"frames": []}, "0 frames instead of 2"),
        ({"frames": [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)]}, "sizes"),
        ({"frames": [np.zeros((2, 2), np.uint8)] * 2}, "uint8"),
        ({"boxes": np.zeros((3, 3, 4)), "classes": np.zeros((3, 3)), "scores": np.zeros((3, 3))},
         "boxes for 3 frames"),
        ({"scores": np.zeros((2, 2))}, "disagree"),
    ],
)  # fmt: skip
def test_a_clip_that_is_none_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        records.encode(clip(**changes), parse, 2, 3)


def test_lone_surrogates_and_control_characters_can_be_written():
    encoded = records.encode(
        clip(video_id="v\ud800", texts=["a \udfff b", "x \x00 y"]), parse, 2, 3
    )
    assert encoded.example["texts"] == [b"a ? b", b"x \x00 y"]


def test_importing_needs_no_tensorflow():
    code = "import sys; from stoa_jax.data import records, pipeline, builders, build;"
    code += "records.features(2, 3); assert 'tensorflow' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
