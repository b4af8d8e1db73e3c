"""Selection of trajectories, and the attention mask of all of them in one packed sequence.

Shapes: T frames, K objects per frame, N trajectories.
"""

import jax.numpy as jnp
from jax import Array, lax

CHOICES = ("largest", "first_met", "tracked")


def select_trajectories(
    classes: Array,
    scores: Array,
    num: int,
    choice: str = "largest",
    boxes: Array | None = None,
) -> tuple[Array, Array]:
    """Choose `num` trajectories of one clip: return their classes [num] and objects [num, T·K].

    Takes classes and confidences [T, K]; a negative class is padding. `choice="largest"` takes the
    classes with the largest summed confidence, largest first, ties by class id.
    `choice="first_met"` takes them in order of appearance, frame by frame and slot by slot.
    `choice="tracked"` splits each class into tracks by `boxes` [T, K, 4] and takes the tracks with
    the largest summed confidence, so several can have one class. Unused trajectories have class -1
    and no objects. A confidence that is not finite counts as 0.
    """
    if choice not in CHOICES:
        known = ", ".join(map(repr, CHOICES))
        raise ValueError(f"select_trajectories: choice is {choice!r}; use one of {known}")
    if classes.ndim != 2 or classes.shape != scores.shape:
        raise ValueError(
            f"select_trajectories: classes are {classes.shape} and scores {scores.shape}; both "
            "must be [T, K] (use jax.vmap for a batch)"
        )
    groups = classes
    if choice == "tracked":
        if boxes is None or boxes.shape != (*classes.shape, 4):
            found = None if boxes is None else boxes.shape
            raise ValueError(
                f"select_trajectories: choice 'tracked' needs boxes {(*classes.shape, 4)}; "
                f"they are {found}"
            )
        groups = track_objects(classes, boxes)
    groups = groups.reshape(-1).astype(jnp.int32)
    classes = classes.reshape(-1).astype(jnp.int32)  # [T·K]
    scores = lax.stop_gradient(scores.reshape(-1).astype(jnp.float32))
    if num < 1 or classes.size == 0:
        return jnp.full((num,), -1, jnp.int32), jnp.zeros((num, classes.size), bool)
    valid = classes >= 0
    index = jnp.arange(classes.size, dtype=jnp.int32)
    same = (groups[:, None] == groups) & valid  # [object, object]
    # Without a table of classes or tracks, the first object of each represents it.
    first = valid & ~(same & (index < index[:, None])).any(1)
    if choice == "first_met":
        keys = (~first, index)
    else:
        scores = jnp.where(jnp.isfinite(scores), scores, 0)
        total = jnp.where(same, scores, 0).sum(1)
        keys = (~first, -total, classes)
    # Objects that represent nothing sort last.
    *_, order = lax.sort((*keys, index), num_keys=len(keys))
    order = order[:num]
    order = jnp.pad(order, (0, num - order.size))
    used = jnp.arange(num) < first.sum()
    chosen = jnp.where(used, classes[order], -1)
    return chosen, (groups == groups[order][:, None]) & valid & used[:, None]


def track_objects(classes: Array, boxes: Array) -> Array:
    """Split the objects of each class into tracks; return the track of each object [T, K].

    Takes classes [T, K], negative for padding, and boxes [T, K, 4]. A track is named by the flat
    index of its first object; padding has -1. In each frame, tracks and objects of equal class are
    joined pair by pair, the best fit first: the overlap of an object with the track's last box,
    plus how near they are. An object that no track can reach starts one. The reach is the boxes'
    side for every frame that has passed since, so a track survives frames without its object.
    """
    frames, count = classes.shape
    slots = frames * count
    valid = classes >= 0
    boxes = jnp.where(valid[..., None], lax.stop_gradient(boxes).astype(jnp.float32), 0)

    def join(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        fit, track = carry  # [tracks, K], [K]
        row, column = jnp.divmod(fit.argmax(), count)
        fits = fit[row, column] > 0
        track = track.at[column].set(jnp.where(fits, row, track[column]))
        taken = (jnp.arange(slots) == row)[:, None] | (jnp.arange(count) == column)
        return jnp.where(fits & taken, 0, fit), track

    def frame(state: tuple[Array, Array, Array], inputs: tuple[Array, Array, Array]):
        last, kinds, seen = state  # of each track: its last box, its class, when it was last seen
        at, box, kind = inputs
        same = (kinds[:, None] == kind) & (kind >= 0)
        fit = jnp.where(same, _fit(last, box, (at - seen)[:, None]), 0)
        new = (at * count + jnp.arange(count)).astype(jnp.int32)
        _, track = lax.fori_loop(0, count, join, (fit, new))
        where = jnp.where(kind >= 0, track, slots)  # padding is written nowhere
        state = (
            last.at[where].set(box, mode="drop"),
            kinds.at[where].set(kind, mode="drop"),
            seen.at[where].set(at, mode="drop"),
        )
        return state, jnp.where(kind >= 0, track, -1)

    start = (
        jnp.zeros((slots, 4)),
        jnp.full(slots, -1, jnp.int32),
        jnp.zeros(slots, jnp.int32),
    )
    steps = (jnp.arange(frames, dtype=jnp.int32), boxes, classes.astype(jnp.int32))
    return lax.scan(frame, start, steps)[1]


def _fit(last: Array, boxes: Array, gap: Array) -> Array:
    """Return how well boxes [K, 4] continue `last` [M, 4], seen `gap` [M, 1] frames ago: [M, K].

    The overlap, and 1 minus the distance of the centres over the reach; 0 if both are missing.
    """
    one, two = last[:, None], boxes[None]
    low, high = jnp.maximum(one[..., :2], two[..., :2]), jnp.minimum(one[..., 2:], two[..., 2:])
    common = jnp.prod(jnp.maximum(high - low, 0), -1)
    areas = [jnp.prod(jnp.maximum(x[..., 2:] - x[..., :2], 0), -1) for x in (one, two)]
    overlap = common / jnp.maximum(areas[0] + areas[1] - common, 1e-9)
    centres = [(x[..., 2:] + x[..., :2]) / 2 for x in (one, two)]
    distance = jnp.sqrt(jnp.square(centres[0] - centres[1]).sum(-1))
    side = (jnp.sqrt(areas[0]) + jnp.sqrt(areas[1])) / 2
    near = jnp.maximum(1 - distance / jnp.maximum(side * gap, 1e-9), 0)
    return overlap + near


def packed_attention_mask(membership: Array, object_valid: Array) -> Array:
    """Return the attention mask [N + T·K, N + T·K] of N [CLS] tokens followed by T·K objects.

    Takes the objects of each trajectory [N, T·K] and which objects are valid [T·K]. Each trajectory
    attends to itself only, so its outputs are those of a sequence of its own. An object of no
    trajectory attends only to itself, so that no softmax is empty, and nothing attends to it.
    """
    num = membership.shape[0]
    membership = membership & object_valid
    cls = jnp.eye(num, dtype=bool)
    group = jnp.concatenate([cls, membership], 1)  # [N, N + T·K], one column per token
    together = jnp.einsum("ni,nj->ij", group.astype(jnp.int32), group.astype(jnp.int32)) > 0
    return together | jnp.eye(group.shape[1], dtype=bool)
