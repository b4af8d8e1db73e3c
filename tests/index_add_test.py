"""Adding videos to an index: windows, resuming, shards, failures, models that do not fit."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import videos as video_files
from clip_tiny import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st

import stoa_jax
from stoa_jax.errors import UserError
from stoa_jax.index import adding, failures, windows
from stoa_jax.index.decoding import Processes

REPO = Path(__file__).resolve().parents[1]
SECONDS = [3, 10, 12, 15, 21, 4, 7]


@pytest.fixture(scope="module")
def model():
    return stoa_jax.load(FOLDER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for i, seconds in enumerate(SECONDS):
        video_files.write(root / f"v{i}.mp4", count=6 * seconds, rate=6, size=(64 + 16 * i, 64))
    return root


@pytest.fixture(scope="module")
def files(folder):
    return [str(folder / f"v{i}.mp4") for i in range(len(SECONDS))]


def spans(index: stoa_jax.Index) -> dict[str, list[tuple[float, float]]]:
    hits = index.search(np.ones(24), k=len(index))
    found: dict[str, list] = {}
    for hit in sorted(hits, key=lambda h: (h.id, h.start)):
        found.setdefault(os.path.basename(hit.id), []).append((hit.start, hit.end))
    return found


def test_every_video_is_cut_into_windows(model, files, tmp_path):
    index = stoa_jax.Index.create(tmp_path / "index", model)
    assert index.add(files) == stoa_jax.index.Added(len(files), 0, 0)
    assert index.ids() == files
    found = spans(index)
    assert found["v0.mp4"] == [(0, pytest.approx(3))]
    assert found["v1.mp4"] == [(0, pytest.approx(10))]
    assert found["v4.mp4"] == [(0, 10), (5, 15), (10, 20), (15, pytest.approx(21))]


def test_a_segment_has_the_vector_of_its_part_of_the_video(model, files, tmp_path):
    index = stoa_jax.Index.create(tmp_path / "index", model, segment=4, stride=2)
    index.add(files[:2])
    for hit in index.search("a dog runs", k=len(index)):
        (vector,) = model.encode_video([stoa_jax.Clip(hit.video, hit.start, hit.end)])
        score = vector.astype(np.float64) @ model.encode_text(["a dog runs"])[0]
        assert hit.score == pytest.approx(score, abs=1e-6)
        assert index.search(vector, k=1)[0].score == pytest.approx(1, abs=1e-5)
    best = index.search(stoa_jax.Clip(files[1], 2, 6), k=1)[0]
    assert (best.video, best.start, best.end) == (files[1], 2, 6)


def test_what_is_there_is_skipped(model, files, tmp_path):
    index = stoa_jax.Index.create(tmp_path / "index", model)
    index.add(files[:3])
    again = stoa_jax.Index.open(tmp_path / "index", model)
    assert again.add(files) == stoa_jax.index.Added(len(files) - 3, 3, 0)
    assert again.delete([files[4]]) == 4
    assert again.add(files) == stoa_jax.index.Added(1, len(files) - 1, 0)


def test_failures_are_named_and_tried_again(model, files, tmp_path):
    broken, missing = tmp_path / "broken.mp4", str(tmp_path / "missing.mp4")
    broken.write_bytes(Path(files[0]).read_bytes()[:500])
    index = stoa_jax.Index.create(tmp_path / "index", model)
    added = index.add([files[0], broken, missing, *files[1:]])
    assert added == stoa_jax.index.Added(len(files), 0, 2)
    record = list(failures.read(tmp_path / "index" / "failures.jsonl"))
    assert [entry["id"] for entry in record] == [str(broken), missing]
    assert all(entry["error"] and "\n" not in entry["error"] for entry in record)
    broken.write_bytes(Path(files[0]).read_bytes())
    assert index.add([broken, missing]) == stoa_jax.index.Added(1, 0, 1)
    record = list(failures.read(tmp_path / "index" / "failures.jsonl"))
    assert [entry["id"] for entry in record] == [missing]


def test_videos_of_every_form(model, files, tmp_path):
    index = stoa_jax.Index.create(tmp_path / "index", model)
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 40, 3), np.uint8)
    content = Path(files[4]).read_bytes()
    index.add([frames, list(frames[:3]), content, stoa_jax.Clip(files[3], 2, 14), Path(files[0])])
    ids = index.ids()
    assert [i[:7] for i in ids[:3]] == ["sha256:"] * 3
    assert ids[3:] == [f"{files[3]}#t=2,14", files[0]]
    hits = {(h.id, h.start): h for h in index.search(np.ones(24), k=len(index))}
    assert hits[ids[0], None].end is None and hits[ids[0], None].video is None
    assert {start for i, start in hits if i == ids[2]} == {0, 5, 10, 15}
    assert {(h.start, h.end) for h in hits.values() if h.id == ids[3]} == {(2, 12), (7, 14)}
    assert index.add([frames, content]) == stoa_jax.index.Added(0, 2, 0)


def test_shards_merge_into_the_whole(model, files, tmp_path):
    whole = stoa_jax.Index.create(tmp_path / "whole", model)
    whole.add(files)
    parts = [tmp_path / f"part{i}" for i in range(3)]
    counts = []
    for i, part in enumerate(parts):
        with stoa_jax.Index.create(part, model) as index:
            counts.append(index.add(files, shard=(i, 3)).added)
    assert counts == [3, 2, 2]
    stoa_jax.Index.merge(tmp_path / "all", parts)
    merged = stoa_jax.Index.open(tmp_path / "all", model)
    assert sorted(merged.ids()) == sorted(files)
    for query in ("a dog runs", "two cats"):
        scores = [
            {(hit.id, hit.start, hit.end): hit.score for hit in index.search(query, 20)}
            for index in (merged, whole)
        ]
        assert len(scores[0]) == len(whole)
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    for shard in ((3, 3), (-1, 2), (0, 0), 1, "0/2"):
        with pytest.raises(UserError, match="shard"):
            merged.add(files, shard=shard)


def test_an_interrupted_add_goes_on_where_it_ended(model, files, tmp_path):
    stoa_jax.Index.create(tmp_path / "index", model).close()
    code = """
