"""Write the example clip of the README, its detections, and the film strip that explains it.

python docs/film.py docs/_static
"""

import json
import sys
from pathlib import Path

import stoa_jax
from stoa_jax.data.synthetic import examples

CLIP = 0


def main(directory: Path) -> None:
    """Generate one clip, ask the shipped model about it, and draw what it matched."""
    clip = examples.world().clip(CLIP)
    examples.write_video(directory / "example.mp4", clip.frames)
    rows = [json.dumps({**row, "video": "example"}) for row in examples.detections(clip)]
    (directory / "example.jsonl").write_text("\n".join(rows) + "\n")

    model = stoa_jax.load("synthetic")
    video = stoa_jax.Clip(directory / "example.mp4", detections=directory / "example.jsonl")
    text = model.caption([video])[0]
    explanation = model.explain(video, text)
    explanation.draw(directory / "film.webp")
    print(f"captions: {list(clip.captions)}\ncaption: {text} ({explanation.probability:.2f})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
