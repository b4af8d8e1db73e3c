import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_source

from stoa_jax.data import augment, builders, clips, pipeline, records, resize
from stoa_jax.data import split as splits
from stoa_jax.errors import UserError

SPEC = pipeline.BatchSpec(
    frames=3, image_size=16, objects=2, text_length=8, crop="random", vocab_size=49408
)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Build one small set of each kind."""
    directory = tmp_path_factory.mktemp("data")
    counts = {"train": 37, "test": 11}
    toy_source.build(directory, toy_source.Source(counts))
    toy_source.build(directory, toy_source.Source({"train": 20}), "webvid/captions")
    toy_source.build(directory, toy_source.Source({"train": 10, "test": 7}, "qa"), "msvd/qa")
    toy_source.build(
        directory, toy_source.Source({"test": 6}, "multiple_choice"), "msrvtt/multiple_choice"
    )
    return directory


def split(data, name="folder/captions", part="train"):
    return pipeline.open_split(data, name, part)


def take(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def joined(parts):
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def test_a_batch_holds_what_the_spec_asks(data):
    (batch,) = take(pipeline.Loader(split(data), SPEC, 4), 1)
    shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert shapes == {
        "pixels": ((4, 3, 16, 16, 3), np.uint8),
        "boxes": ((4, 3, 2, 4), np.float32),
        "classes": ((4, 3, 2), np.int32),
        "scores": ((4, 3, 2), np.float32),
        "tokens": ((4, 8), np.int32),
        "tags": ((4, 8), np.int8),
        "valid": ((4,), np.bool_),
        "index": ((4,), np.int32),
    }
    assert batch["valid"].all()
    assert (batch["tokens"][:, 0] == records.START).all()
    assert (batch["tokens"] == records.END).any(1).all()


def test_every_clip_once_an_epoch_in_an_order_of_the_seed(data):
    loader = pipeline.Loader(split(data), SPEC, 4)
    assert (loader.num_examples, loader.steps_per_epoch) == (37, 9)
    order = joined(take(loader, 37))["index"]
    for epoch in range(4):
        assert sorted(order[epoch * 37 : epoch * 37 + 37]) == list(range(37))
    assert list(order[:37]) != list(order[37:74])
    other = joined(take(pipeline.Loader(split(data), SPEC, 4, seed=1), 9))["index"]
    assert list(other) != list(order[:36])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_what_one_reads(data, hosts):
    whole = take(pipeline.Loader(split(data), SPEC, 8, seed=3), 6)
    parts = [
        take(pipeline.Loader(split(data), SPEC, 8, 3, process_index=p, process_count=hosts), 6)
        for p in range(hosts)
    ]
    for step in range(6):
        same(whole[step], joined([part[step] for part in parts]))


def test_a_run_resumes_exactly_on_another_number_of_hosts_and_threads(data):
    whole = take(pipeline.Loader(split(data), SPEC, 8, threads=1, cache="memory"), 12)
    parts = [
        take(
            pipeline.Loader(
                split(data),
                SPEC,
                8,
                process_index=p,
                process_count=2,
                start_step=7,
                threads=3,
                cache="off",
            ),
            5,
        )
        for p in range(2)
    ]
    for step in range(5):
        same(whole[7 + step], joined([part[step] for part in parts]))


def test_worker_processes_change_nothing(data):
    whole = take(pipeline.Loader(split(data), SPEC, 8), 5)
    for batch, other in zip(
        whole, take(pipeline.Loader(split(data), SPEC, 8, workers=2), 5), strict=True
    ):
        same(batch, other)


def test_evaluation_is_one_pass_with_the_last_batch_filled(data):
    for hosts in (1, 2):
        parts = [
            list(pipeline.Loader(split(data, part="test"), SPEC, 4, 0, False, p, hosts, workers=0))
            for p in range(hosts)
        ]
        batches = [joined(list(step)) for step in zip(*parts, strict=True)]
        assert len(batches) == 3
        index = joined(batches)["index"].tolist()
        assert index == [*range(11), -1]
        assert joined(batches)["valid"].tolist() == [True] * 11 + [False]
        assert all((b["tokens"] == records.END).any(1).all() for b in batches)
    limited = pipeline.Loader(split(data, part="test"), SPEC, 4, train=False, max_examples=5)
    assert [b["valid"].sum() for b in limited] == [4, 1]


def test_evaluation_reads_the_middle_and_the_first_caption(data):
    part = split(data, part="test")
    (batch,) = take(pipeline.Loader(part, SPEC, 2, train=False), 1)
    record = part.read(1)
    frames = [records.decode_jpeg(record["frames"][t]) for t in (0, 2, 3)]
    expected = np.stack([resize.resize_and_crop(frame, 16) for frame in frames])
    np.testing.assert_array_equal(batch["pixels"][1], expected)
    np.testing.assert_array_equal(batch["tokens"][1], part.tokens(1, 8)[0][0])


def test_training_crops_the_middle_with_the_faster_filter(data):
    part = split(data, part="test")
    spec = pipeline.BatchSpec(**{**vars(SPEC), "crop": "center"})
    (batch,) = take(pipeline.Loader(part, spec, len(part)), 1)
    for pixels, index in zip(batch["pixels"], batch["index"], strict=True):
        for t, stored in enumerate((0, 2, 3)):
            frame = records.decode_jpeg(part.read(index)["frames"][stored])
            left, top, width, height = resize.center_window(*frame.shape[:2], 16)
            window = frame[top : top + height, left : left + width]
            np.testing.assert_array_equal(pixels[t], resize.resample(window, 16, 16))


def test_training_takes_every_caption_in_turn(data):
    part = split(data)
    seen = {}
    for batch in take(pipeline.Loader(part, SPEC, 37), 24):
        for index, tokens in zip(batch["index"], batch["tokens"], strict=True):
            seen.setdefault(index, set()).add(tuple(tokens))
    for index, tokens in seen.items():
        assert tokens == {tuple(row) for row in part.tokens(index, 8)[0]}


@pytest.mark.parametrize("dataset", ["msvd/qa", "msrvtt/multiple_choice"])
def test_without_texts_every_clip_is_one_example(data, dataset):
    kind = dataset.partition("/")[2]
    part = split(data, dataset, "test")
    spec = pipeline.BatchSpec(**{**vars(SPEC), "kind": kind, "texts": False})
    loader = pipeline.Loader(part, spec, 4, train=False)
    assert loader.num_examples == len(part)
    batch = joined(list(loader))
    assert not {"tokens", "tags", "answer"} & batch.keys()
    valid = batch["valid"]
    assert batch["index"][valid].tolist() == list(range(len(part)))
    whole = dataclasses.replace(spec, texts=True)
    asked = joined(list(pipeline.Loader(part, whole, 4, train=False)))
    owners = np.repeat(range(len(part)), [len(part.metadata(i).answers) for i in range(len(part))])
    for key in ("pixels", "boxes", "classes", "scores"):
        np.testing.assert_array_equal(batch[key][valid][owners], asked[key][asked["valid"]])


def test_questions_are_examples_with_their_answers(data):
    part = split(data, "msvd/qa", "test")
    spec = pipeline.BatchSpec(**{**vars(SPEC), "kind": "qa", "answers": ("dog", "red")})
    batch = joined(list(pipeline.Loader(part, spec, 4, train=False)))
    valid = batch["valid"]
    answers = [a for i in range(len(part)) for a in part.metadata(i).answers]
    expected = [{"dog": 0, "red": 1}.get(a, -1) for a in answers]
    assert set(expected) == {-1, 0, 1}
    assert batch["answer"][valid].tolist() == expected
    tokens = np.concatenate([part.tokens(i, 8)[0] for i in range(len(part))])
    np.testing.assert_array_equal(batch["tokens"][valid], tokens)
    trained = joined(take(pipeline.Loader(split(data, "msvd/qa"), spec, 4), 5))
    total = sum(len(split(data, "msvd/qa").metadata(i).answers) for i in range(10))
    assert len(set(trained["index"].tolist())) == total == 19


def test_multiple_choice_has_five_texts(data):
    part = split(data, "msrvtt/multiple_choice", "test")
    spec = pipeline.BatchSpec(**{**vars(SPEC), "kind": "multiple_choice"})
    batch = joined(list(pipeline.Loader(part, spec, 6, train=False)))
    assert batch["tokens"].shape == (6, 5, 8) and batch["tags"].shape == (6, 5, 8)
    assert batch["answer"].tolist() == [i % 5 for i in range(6)]
    np.testing.assert_array_equal(batch["tokens"][2], part.tokens(2, 8)[0])


def test_a_mixture_keeps_its_weights_everywhere(data):
    pairs = [(split(data), 3.0), (split(data, "webvid/captions"), 1.0)]
    loader = pipeline.Loader(pairs, SPEC, 8)
    assert loader.num_examples == 57
    index = joined(take(loader, 40))["index"]
    second = index >= 37
    assert second.sum() == 80
    assert all(second[i : i + 16].sum() == 4 for i in range(0, 320, 16))
    firsts = index[~second]
    assert sorted(firsts[:37]) == list(range(37))
    with pytest.raises(UserError, match="weight of webvid/captions is 0"):
        pipeline.Loader([pairs[0], (pairs[1][0], 0.0)], SPEC, 8)


def test_long_texts_end_in_their_end_token():
    tokens = np.zeros((2, 77), np.int32)
    tokens[0, :4] = [records.START, 320, 0, records.END]  # "!" is token 0
    tokens[1, :12] = [records.START, *range(500, 510), records.END]
    tags = np.full((2, 77), 1, np.uint8)
    cut, cut_tags = splits.fit_tokens(tokens, tags, 6, 49408)
    assert cut.tolist() == [
        [records.START, 320, 0, records.END, 0, 0],
        [records.START, 500, 501, 502, 503, records.END],
    ]
    assert cut_tags[0].tolist() == [1] * 6 and cut_tags[1].tolist() == [1] * 5 + [0]


def rectangle(height, width, box, value=255):
    frame = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    frame[y1:y2, x1:x2] = value
    return frame


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [32, 75, 160])
def test_boxes_bound_the_pixels_after_crop_and_flip(flip, size):
    rng = np.random.default_rng(size)
    checked = 0
    for _ in range(60):
        height, width = rng.integers(40, 120, 2)
        x1, y1 = rng.integers(0, width - 16), rng.integers(0, height - 16)
        x2, y2 = rng.integers(x1 + 8, width + 1), rng.integers(y1 + 8, height + 1)
        frame = rectangle(height, width, (x1, y1, x2, y2))
        scale = np.array([width, height, width, height])
        boxes = (np.array([[[x1, y1, x2, y2]]]) / scale).astype(np.float32)
        crop = augment.random_crop(rng, height, width)
        out = np.empty((1, size, size, 3), np.uint8)
        augment.crop_frames([frame], crop, size, flip, out)
        seen, classes = augment.crop_boxes(
            boxes, np.zeros((1, 1), np.int32), height, width, crop, flip
        )
        left, top, crop_width, crop_height = crop
        inside = max(0, min(x2, left + crop_width) - max(x1, left)) * max(
            0, min(y2, top + crop_height) - max(y1, top)
        )
        share = inside / ((x2 - x1) * (y2 - y1))
        if share < 0.1:
            assert classes[0, 0] == -1 and not seen.any()
            continue
        assert classes[0, 0] == 0
        ys, xs = np.nonzero(out[0, ..., 0] >= 128)
        if not len(xs):
            continue  # thinner than a pixel of the crop
        drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        np.testing.assert_allclose(seen[0, 0] * size, drawn, atol=1.0)
        checked += 1
    assert checked > 30


def test_loader_moves_boxes_with_pixels(data):
    """The toy clips' only bright pixels are their boxes, also after a random crop and a flip."""
    spec = pipeline.BatchSpec(**{**vars(SPEC), "flip": True, "image_size": 48})
    checked = 0
    for batch in take(pipeline.Loader(split(data), spec, 8), 4):
        for frames, boxes, classes in zip(
            batch["pixels"], batch["boxes"], batch["classes"], strict=True
        ):
            for frame, box, cls in zip(frames, boxes[:, 0], classes[:, 0], strict=True):
                ys, xs = np.nonzero(frame.min(-1) >= 150)
                if cls < 0 or not len(xs):
                    continue
                drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                np.testing.assert_allclose(box * 48, drawn, atol=2.0)  # JPEG blurs an edge
                checked += 1
    assert checked > 60


