"""Measure what a build with millions of rows does before its first clip.

    python -m benchmarks.webvid --rows=2500000

Writes a table like WebVid's and does what the build does: read it, hash its entries, divide them
into shards, and look up each entry's video.
"""

import argparse
import csv
import os
import pickle
import random
import resource
import tempfile
import time
from pathlib import Path

from stoa_jax.data import sources
from stoa_jax.data.build import manifest, shards

WORDS = (
    "aerial view of a beautiful mountain lake man woman child dog running playing sunset".split()
)


def make(path: Path, rows: int) -> None:
    """Write rows of 5 to 24 words, some with a quoted comma."""
    rng = random.Random(0)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"])
        for i in range(rows):
            name = " ".join(rng.choices(WORDS, k=rng.randint(5, 24))) + (", 4k" if i % 3 else "")
            page = f"{i // 5000:06d}_{i // 5000 + 50:06d}"
            url = f"https://example.org/videos/{1000000 + i}/preview/stock-footage-{i}.mp4"
            table.writerow([1000000 + i, name, i // 100, page, "PT00H00M15S", url])


def main() -> None:
    """Print one line per stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as root:
        make(Path(root) / "results_2M_train.csv", rows)

        def stage(name, work):
            began = time.process_time()
            result = work()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            print(f"{name}: {time.process_time() - began:.1f} s, peak {peak:.0f} MiB", flush=True)
            return result

        def divide():
            cut = shards.shards_of("train", len(entries))
            return [shards.Part(s, entries[s.start : s.stop], root) for s in cut]

        def look():
            return sum(os.path.isfile(e.video_path) for part in parts for e in part.entries)

        entries = stage("read", lambda: sources.open_source("webvid/captions", root)).splits[
            "train"
        ]
        stage("hash", lambda: manifest.hash_of({"train": entries}))
        parts = stage("divide", divide)
        stage("look for each video", look)
        print(f"{len(parts)} shards, the first pickled: {len(pickle.dumps(parts[0]))} bytes")


if __name__ == "__main__":
    main()
