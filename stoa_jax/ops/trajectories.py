"""Which classes are trajectories, and who sees whom when all of them run as one sequence.

Shapes: T frames, K objects a frame, N trajectories.
"""

import jax.numpy as jnp
from jax import Array, lax


def select_trajectories(
    classes: Array, scores: Array, num: int, choice: str = "largest"
) -> tuple[Array, Array]:
    """Classes and confidences [T, K] -> the chosen classes [num] and their objects [num, T·K].

    A negative class is padding. `choice="largest"`: the classes of the largest summed confidence,
    largest first, ties by class id. `choice="first_met"`: in the order in which they appear, frame
    by frame and slot by slot. Unused trajectories have class -1 and no objects. A confidence that
    is not finite counts as 0.
    """
    if choice not in ("largest", "first_met"):
        raise ValueError(f"select_trajectories: choice is {choice!r}; use 'largest' or 'first_met'")
    if classes.ndim != 2 or classes.shape != scores.shape:
        raise ValueError(
            f"select_trajectories: classes are {classes.shape} and scores {scores.shape}; both "
            "must be [T, K] (use jax.vmap for a batch)"
        )
    classes = classes.reshape(-1).astype(jnp.int32)  # [T·K]
    scores = lax.stop_gradient(scores.reshape(-1).astype(jnp.float32))
    if num < 1 or classes.size == 0:
        return jnp.full((num,), -1, jnp.int32), jnp.zeros((num, classes.size), bool)
    valid = classes >= 0
    place = jnp.arange(classes.size, dtype=jnp.int32)
    same = (classes[:, None] == classes) & valid  # [object, object]
    # Objects stand for their class (there is no vocabulary): the first one met speaks for it.
    first = valid & ~(same & (place < place[:, None])).any(1)
    if choice == "first_met":
        keys = (~first, place)
    else:
        scores = jnp.where(jnp.isfinite(scores), scores, 0)
        total = jnp.where(same, scores, 0).sum(1)
        keys = (~first, -total, classes)
    # Every object that does not speak sorts behind all that do.
    *_, order = lax.sort((*keys, place), num_keys=len(keys))
    order = order[:num]
    order = jnp.pad(order, (0, num - order.size))
    used = jnp.arange(num) < first.sum()
    chosen = jnp.where(used, classes[order], -1)
    return chosen, (classes == chosen[:, None]) & used[:, None]


def packed_attention_mask(membership: Array, object_valid: Array) -> Array:
    """Objects of each trajectory [N, T·K] and which are real [T·K] -> who (row) sees whom (column).

    The sequence is N [CLS] tokens, then T·K objects; the result [N + T·K, N + T·K] lets each
    trajectory see itself and no other, so that its numbers are those of a sequence of its own.
    What belongs to no trajectory sees itself, so that no softmax is empty, and is seen by none.
    """
    num = membership.shape[0]
    membership = membership & object_valid
    cls = jnp.eye(num, dtype=bool)
    group = jnp.concatenate([cls, membership], 1)  # [N, N + T·K], one column a token
    together = jnp.einsum("ni,nj->ij", group.astype(jnp.int32), group.astype(jnp.int32)) > 0
    return together | jnp.eye(group.shape[1], dtype=bool)
