"""Time reading 12 frames of a clip on one core, compared with the raw decoder.

    python -m benchmarks.decode

Creates 15 s clips of moving noise (640x360, H.264) with short and long distances between keyframes,
and times `read_frames` and PyAV's plain loop over all frames.
"""

import tempfile
import time
from pathlib import Path

import av
import numpy as np

from stoa_jax.data import video

SECONDS, RATE, SIZE = 15, 30, (640, 360)


def make(path: Path, gop: int) -> Path:
    """Write a clip whose frames show a sliding texture."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (SIZE[1] // 8 + 60, SIZE[0] // 8 + 60, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.gop_size = gop
        for i in range(SECONDS * RATE):
            picture = np.ascontiguousarray(texture[i : i + SIZE[1], 2 * (i % 200) :][:, : SIZE[0]])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return path


def raw(path: Path) -> None:
    """Decode every frame and discard it."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for _ in container.decode(video=0):
            pass


def milliseconds(work, *arguments, repeats: int = 9) -> float:
    """Return the median processor time of a call; other work on the machine hardly affects it."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work(*arguments)
        times.append(time.process_time() - start)
    return 1000 * sorted(times)[repeats // 2]


def main() -> None:
    """Print the table."""
    print("| keyframe every | raw decode of all frames, ms | read_frames, ms | jumps |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for gop in (15, 30, 60, 250):
            path = make(Path(directory) / f"{gop}.mp4", gop)
            jumps = video.read_frames(path)[1].seeks
            one, two = milliseconds(raw, path), milliseconds(video.read_frames, path)
            print(f"| {gop} | {one:.0f} | {two:.0f} | {jumps} |")


if __name__ == "__main__":
    main()