import sys, stoa_jax
from stoa_jax.index import adding, session
session.COMMIT_ROWS, adding.ENCODE_WINDOWS = 1, 1
index = stoa_jax.Index.open(sys.argv[1], stoa_jax.load(sys.argv[2]))
print("begin", flush=True)
index.add(sys.argv[3:])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "index"), str(FOLDER), *files]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"begin\n"
    while not len(reader := stoa_jax.Index.open(tmp_path / "index")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    index = stoa_jax.Index.open(tmp_path / "index", model)
    done = index.ids()
    assert reader.ids() == done[: len(reader.ids())] and done == files[: len(done)]
    assert index.add(files) == stoa_jax.index.Added(len(files) - len(done), len(done), 0)
    whole = stoa_jax.Index.create(tmp_path / "whole", model)
    whole.add(files)
    assert spans(index) == spans(whole)


def test_another_model_is_refused(model, files, tmp_path):
    index = stoa_jax.Index.create(tmp_path / "index", model)
    index.add(files[:1])
    other = stoa_jax.load(FOLDER, frames=2)
    assert other.fingerprint != model.fingerprint
    with pytest.raises(UserError, match=f"of model {model.fingerprint}, and this model is"):
        stoa_jax.Index.open(tmp_path / "index", other)
    with pytest.raises(UserError, match="scores of two models do not compare"):
        index.add_vectors(np.ones((1, 24)), ["x"], fingerprint=other.fingerprint)
    index.add_vectors(np.ones((1, 24)), ["x"])  # opened with its model: of that model
    nameless = stoa_jax.Index.create(tmp_path / "nameless", dim=24)
    nameless.add_vectors(np.ones((1, 24)), ["x"])
    with pytest.raises(UserError, match="an unnamed model"):
        stoa_jax.Index.open(tmp_path / "nameless", model)


def test_a_video_that_moved_is_still_found(model, files, tmp_path):
    moved = tmp_path / "moved.mp4"
    moved.write_bytes(Path(files[1]).read_bytes())
    index = stoa_jax.Index.create(tmp_path / "index", model)
    index.add([moved])
    moved.unlink()
    assert index.search("a dog runs")[0].video == str(moved)
    with pytest.raises(UserError, match=r"moved\.mp4"):
        index.search(moved)


def test_lists_that_are_refused(model, files, tmp_path):
    index = stoa_jax.Index.create(tmp_path / "index", model)
    for arguments, message in [
        ((files[0],), "put the single video in a list"),
        (([files[0], files[0]],), "have the same id"),
        ((files[:2], ["a"]), "2 videos and 1 ids"),
        ((files[:1], [1]), "is not a string"),
        ((files[:2], ["a", "a"]), "have the same id"),
    ]:
        with pytest.raises(UserError, match=message):
            index.add(*arguments)
    index.add(files[:1], ["a"])
    with pytest.raises(UserError, match=r"holds this id for .*v0\.mp4, not for .*v1\.mp4"):
        index.add(files[1:2], ["a"])
    with pytest.raises(UserError, match="add needs the model"):
        stoa_jax.Index.open(tmp_path / "index").add(files)


def test_scenes(model, tmp_path):
    pytest.importorskip("scenedetect")
    import av

    path, rng = tmp_path / "shots.mp4", np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for shot in range(3):
            picture = rng.integers(0, 255, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            for _ in range(36 + 12 * shot):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                out.mux(stream.encode(frame))
        out.mux(stream.encode())
    index = stoa_jax.Index.create(tmp_path / "index", model, segment="scene")
    index.add([path])
    assert spans(index)["shots.mp4"] == [
        (pytest.approx(start, abs=0.1), pytest.approx(end, abs=0.1))
        for start, end in [(0, 3), (3, 7), (7, 12)]
    ]


@settings(deadline=None)
@given(
    start=st.floats(0, 100),
    duration=st.floats(0.05, 500),
    segment=st.floats(0.5, 60),
    share=st.floats(0.05, 1),
)
def test_windows_cover_the_video(start, duration, segment, share):
    stride, end = segment * share, start + duration
    found = windows.cut(start, end, segment, stride)
    assert found[0][0] == start and found[-1][1] == end
    for (first, last), (following, _) in itertools.pairwise(found):
        assert last - first == pytest.approx(segment) and following <= last + 1e-9
        assert following - first == pytest.approx(stride)
    assert all(0 < b - a <= segment + windows._SLIVER + 1e-9 for a, b in found)


def test_a_decoder_that_dies_or_hangs_is_replaced():
    decoders = Processes(1, timeout=1.0)
    try:
        with pytest.raises(UserError, match=r"the decoder crashed \(SIGABRT\)"):
            decoders.submit(os.abort).result()
        assert decoders.submit(len, "abc").result() == 3
        with pytest.raises(UserError, match="not decoded in 1 s; given up"):
            decoders.submit(time.sleep, 60).result()
        with pytest.raises(UserError, match="ZeroDivisionError"):
            decoders.submit(divmod, 1, 0).result()
        print_is_kept_apart = decoders.submit(print, "noise").result()
        assert print_is_kept_apart is None
    finally:
        decoders.close()


def test_a_second_add_is_told_of_the_first(model, files, tmp_path, monkeypatch):
    index = stoa_jax.Index.create(tmp_path / "index", model)
    other = stoa_jax.Index.open(tmp_path / "index", model)
    go_on = threading.Event()
    plain = adding._encoded

    def slow(*args):
        for job in plain(*args):
            go_on.wait()
            yield job

    monkeypatch.setattr(adding, "_encoded", slow)
    first = threading.Thread(target=index.add, args=(files[:1],))
    first.start()
    try:
        while not (tmp_path / "index" / "lock").read_bytes():
            time.sleep(0.01)
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* is writing"):
            other.delete(["x"])
    finally:
        go_on.set()
        first.join()
    assert len(stoa_jax.Index.open(tmp_path / "index")) == 1
