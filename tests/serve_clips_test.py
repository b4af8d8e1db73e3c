"""The page's videos: rows become files of the library only, whole or by byte ranges."""

import os
import time

import av
import pytest
import videos

pytest.importorskip("fastapi")

from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from stoa_jax.errors import UserError
from stoa_jax.serve import clip_route, ranges, transcode
from stoa_jax.serve.library import GoneError, Library, common_root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Create videos of all kinds, and files that must not be served."""
    folder = tmp_path_factory.mktemp("outer")
    library = folder / "library"
    (library / "deep").mkdir(parents=True)
    videos.write(library / "plain.mp4", codec="libx264", count=36)
    videos.write(library / "old.avi", codec="mpeg4", sound=True)
    videos.write(library / "part2.mp4", codec="mpeg4")  # a codec that browsers do not support
    videos.write(library / "deep" / "naïve 映画\u202e.mp4", codec="libx264")
    videos.write(library / "turned.mov", codec="libx264", rotation=90)
    videos.write(folder / "secret.mp4", codec="libx264")
    (library / "text.mp4").write_text("root:x:0:0")
    (library / "empty.mp4").write_bytes(b"")
    (library / "link.mp4").symlink_to(library / "plain.mp4")
    (library / "leaves.mp4").symlink_to(folder / "secret.mp4")
    (library / "away").symlink_to(folder)
    os.mkfifo(library / "pipe.mp4")
    return folder


NAMES = {
    "plain": "plain.mp4",
    "old": "old.avi",
    "part2": "part2.mp4",
    "odd": "deep/naïve 映画\u202e.mp4",
    "turned": "turned.mov",
    "text": "text.mp4",
    "empty": "empty.mp4",
    "link": "link.mp4",
    "leaves": "leaves.mp4",
    "away": "away/secret.mp4",
    "dots": "../secret.mp4",
    "pipe": "pipe.mp4",
    "folder": "deep",
    "gone": "gone.mp4",
    "lone": "lone\udcff.mp4",
    "nul": "a\0b.mp4",
}


@pytest.fixture(scope="module")
def library(folder):
    root = folder / "library"
    found = {name: str(root / file) for name, file in NAMES.items()}
    return Library({**found, "passwd": "/etc/passwd", "none": None}, [root])


@pytest.fixture(scope="module")
def get(library, tmp_path_factory):
    cache = transcode.Cache(tmp_path_factory.mktemp("cache"))
    app = FastAPI()
    app.include_router(clip_route.router(library, cache))
    client = TestClient(app)

    def request(name, method="GET", **headers):
        names = {key.replace("_", "-"): value for key, value in headers.items()}
        return client.request(method, f"/clip/{library.row(name)}", headers=names)

    request.client = client
    return request


def test_a_video_comes_whole_with_its_type_and_no_hint_of_where_it_lies(get, folder):
    answer = get("plain")
    content = (folder / "library/plain.mp4").read_bytes()
    assert answer.status_code == 200 and answer.content == content
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert str(folder) not in str(answer.headers) and "plain" not in str(answer.headers)


@pytest.mark.parametrize("asked", ["bytes=0-99", "bytes=100-", "bytes=-50", "bytes=5-5"])
def test_a_single_range_is_answered_by_exactly_its_bytes(get, folder, asked):
    content = (folder / "library/plain.mp4").read_bytes()
    first, last = asked.removeprefix("bytes=").split("-")
    start = int(first) if first else len(content) - int(last)
    end = min(int(last), len(content) - 1) if first and last else len(content) - 1
    answer = get("plain", range=asked)
    assert answer.status_code == 206
    assert answer.content == content[start : end + 1]
    assert answer.headers["content-range"] == f"bytes {start}-{end}/{len(content)}"
    assert int(answer.headers["content-length"]) == end - start + 1


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-1,5-6", "bytes=0-,0-,0-", "bytes=9-1", "bytes=-", "bytes=a-b", "rows=0-1", "",
     "bytes=" + "9" * 5000 + "-", "bytes=0-" + ",0-" * 5000, "bytes=٠-١", "bytes=0--1"],
)  # fmt: skip
def test_what_is_no_single_range_gets_the_whole_file_once(get, folder, asked):
    try:
        answer = get("plain", range=asked.encode("utf-8"))
    except UnicodeError:
        return
    assert answer.status_code == 200
    assert len(answer.content) == (folder / "library/plain.mp4").stat().st_size


@pytest.mark.parametrize("asked", ["bytes=9999999-", "bytes=-0", "bytes=9999999999999999999-"])
def test_a_range_beyond_the_end_is_416_with_the_size(get, folder, asked):
    answer = get("plain", range=asked)
    size = (folder / "library/plain.mp4").stat().st_size
    assert answer.status_code == 416 and not answer.content
    assert answer.headers["content-range"] == f"bytes */{size}"


@given(st.text(max_size=40), st.integers(0, 10_000))
def test_no_header_gives_bytes_that_are_not_there(text, size):
    try:
        found = ranges.parse(text, size)
    except ranges.Unsatisfiable:
        return
    assert found is None or 0 <= found.start <= found.end < size


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 100))
def test_a_range_is_what_slicing_gives(start, end, size):
    content = bytes(range(size))
    try:
        found = ranges.parse(f"bytes={start}-{end}", size)
    except ranges.Unsatisfiable:
        assert start >= size
        return
    if end < start:
        assert found is None
    else:
        assert content[found.start : found.end + 1] == content[start : end + 1] != b""


def test_head_has_the_headers_and_no_body(get, folder):
    answer = get("plain", method="HEAD", range="bytes=0-9")
    assert answer.status_code == 200 and not answer.content  # ranges apply only to GET
    assert int(answer.headers["content-length"]) == (folder / "library/plain.mp4").stat().st_size
    assert get("gone", method="HEAD").status_code == 404


def test_a_part_is_sent_only_while_the_file_is_the_same(get):
    first = get("plain")
    tag, date = first.headers["etag"], first.headers["last-modified"]
    part = {"range": "bytes=0-9"}
    assert tag.startswith('"')
    assert get("plain", if_none_match=tag).status_code == 304
    assert get("plain", if_none_match=f'"x", W/{tag}').status_code == 304
    assert get("plain", if_none_match='"x"').status_code == 200
    assert get("plain", if_range=tag, **part).status_code == 206
    assert get("plain", if_range=date, **part).status_code == 206
    for other in ('"other"', f"W/{tag}", "Thu, 01 Jan 1970 00:00:00 GMT", "nonsense"):
        assert get("plain", if_range=other, **part).status_code == 200


def test_a_changed_file_has_another_tag(get, folder):
    path = folder / "library/part2.mp4"
    before = get("plain").headers["etag"], get("part2").headers["etag"]
    videos.write(path, codec="mpeg4", count=30)
    assert get("plain").headers["etag"] == before[0]
    assert get("part2").headers["etag"] != before[1]


@pytest.mark.parametrize("name", ["leaves", "away", "dots", "passwd"])
def test_what_lies_outside_the_library_is_refused(get, name):
    answer = get(name)
    assert answer.status_code == 404
    assert "outside the library" in answer.json()["error"]
    assert "/etc" not in answer.text and "outer" not in answer.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone", "moved or deleted since it was indexed"),
        ("lone", "moved or deleted"),
        ("nul", "moved or deleted"),
        ("empty", "no longer a video file"),
        ("pipe", "no longer a video file"),
        ("folder", "cannot be opened"),
        ("none", "has no file"),
    ],
)
def test_what_is_no_file_any_more_is_one_line(get, name, reason):
    began = time.monotonic()
    answer = get(name)
    assert answer.status_code == 404 and reason in answer.json()["error"]
    assert "\n" not in answer.json()["error"] and time.monotonic() - began < 5


def test_a_file_that_is_no_video_is_never_sent(get, folder):
    answer = get("text")
    assert answer.status_code == 415 and "not a video" in answer.json()["error"]
    assert "root:x" not in answer.text and str(folder) not in answer.text


def test_links_within_the_library_and_odd_names_are_served(get, folder):
    assert get("link").content == (folder / "library/plain.mp4").read_bytes()
    assert get("odd").content == (folder / "library" / NAMES["odd"]).read_bytes()


@pytest.mark.parametrize(
    "path",
    ["/clip/../../etc/passwd", "/clip/..%2f..%2fetc%2fpasswd", "/clip/%2e%2e/secret.mp4",
     "/clip//etc/passwd", "/clip/plain.mp4", "/clip/-1", "/clip/1.0", "/clip/٣", "/clip/0x1",
     "/clip/0%00", "/clip/99999999999999999999", "/clip/999", "/clip/ 0", "/clip/+0", "/clip/"],
)  # fmt: skip
def test_no_text_of_a_request_becomes_a_path(get, path):
    answer = get.client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        sound = [s.codec_context.name for s in container.streams.audio]
        frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
        return stream.codec_context.name, sound, frames


def test_what_browsers_cannot_play_comes_as_h264(get, folder, tmp_path):
    for name in ("old", "part2", "turned"):
        answer = get(name)
        assert answer.status_code == 200 and answer.headers["content-type"] == "video/mp4"
        path = tmp_path / "out.mp4"
        path.write_bytes(answer.content)
        codec, sound, frames = decoded(path)
        _, _, original = decoded(folder / "library" / NAMES[name])
        assert codec == "h264" and sound == (["aac"] if name == "old" else [])
        assert len(frames) == len(original)
        times = [t for t, _ in frames]
        assert times == pytest.approx([t - original[0][0] for t, _ in original], abs=0.01)
        for (_, frame), i in zip(frames, range(len(frames)), strict=True):
            assert videos.grey(frame) == pytest.approx(
                videos.grey(videos.picture(i, len(frames))), abs=12
            )
        part = get(name, range="bytes=10-19")
        assert part.status_code == 206 and part.content == answer.content[10:20]


def test_a_turned_video_stands_upright(get, folder, tmp_path):
    from stoa_jax.data.video import read_frames

    path = tmp_path / "out.mp4"
    path.write_bytes(get("turned").content)
    upright, _ = read_frames(folder / "library/turned.mov", 1, short_side=None)
    _, _, frames = decoded(path)
    assert frames[0][1].shape == upright[0].shape
    corner = frames[0][1][4:8, 4:8].mean((0, 1))
    assert corner == pytest.approx(upright[0][4:8, 4:8].mean((0, 1)), abs=40)


def test_transcoded_videos_are_kept_and_the_longest_unused_goes_first(folder, tmp_path):
    cache = transcode.Cache(tmp_path)
    source = folder / "library/old.avi"
    first = cache.get(source, ("a",))
    made = first.stat().st_mtime_ns
    size = first.stat().st_size
    cache.limit = round(2.5 * size)
    second = cache.get(source, ("b",))
    time.sleep(0.01)
    assert cache.get(source, ("a",)) == first  # used again, not created again
    assert first.stat().st_mtime_ns > made and first.stat().st_size == size
    third = cache.get(source, ("c",))
    assert first.exists() and third.exists() and not second.exists()
    assert not list(tmp_path.glob("*.part"))


def test_a_video_too_long_to_transcode_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transcode, "MAX_SECONDS", 1.0)
    cache = transcode.Cache(tmp_path)
    with pytest.raises(UserError, match=r"old.avi: longer than .* convert it once: ffmpeg"):
        cache.get(folder / "library/old.avi", ("x",))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_transcoding_is_one_line(folder, tmp_path, monkeypatch):
    cache = transcode.Cache(tmp_path)

    def full(path, out):
        out.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transcode, "transcode", full)
    with pytest.raises(UserError, match=r"could not be transcoded \(No space left"):
        cache.get(folder / "library/old.avi", ("x",))
    assert not list(tmp_path.iterdir())


def test_the_library_of_an_index_is_the_directory_that_its_videos_share(tmp_path):
    assert common_root(["/a/b/c.mp4", "/a/b-x/d.mp4", "/a/b/e/f.mp4"]) == "/a"
    assert common_root(["/a/b/c.mp4"]) == "/a/b"
    with pytest.raises(UserError, match="no directory in common but the root"):
        common_root(["/a/x.mp4", "/b/y.mp4"])
    with pytest.raises(UserError, match="contains no video files"):
        common_root([])
    with pytest.raises(GoneError, match="no video 7"):
        Library({"a": "/a/b.mp4"}).open(7)


def test_files_are_closed_whatever_becomes_of_the_request(get):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for name in ("plain", "leaves", "text", "old", "pipe"):
            get(name)
            get(name, method="HEAD")
            get(name, range="bytes=99999999-")
        with get.client.stream("GET", "/clip/0") as answer:
            next(answer.iter_bytes(10))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
