"""`stoa explain`: show which objects and actions were matched to which words."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoa_jax.cli import shared
from stoa_jax.command_line import DONE

if TYPE_CHECKING:
    from stoa_jax.inference.matched import Action, Trajectory


def register(subparsers: Any) -> None:
    """Add the command `explain`."""
    parser = shared.command(
        subparsers,
        "explain",
        run,
        "show which trajectories and actions are matched to which words of a text",
        several=False,
    )
    parser.add_argument("text", help="the text")
    parser.add_argument("--draw", type=Path, help="a .png film strip, or a .webp or .mp4 animation")


def run(arguments: argparse.Namespace) -> int:
    """Print the matches, and draw them if asked."""
    model = shared.open_model(arguments)
    found = model.explain(shared.clip_of(arguments.video, arguments), arguments.text)
    if arguments.draw is not None:
        found.draw(arguments.draw)
    if arguments.json:
        shared.print_json(found.to_dict())
        return DONE
    print(f"probability {found.probability:.4f}")
    for trajectory in found.trajectories:
        print(
            f"trajectory {trajectory.name} ({trajectory.score:.2f}, in {trajectory.shown.sum()} of "
            f"{len(trajectory.shown)} frames) -> {_word(trajectory)}"
        )
    for i, action in enumerate(found.actions):
        print(f"action {i + 1} -> {_word(action)}")
    return DONE


def _word(match: "Trajectory | Action") -> str:
    return f"{'no word' if match.word is None else match.word} ({match.word_score:.2f})"