def test_flips_happen_only_when_asked_and_where_no_side_is_named(data):
    (_, left, *_), _ = builders.make_parse("none")(["left"])[0]

    def flipped(flip):
        spec = pipeline.BatchSpec(**{**vars(SPEC), "text_length": 16, "flip": flip})
        plain = pipeline.BatchSpec(**{**vars(spec), "flip": False})
        batch = joined(take(pipeline.Loader(split(data), spec, 8), 8))
        other = joined(take(pipeline.Loader(split(data), plain, 8), 8))["pixels"]
        pairs = zip(batch["pixels"], other, strict=True)
        mirrored = np.array([bool((x == y[:, :, ::-1]).all()) for x, y in pairs])
        return mirrored, (batch["tokens"] == left).any(1)

    assert not flipped(False)[0].any()
    mirrored, sided = flipped(True)
    assert 10 < sided.sum() < 30 and not mirrored[sided].any()
    assert 0.3 < mirrored[~sided].mean() < 0.7


def test_a_question_names_a_side_in_its_answer_too():
    asked = {"texts": [b"Where is it?", b"who is it"], "answers": [b"on the Right", b"cat"]}
    assert clips._sided(asked).tolist() == [True, False]
    options = {"texts": [b"it goes left", b"cleft palate", b"b", b"c", b"d"], "answers": [b"1"]}
    assert clips._sided(options).tolist() == [True] + [False] * 4


