import os
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from videos import grey, picture, write

from stoa_jax.data import video
from stoa_jax.data.video import timeline
from stoa_jax.data.video.frames import upright
from stoa_jax.errors import UserError


def numbers(frames, count) -> list[int]:
    """Identify frames among `count` by their grey."""
    return [round((grey(f) - 40) / 170 * (count - 1)) for f in frames]


def middles(count: int, num: int) -> list[int]:
    return [int((i + 0.5) * count / num) for i in range(num)]


@pytest.mark.parametrize(
    "name, codec",
    [
        ("a.mp4", "mpeg4"),
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.mov", "mjpeg"),
        ("a.webm", "libvpx-vp9"),
        ("a.ts", "mpeg2video"),
        ("a.flv", "flv"),
        ("a.mpg", "mpeg2video"),
    ],
)
def test_the_middles_of_equal_parts_in_any_container(tmp_path, name, codec):
    if codec == "mjpeg":
        path = write(tmp_path / name, 50, 25, codec, pix_fmt="yuvj420p")
    else:
        path = write(tmp_path / name, 50, 25, codec)
    frames, info = video.read_frames(path, 5)
    assert numbers(frames, 50) == pytest.approx(middles(50, 5), abs=1.1)
    assert {f.shape for f in frames} == {(64, 96, 3)}
    assert all(f.dtype == np.uint8 for f in frames)
    assert info.damaged == 0
    assert np.diff(info.times) == pytest.approx([0.4] * 4, abs=0.05)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("gop", [1, 5, 100])
def test_seeking_and_scanning_give_the_same_frames(tmp_path, monkeypatch, codec, gop):
    path = write(tmp_path / "a.mp4", 90, 25, codec, gop=gop)
    frames, info = video.read_frames(path, 4)
    monkeypatch.setattr(timeline, "SEEK_COST", 10**9)
    scanned, scan_info = video.read_frames(path, 4)
    assert scan_info.seeks == 0
    assert info.indices == scan_info.indices
    for one, two in zip(frames, scanned, strict=True):
        np.testing.assert_array_equal(one, two)


def test_seeks_only_when_keyframes_are_close(tmp_path):
    close = write(tmp_path / "close.mp4", 120, 25, gop=4)
    far = write(tmp_path / "far.mp4", 120, 25, gop=200)
    assert video.read_frames(close, 4)[1].seeks == 4
    assert video.read_frames(far, 4)[1].seeks == 0
    assert video.probe(close).keyframes == 30
    # A late part is cheap to reach from a keyframe, even if all its frames are wanted.
    assert video.read_frames(close, 4, start=4.5)[1].seeks > 0


def test_time_and_not_the_index_decides_in_variable_frame_rate(tmp_path):
    # 20 frames in the first second, 5 in the next four.
    pts = [i * 50 for i in range(20)] + [1000 + i * 800 for i in range(5)]
    path = write(tmp_path / "vfr.mkv", 25, 20, pts=pts)
    frames, info = video.read_frames(path, 5)
    times = (np.arange(5) + 0.5) * info.video.duration / 5
    expected = [max(i for i, p in enumerate(pts) if p <= 1000 * t) for t in times]
    assert list(info.indices) == expected
    assert numbers(frames, 25) == pytest.approx(expected, abs=1.1)


def test_start_and_end(tmp_path):
    path = write(tmp_path / "a.mp4", 48, 12)
    frames, info = video.read_frames(path, 4, start=1.0, end=3.0)
    assert info.indices == tuple(12 + m for m in middles(24, 4))
    assert numbers(frames, 48) == pytest.approx(list(info.indices), abs=1.1)
    # An end beyond the video is clamped: DiDeMo's first 30 s of shorter videos.
    assert video.read_frames(path, 4, end=30)[1].indices == video.read_frames(path, 4)[1].indices


