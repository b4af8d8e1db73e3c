"""What a model sees: which trajectory it matches to which noun, which action to which verb.

Shapes: B clips, N trajectories, A actions, L text places.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stoa_jax import objectives
from stoa_jax.models.stoa import Stoa
from stoa_jax.text import Tokenizer

NONE = "Ø"


@dataclasses.dataclass(frozen=True)
class Match:
    """One trajectory or action, and the word it was matched to."""

    name: str  # the trajectory's class, or "action 1"
    word: str  # NONE: none of the words
    score: float  # softmax over the words


@dataclasses.dataclass(frozen=True)
class Explanation:
    """All matches of one clip and its text."""

    trajectories: tuple[Match, ...]
    actions: tuple[Match, ...]


@jax.jit
def _match(model: Stoa, batch: Mapping[str, jax.Array]):
    video = model.encode_video(batch["pixels"], batch["boxes"], batch["classes"], batch["scores"])
    text = model.encode_text(batch["tokens"])
    nouns, verbs = batch["tags"] == objectives.NOUN, batch["tags"] == objectives.VERB
    valid = jnp.ones(batch["tokens"].shape[0], bool)
    of_objects = objectives.ota(
        video.objects, video.object_mask, text.tokens, nouns, text.sep_index, valid
    )
    of_actions = objectives.asp(video.actions, text.tokens, verbs, text.sep_index, valid)
    return video.object_classes, of_objects, of_actions, text.sep_index


def explain(
    model: Stoa,
    batch: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    tokenizer: Tokenizer,
) -> list[Explanation]:
    """The matches of each clip of a batch with the text it came with."""
    wanted = ("pixels", "boxes", "classes", "scores", "tokens", "tags")
    classes, objects, actions, sep = jax.device_get(
        _match(model, {k: jnp.asarray(batch[k]) for k in wanted})
    )

    def matches(found, b: int, names: Sequence[str]) -> tuple[Match, ...]:
        out = []
        for name, column, scores in zip(names, found.columns[b], found.scores[b], strict=False):
            if column >= 0:
                word = word_at(batch["tokens"][b], int(column), tokenizer)
                word = NONE if column == sep[b] else word
                out.append(Match(name, word, float(scores[column])))
        return tuple(out)

    result = []
    for b in range(len(classes)):
        kinds = [str(class_names[c]) if c >= 0 else "" for c in classes[b]]
        ways = [f"action {i + 1}" for i in range(actions.columns.shape[1])]
        result.append(Explanation(matches(objects, b, kinds), matches(actions, b, ways)))
    return result


def word_at(tokens: np.ndarray, place: int, tokenizer: Tokenizer) -> str:
    """The word whose last piece stands at `place`: back to the last piece of the word before."""
    start = place
    while start > 1 and not tokenizer.decode(tokens[start - 1 : start]).endswith(" "):
        start -= 1
    return tokenizer.decode(tokens[start : place + 1]).strip()