def test_training_says_where_objects_are_padding(data, tmp_path, caplog):
    words = "has no detections: objects are padding"
    pipeline.Loader(split(data), SPEC, 4)
    assert words not in caplog.text
    source = toy_source.Source({"train": 2})
    source.class_names = ()  # as without detections
    toy_source.build(tmp_path, source)
    pipeline.Loader(split(tmp_path), SPEC, 2)
    assert f"folder/captions {words}" in caplog.text


def test_frames_are_spaced_uniformly():
    assert augment.frame_indices(12, 12).tolist() == list(range(12))
    assert augment.frame_indices(12, 6).tolist() == [1, 3, 5, 7, 9, 11]
    assert augment.frame_indices(12, 1).tolist() == [6]
    assert augment.frame_indices(5, 3).tolist() == [0, 2, 4]


def test_metadata_needs_no_frames_and_fingerprints_tell_sets_apart(data):
    part = split(data)
    listed = part.metadata(2)
    assert listed == splits.Metadata("train2", ("a thing 2 moves",), ())
    record = part.read(2)
    assert record["video_id"] == b"train2" and len(record["texts"]) == 1
    assert part.fingerprint == splits.fingerprint(part.metadata(i) for i in range(37))
    assert part.fingerprint != split(data, part="test").fingerprint
    assert part.class_names == ("thing", "other")


