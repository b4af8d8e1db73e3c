"""Matches of the trained model with the words of each clip's text."""

from typing import TYPE_CHECKING

import numpy as np

from stoa_jax import film
from stoa_jax.errors import UserError
from stoa_jax.report import page
from stoa_jax.report.clips import Clips
from stoa_jax.report.run_files import Run

if TYPE_CHECKING:
    from stoa_jax.inference.explain import Explanation
    from stoa_jax.inference.matched import Action, Trajectory

NO_MATCH = "no word (Ø)"


def matched_clips(run: Run, clips: Clips, count: int) -> list[str]:
    """Return cards of the first `count` clips with the matches of their first text."""
    try:
        import stoa_jax

        model = stoa_jax.load(run.workdir)
    except UserError as error:
        run.notes.append(f"no matches are drawn: {error}")
        return []
    if not {"trajectories", "actions"} & set(model.has):
        run.notes.append("no matches are drawn: the model has neither trajectories nor actions")
        return []
    cards = []
    for i in range(min(count, len(clips))):
        about = clips.split.metadata(i)
        record = clips.split.read(i)
        frames = clips.frames(i)
        seen = stoa_jax.Detections(
            record["boxes"], record["classes"], record["scores"], tuple(clips.split.class_names)
        )
        explanation = model.explain(stoa_jax.Clip(frames, detections=seen), about.texts[0])
        cards.append(card(about.video_id, explanation))
    return cards


def card(title: str, explanation: "Explanation") -> str:
    """Format one clip: its frames with trajectories, and the word that each was matched to."""
    boxes, shown = stacked(explanation)
    picture = film.strip(explanation.frames, boxes, shown)
    items = []
    for i, trajectory in enumerate(explanation.trajectories):
        items.append((film.hex_colour(i), match_line(trajectory.name, trajectory)))
    for i, action in enumerate(explanation.actions):
        items.append(("var(--line)", match_line(f"action {i + 1}", action)))
    facts = [("text", explanation.text), ("match probability", f"{explanation.probability:.2f}")]
    return page.matches(title, film.data_address(picture), items, facts)


def stacked(explanation: "Explanation") -> tuple[np.ndarray, np.ndarray]:
    """Return boxes [N, T, 4] of all trajectories, and in which frames they are visible [N, T]."""
    found = explanation.trajectories
    if not found:
        length = len(explanation.frames)
        return np.zeros((0, length, 4), np.float32), np.zeros((0, length), bool)
    return np.stack([t.boxes for t in found]), np.stack([t.shown for t in found])


def match_line(name: str, match: "Trajectory | Action") -> str:
    """Format `name → word score` as HTML."""
    word = f"<b>{page.text(match.word)}</b>" if match.word is not None else NO_MATCH
    score = f' <span class="soft">{match.word_score:.2f}</span>' if match.word_score else ""
    return f"{page.text(name)} → {word}{score}"
