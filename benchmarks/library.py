"""Measure each call of the library in videos per second, on video files.

    python benchmarks/library.py MODEL VIDEO... [--copies=8]

The times include decoding but not compilation: each call runs once before it is timed. `explain`
also tags the text and keeps the frames. If other programs run on the machine, rely on the processor
time.
"""

import argparse
import os
import time
import warnings

import stoa_jax

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("model")
parser.add_argument("videos", nargs="+")
parser.add_argument("--copies", type=int, default=8, help="number of times each video is passed")
arguments = parser.parse_args()
warnings.simplefilter("ignore")

model = stoa_jax.load(arguments.model, truncate=True)
videos = arguments.videos * arguments.copies
text = "a red square moves right"
calls = {
    "encode_video": lambda: model.encode_video(videos),
    "match, one text": lambda: model.match(videos, [text]),
    "choose of five": lambda: [model.choose(video, [text] * 5) for video in videos],
    "caption, beam 5": lambda: model.caption(videos),
    "answer": lambda: model.answer(videos, [text] * len(videos)),
    "explain": lambda: [model.explain(video, text) for video in videos],
}
print(f"{len(videos)} videos, {os.cpu_count()} cores, {model!r}")
for name, call in calls.items():
    call()
    clock, processor = time.perf_counter(), time.process_time()
    call()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    print(
        f"{name:16} {len(videos) / clock:8.1f} videos/s, "
        f"{len(videos) / processor:8.1f} a second of processor time",
        flush=True,
    )