def test_mistakes_say_how_to_mend_them(data, tmp_path):
    with pytest.raises(UserError, match=r"stoa_jax.data.build msrvtt/qa --manual-dir=DIR"):
        split(tmp_path, "msrvtt/qa")
    with pytest.raises(UserError, match="no split 'validation'; it has test, train"):
        split(data, part="validation")
    with pytest.raises(UserError, match="kind 'caption', and the task reads 'qa'"):
        pipeline.Loader(split(data), pipeline.BatchSpec(kind="qa", frames=3, objects=2), 4)
    for field, asked, stored in (("frames", 5, 4), ("objects", 4, 3)):
        spec = pipeline.BatchSpec(**{**vars(SPEC), field: asked})
        with pytest.raises(UserError, match=f"stores {stored} {field}.*--{field}={asked}"):
            pipeline.Loader(split(data), spec, 4)
    with pytest.raises(UserError, match="batch size 5 is not divisible by 2"):
        pipeline.Loader(split(data), SPEC, 5, process_count=2)


def test_a_damaged_file_is_named(tmp_path):
    toy_source.build(tmp_path, toy_source.Source({"train": 3}))
    part = split(tmp_path)
    loader = pipeline.Loader(part, SPEC, 3, train=False)
    path = next(part.directory.glob("*.array_record-*"))
    data = bytearray(path.read_bytes())
    start = data.find(b"\xff\xd8\xff", data.find(b"\xff\xd8\xff") + 1)
    data[70:start] = bytes(start - 70)
    path.write_bytes(data)
    part.__dict__.pop("_source")  # opened before it was damaged
    with pytest.raises(UserError, match=r"clip \d of 'train' is damaged .* build again with"):
        loader.batch(0)


def test_reading_imports_no_tensorflow(data):
    code = f"""
import sys
from stoa_jax.data import pipeline
split = pipeline.open_split({str(data)!r}, "folder/captions", "train")
spec = pipeline.BatchSpec(frames=3, image_size=16, objects=2, text_length=8)
batch = next(iter(pipeline.Loader(split, spec, 4)))
assert batch["pixels"].shape == (4, 3, 16, 16, 3)
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_tfds_opens_the_set(data):
    import tensorflow_datasets as tfds

    directory = Path(data) / "folder" / "captions" / "1.0.0"
    builder = tfds.builder_from_directory(directory)
    assert {s: i.num_examples for s, i in builder.info.splits.items()} == {"train": 37, "test": 11}
    source = builder.as_data_source("test")
    assert [r["video_id"].decode() for r in source] == [f"test{i}" for i in range(11)]
    assert json.loads((directory / "classes.json").read_text()) == ["thing", "other"]
