"""Write small video files whose frames can be identified."""

from fractions import Fraction

import av
import numpy as np

SIZE = (96, 64)  # width, height


def picture(i: int, count: int, size=SIZE) -> np.ndarray:
    """Return a frame whose grey encodes its number; top left is red, top right green."""
    width, height = size
    frame = np.full((height, width, 3), 40 + round(170 * i / max(1, count - 1)), np.uint8)
    frame[: height // 4, : width // 4] = 255, 0, 0
    frame[: height // 4, -(width // 4) :] = 0, 255, 0
    return frame


def grey(frame: np.ndarray) -> float:
    """Return the grey of the middle of a frame, away from the marks."""
    height, width = frame.shape[:2]
    return float(frame[height // 2 : height * 3 // 4, width // 3 : width * 2 // 3].mean())


def write(
    path,
    count=24,
    rate=12,
    codec="mpeg4",
    size=SIZE,
    pts=None,
    gop=12,
    pix_fmt="yuv420p",
    sound=False,
    rotation=None,
    options=None,
    container=None,
):
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size = gop
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        audio = out.add_stream("aac", rate=16000) if sound else None
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, count, size), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if audio is not None:
            for i in range(16 * count // rate):
                noise = av.AudioFrame.from_ndarray(
                    np.zeros((1, 1000), np.float32), format="fltp", layout="mono"
                )
                noise.sample_rate, noise.pts = 16000, i * 1000
                out.mux(audio.encode(noise))
            out.mux(audio.encode())
    return path