@pytest.mark.parametrize(
    "start, end", [(2, 1), (1, 1), (-1, 2), (float("nan"), 2), (0, float("nan")), (4.01, 9)]
)
def test_times_that_cannot_be_are_refused(tmp_path, start, end):
    path = write(tmp_path / "a.mp4", 100, 25)
    with pytest.raises(video.VideoError, match=r"a\.mp4: (no time from|starts at)"):
        video.read_frames(path, 4, start=start, end=end)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_clips_repeat_their_frames(tmp_path, count):
    path = write(tmp_path / "a.mp4", count, 25)
    frames, info = video.read_frames(path, 12)
    assert list(info.indices) == middles(count, 12)
    assert len(frames) == 12
    if count == 1:
        assert all((f == frames[0]).all() for f in frames)


RED, GREEN = (255, 0, 0), (0, 255, 0)


def corner(frame, where) -> str:
    height, width = frame.shape[:2]
    y = {"t": height // 10, "b": -height // 10}[where[0]]
    x = {"l": width // 10, "r": -width // 10}[where[1]]
    red, green, _ = frame[y, x].astype(int)
    return "red" if red > green + 80 else "green" if green > red + 80 else "none"


@pytest.mark.parametrize(
    "rotation, red, green, size",
    [
        (0, "tl", "tr", (64, 96)),
        (90, "bl", "tl", (96, 64)),  # counter-clockwise
        (-90, "tr", "br", (96, 64)),  # as phones hold it
        (180, "br", "bl", (64, 96)),
    ],
)
@pytest.mark.parametrize("name", ["a.mov", "a.mp4"])
def test_rotation_is_honoured(tmp_path, name, rotation, red, green, size):
    path = write(tmp_path / name, 10, 10, rotation=rotation)
    frames, info = video.read_frames(path, 2)
    assert frames[0].shape[:2] == size
    assert (info.height, info.width) == size
    assert (corner(frames[0], red), corner(frames[0], green)) == ("red", "green")


@pytest.mark.parametrize(
    "matrix, expected",
    [
        ([[1, 0], [0, 1]], lambda p: p),
        ([[-1, 0], [0, 1]], lambda p: p[:, ::-1]),
        ([[1, 0], [0, -1]], lambda p: p[::-1]),
        ([[-1, 0], [0, -1]], lambda p: np.rot90(p, 2)),
        ([[0, 1], [-1, 0]], lambda p: np.rot90(p, -1)),
        ([[0, -1], [1, 0]], lambda p: np.rot90(p, 1)),
        ([[0, 1], [1, 0]], lambda p: p.transpose(1, 0, 2)),
        ([[0, -1], [-1, 0]], lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
    ],
)
def test_all_eight_ways_a_picture_can_lie(matrix, expected):
    matrix = np.array([[*matrix[0], 0], [*matrix[1], 0], [0, 0, 1]], np.int32) << 16
    one = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    np.testing.assert_array_equal(upright(one, matrix), expected(one))


def test_smaller_by_area_and_never_larger(tmp_path):
    path = tmp_path / "fine.mkv"
    with av.open(str(path), "w") as out:  # black and white columns average to grey
        stream = out.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "bgr0"
        stripes = np.zeros((64, 128, 3), np.uint8)
        stripes[:, ::2] = 255
        out.mux(stream.encode(av.VideoFrame.from_ndarray(stripes, format="rgb24")))
        out.mux(stream.encode())
    frames, info = video.read_frames(path, 1, short_side=32)
    assert frames[0].shape == (32, 64, 3)
    assert np.abs(frames[0].astype(int) - 127).max() <= 4
    assert (info.width, info.height) == (128, 64)
    assert video.read_frames(path, 1, short_side=500)[0][0].shape == (64, 128, 3)
    np.testing.assert_array_equal(video.read_frames(path, 1, short_side=None)[0][0], stripes)


def test_pixels_that_are_not_square(tmp_path):
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(0, 1, (64, 64)), format="rgb24")))
        out.mux(stream.encode())
    frames, info = video.read_frames(path, 1)
    assert frames[0].shape == (64, 128, 3)
    assert (info.width, info.height) == (64, 64)  # as a detector saw it


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7680, 4320)])
def test_one_pixel_and_8k(tmp_path, size):
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg" if size[0] > 9 else "png", rate=5)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if size[0] > 9 else "rgb24"
        for i in range(2):
            frame = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), 99 + i, np.uint8))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    frames, _ = video.read_frames(path, 3, short_side=256)
    expected = (256, 455) if size[0] > 9 else size[::-1]
    assert [f.shape[:2] for f in frames] == [expected] * 3
    assert abs(int(frames[0][0, 0, 0]) - 99) <= 3


