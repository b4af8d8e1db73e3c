"""The assignment problem by bids and shortest augmenting paths, for a batch of problems at once.

Shapes: B problems, n rows, m columns. Inside, the problems are the last dimension, which
vectorises, and reductions are not along the first, which are slow on a CPU.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from stoa_jax.ops import pairs

ROUNDS = 3  # of bids; more rounds than this take longer than the paths that they save
CAUTION = 2.0**-20  # share of the prices that a bid stays below; float32 rounds to 2⁻²⁴
CPU_BATCH = 64  # problems that a CPU's cache holds

_NONE = np.int32(-1)


def augment(scores: Array, rows: Array, columns: Array) -> Array:
    """Return the column of each row [B, n] for the largest sum of scores [B, n, m].

    `rows` [B, n] and `columns` [B, m] exist; in no problem may rows outnumber columns. Scores are
    finite, and at most about 1. The result of a row that does not exist is undefined.
    """
    count = scores.shape[0]
    if not isinstance(count, int) or count <= CPU_BATCH:
        return _augment(scores, rows, columns)
    return lax.platform_dependent(scores, rows, columns, cpu=_in_parts, default=_augment)


def _in_parts(scores: Array, rows: Array, columns: Array) -> Array:
    """Solve `CPU_BATCH` problems after the other; none waits for the longest of all."""
    count = scores.shape[0]
    parts = -(-count // CPU_BATCH)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, parts * CPU_BATCH - count), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(parts, CPU_BATCH, *x.shape[1:])

    out = lax.map(lambda part: _augment(*part), tuple(map(split, (scores, rows, columns))))
    return out.reshape(parts * CPU_BATCH, -1)[:count]


def _augment(scores: Array, rows: Array, columns: Array) -> Array:
    """Let rows bid for columns, then give the others one by the shortest augmenting path.

    The paths are one flat loop, in which each problem has its own row and its own position in the
    path. A batch therefore takes as many steps as its longest problem, rather than the longest path
    of every row.
    """
    cost, rows, columns = -scores.transpose(1, 2, 0), rows.T, columns.T
    n, m, count = cost.shape
    row_index = lax.broadcasted_iota(jnp.int32, (n, 1), 0)
    column_index = lax.broadcasted_iota(jnp.int32, (m, 1), 0)
    zero = jnp.zeros((count,), jnp.float32)
    zeros = jnp.zeros((m, count), jnp.float32)
    far = jnp.full((m, count), jnp.inf, jnp.float32)
    by_row = (-scores).reshape(count * n, m)
    first_row = jnp.arange(count, dtype=jnp.int32) * n

    def first(todo: Array) -> Array:
        return jnp.minimum(jnp.where(todo, row_index, n).min(0), n - 1)

    def costs_of(row: Array) -> Array:
        return by_row[first_row + row].T

    # column_of [n, B], row_of [m, B]: the pairs so far; `price` [m, B]. For the current row,
    # `root`: `distance` [m, B] to each column, the row `via` [m, B] it is reached from, and the
    # columns `done` [m, B]. `row` is scanned next, and has the costs `weight` [m, B]; `base` is the
    # distance to it minus what it pays. `end` is the column to walk back from, or -1 while
    # scanning.
    def step(s: dict) -> dict:
        scanning = (s["end"] < 0) & s["todo"].any(0)
        # Scan `row`: relax the distances and take the nearest column that is not done.
        price, done = s["price"], s["done"]
        through = pairs.add(pairs.add((s["weight"], zeros), pairs.negative(price)), s["base"])
        open_ = columns & ~done
        nearer = scanning & open_ & pairs.less(through, s["distance"])
        distance = pairs.where(nearer, through, s["distance"])
        via = jnp.where(nearer, s["row"], s["via"])
        nearest, column = pairs.minimum(distance, open_, 0)
        chosen = column_index == column
        done = done | (scanning & chosen)
        owner = _pick(chosen, s["row_of"])
        end = jnp.where(scanning, jnp.where(owner < 0, column, _NONE), s["end"])
        found = scanning & (end >= 0)
        lower = pairs.add(price, pairs.add(distance, pairs.negative(nearest)))
        # Walk back one pair of the path, already in the step that found its end.
        walking = end >= 0
        last = column_index == end
        giver = _pick(last, via)
        gives = row_index == giver
        before = _pick(gives, s["column_of"])
        complete = walking & (giver == s["root"])
        todo = s["todo"] & ~(complete & (row_index == s["root"]))
        root = first(todo)
        row = jnp.where(complete, root, jnp.where(scanning, jnp.maximum(owner, 0), s["row"]))
        weight = costs_of(row)
        # The cost of a pair is what its row pays, so the row's price need not be stored.
        paid = pairs.add(
            (_pick(chosen, weight), zero),
            pairs.negative((_pick(chosen, price[0]), _pick(chosen, price[1]))),
        )
        base = pairs.where(scanning, pairs.add(nearest, pairs.negative(paid)), s["base"])
        return {
            "todo": todo,
            "root": root,
            "row": row,
            "weight": weight,
            "base": pairs.where(complete, (zero, zero), base),
            "distance": pairs.where(complete, (far, zeros), distance),
            "via": via,
            "done": done & ~complete,
            "end": jnp.where(walking & ~complete, before, _NONE),
            "price": pairs.where(found & done, lower, price),
            "row_of": jnp.where(walking & last, giver, s["row_of"]),
            "column_of": jnp.where(walking & gives, end, s["column_of"]),
            "steps": s["steps"] + 1,
        }

    price, row_of = _bids(cost, rows, columns)
    held = row_of == row_index[:, None]  # [n, m, B]
    column_of = jnp.where(held, column_index, _NONE).max(1)
    todo = rows & (column_of < 0)
    root = first(todo)
    state = {
        "todo": todo,
        "root": root,
        "row": root,
        "weight": costs_of(root),
        "base": (zero, zero),
        "distance": (far, zeros),
        "via": jnp.zeros((m, count), jnp.int32),
        "done": jnp.zeros((m, count), bool),
        "end": jnp.full((count,), _NONE),
        "price": (price, zeros),
        "row_of": row_of,
        "column_of": column_of,
        "steps": jnp.int32(0),
    }
    # A path scans and walks back over at most as many pairs as there are rows.
    limit = n * (2 * n + 1)
    state = lax.while_loop(lambda s: s["todo"].any() & (s["steps"] < limit), step, state)
    return state["column_of"].T


def _pick(chosen: Array, x: Array) -> Array:
    """Return the one element of each problem of `x` [k, B] that is chosen, else 0."""
    return jnp.where(chosen, x, 0).sum(0)


def _bids(cost: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
    """Return prices [m, B] and the row that holds each column, or -1, after some rounds of bids.

    In a round every row without a column bids for its cheapest one, as much as makes it the second
    cheapest, and the highest bid wins. A row that holds a column then has none that is cheaper, as
    augmenting paths require. Rounding may not break that: a bid stays a little lower, and a row
    whose two cheapest columns differ by less waits for its path.
    """
    n, m, count = cost.shape
    largest = jnp.abs(cost).max((0, 1))
    by_row = jnp.where(columns, cost, jnp.inf)
    by_column = by_row.swapaxes(0, 1)  # [m, n, B]
    row_index = lax.broadcasted_iota(jnp.int32, (n, 1), 0)
    # XLA would recompute these for each reduction.
    once = lax.optimization_barrier

    def bid(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        price, row_of = state
        net = once(by_row - price)  # [n, m, B]
        least = net.min(1)
        cheapest = net == least[:, None]
        second = once(jnp.where(cheapest, jnp.inf, net)).min(1)
        ties = once(cheapest.astype(jnp.float32)).sum(1)
        holds = (row_of == row_index[:, None]).any(1)
        caution = CAUTION * (largest + jnp.abs(least) + jnp.abs(second))
        rise = second - least - caution
        bids = rows & ~holds & (ties == 1) & jnp.isfinite(second) & (rise >= 0)
        rise = once(jnp.where(bids, rise, -1.0))  # [n, B]
        offers = once(jnp.where(by_column - price[:, None] == least, rise, -1.0))
        top = offers.max(1)  # [m, B]
        winner = once(jnp.where(offers == top[:, None], row_index, n)).min(1)
        sold = top >= 0
        return jnp.where(sold, price - top, price), jnp.where(sold, winner, row_of)

    state = jnp.zeros((m, count), jnp.float32), jnp.full((m, count), _NONE)
    return lax.fori_loop(0, ROUNDS, bid, state)
