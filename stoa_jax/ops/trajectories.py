"""Selection of trajectories, and the attention mask of all of them in one packed sequence.

Shapes: T frames, K objects per frame, N trajectories.
"""

import jax.numpy as jnp
from jax import Array, lax


def select_trajectories(
    classes: Array, scores: Array, num: int, choice: str = "largest"
) -> tuple[Array, Array]:
    """Choose `num` classes of one clip: return them [num] and their objects [num, T·K].

    Takes classes and confidences [T, K]; a negative class is padding. `choice="largest"` takes the
    classes with the largest summed confidence, largest first, ties by class id.
    `choice="first_met"` takes them in order of appearance, frame by frame and slot by slot. Unused
    trajectories have class -1 and no objects. A confidence that is not finite counts as 0.
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
    index = jnp.arange(classes.size, dtype=jnp.int32)
    same = (classes[:, None] == classes) & valid  # [object, object]
    # There is no table of classes: the first object of a class represents it.
    first = valid & ~(same & (index < index[:, None])).any(1)
    if choice == "first_met":
        keys = (~first, index)
    else:
        scores = jnp.where(jnp.isfinite(scores), scores, 0)
        total = jnp.where(same, scores, 0).sum(1)
        keys = (~first, -total, classes)
    # Objects that represent no class sort last.
    *_, order = lax.sort((*keys, index), num_keys=len(keys))
    order = order[:num]
    order = jnp.pad(order, (0, num - order.size))
    used = jnp.arange(num) < first.sum()
    chosen = jnp.where(used, classes[order], -1)
    return chosen, (classes == chosen[:, None]) & used[:, None]


def packed_attention_mask(membership: Array, object_valid: Array) -> Array:
    """Return the attention mask [N + T·K, N + T·K] of N [CLS] tokens followed by T·K objects.

    Takes the objects of each trajectory [N, T·K] and which objects are valid [T·K]. Each trajectory
    attends to itself only, so its outputs are those of a sequence of its own. An object of no
    trajectory attends only to itself, so that no softmax is empty, and nothing attends to it.
    """
    num = membership.shape[0]
    membership = membership & object_valid
    cls = jnp.eye(num, dtype=bool)
    group = jnp.concatenate([cls, membership], 1)  # [N, N + T·K], one column a token
    together = jnp.einsum("ni,nj->ij", group.astype(jnp.int32), group.astype(jnp.int32)) > 0
    return together | jnp.eye(group.shape[1], dtype=bool)