def test_sound_beside_pictures_and_after_their_end(tmp_path):
    path = write(tmp_path / "a.mp4", 50, 25, sound=True)
    assert numbers(video.read_frames(path, 5)[0], 50) == pytest.approx(middles(50, 5), abs=1.1)


def bad_files(tmp_path):
    good = write(tmp_path / "good.mp4", 60, 12).read_bytes()
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    avi = write(tmp_path / "good.avi", 60, 12).read_bytes()
    mkv = write(tmp_path / "good.mkv", 60, 12, "libx264").read_bytes()
    with av.open(str(tmp_path / "none.mp4"), "w") as out:  # a video without frames
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
    return {
        "empty file": b"",
        "no index": good[: len(good) // 2],
        "text": b"this is not a video\n" * 100,
        "zeros": bytes(5000),
        "random": np.random.default_rng(0).bytes(20000),
        "only sound": (tmp_path / "sound.mp4").read_bytes(),
        "truncated avi": avi[: len(avi) // 3],
        "truncated mkv": mkv[: len(mkv) // 3],
        "no frame": (tmp_path / "none.mp4").read_bytes(),
        "playlist": b"#EXTM3U\n#EXTINF:10,\nhttp://example.invalid/a.ts\n#EXT-X-ENDLIST\n",
        "concat": b"ffconcat version 1.0\nfile good.mp4\n",
        "page": b"<html><body>404 Not Found</body></html>",
    }


def test_bad_files_give_one_clear_error(tmp_path):
    for name, data in bad_files(tmp_path).items():
        path = tmp_path / "bad.mp4"
        path.write_bytes(data)
        started = time.monotonic()
        with pytest.raises(video.VideoError) as caught:
            video.read_frames(path, 4)
        assert time.monotonic() - started < 5, name
        message = str(caught.value)
        assert message.startswith(f"{path}: "), (name, message)
        assert "\n" not in message and len(message) < 300, (name, message)
        with pytest.raises(UserError):
            video.probe(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path, tmp_path / "pipe.mp4", tmp_path / "missing.mp4", "a\0b", "concat:a|b"):
        with pytest.raises(video.VideoError, match=r"not a regular file|No such file|null"):
            video.read_frames(path)
    with pytest.raises(video.VideoError, match="0 frames were requested"):
        video.read_frames("x.mp4", 0)


def test_the_message_says_how_much_is_missing(tmp_path):
    path = tmp_path / "a.mkv"
    data = write(path, 120, 12, "libx264").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(video.VideoError, match=r"truncated: \d\.\d s of 10\.\d s can be read"):
        video.read_frames(path, 4)


def test_damage_in_the_middle_does_not_lose_the_clip(tmp_path):
    path = write(tmp_path / "a.mp4", 60, 12, "libx264", gop=10)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = np.random.default_rng(1).bytes(200)
    path.write_bytes(bytes(data))
    frames, _ = video.read_frames(path, 6)
    assert len(frames) == 6
    assert numbers(frames[:1], 60) == pytest.approx([5], abs=1.1)


def test_it_gives_up_in_time(tmp_path):
    path = write(tmp_path / "a.mp4", 60, 12)
    with pytest.raises(video.VideoError, match=r"took too long|not a video"):
        video.read_frames(path, 4, timeout=0.0)


def test_probe(tmp_path):
    info = video.probe(write(tmp_path / "a.mp4", 50, 25))
    assert (info.width, info.height, info.frames, info.codec) == (96, 64, 50, "mpeg4")
    assert info.duration == pytest.approx(2.0, abs=0.01)
