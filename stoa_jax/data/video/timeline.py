"""When the frames of a video are shown, which of them to read, and how to reach them.

One pass over the packets, without decoding, builds the `Timeline`. It gives the frames at the
middles of equal parts, and the keyframes to seek to if that costs less than decoding everything.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import av

from stoa_jax.data.video.container import VideoError, packets

SEEK_COST = 4  # a seek costs about as much as decoding this many frames
# Fraction of the duration that may be missing at the end before a file counts as truncated.
SLACK_SECONDS, SLACK_SHARE = 1.0, 0.1
# Containers whose header gives the duration; elsewhere it is estimated from the bit rate.
_HEADED_FORMATS = frozenset("mov matroska avi asf flv".split())


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Presentation times of the frames, in ticks of the stream's clock."""

    pts: list[int]  # sorted
    keys: list[int]  # of the keyframes, sorted
    end: int
    exact: bool  # pts come from the stream; False: estimated from the decoding order
    tick: float  # seconds


def scan(container, stream, path, deadline: float) -> Timeline:
    """Build the table of frame times; raise VideoError for a file shorter than its header says."""
    tick = float(stream.time_base)
    pts, dts, keys, lengths = [], [], [], []
    furthest = None  # seconds, over all streams: sound may continue after the last frame
    # The packets of an audio stream also reveal a truncated file; those of data streams do not.
    streams = [stream, *container.streams.audio]
    for packet in packets(container, streams, path, deadline):
        if packet.size == 0 and packet.pts is None and packet.dts is None:
            continue  # the flush packet at the end
        at = packet.pts if packet.pts is not None else packet.dts
        if at is not None and packet.time_base:
            seconds = float((at + (packet.duration or 0)) * packet.time_base)
            furthest = seconds if furthest is None else max(furthest, seconds)
        if packet.stream_index != stream.index or packet.is_discard or packet.size == 0:
            continue
        pts.append(packet.pts)
        dts.append(packet.dts)
        lengths.append(packet.duration or 0)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
    if not pts:
        raise VideoError(f"{path}: no frame in it")
    exact = None not in pts and len(set(pts)) == len(pts)
    times = sorted(pts) if exact else _guessed(dts, stream)
    step = max(1, (times[-1] - times[0]) // max(1, len(times) - 1)) if len(times) > 1 else 1
    last = lengths[pts.index(times[-1])] if exact else lengths[-1]
    table = Timeline(times, sorted(keys), times[-1] + (last or step), exact, tick)
    if furthest is not None:
        _refuse_truncated(container, furthest, path)
    return table


def _guessed(dts: Sequence[int | None], stream) -> list[int]:
    """Return frame times for packets without any: decoding times in order, or the frame rate."""
    known = [time for time in dts if time is not None]
    if len(known) == len(dts) == len(set(known)):
        return sorted(known)
    rate = stream.average_rate or stream.guessed_rate or 25
    step = max(1, round(1 / (float(rate) * float(stream.time_base))))
    return [i * step for i in range(len(dts))]


def _refuse_truncated(container, furthest: float, path) -> None:
    names = set(container.format.name.split(","))
    if container.duration is None or not names & _HEADED_FORMATS:
        return
    told = container.duration / av.time_base
    found = furthest - (container.start_time or 0) / av.time_base
    if found < told * (1 - SLACK_SHARE) - SLACK_SECONDS:
        raise VideoError(f"{path}: truncated: {found:.1f} s of {told:.1f} s can be read")


def choose(table: Timeline, num: int, start, end, path) -> list[int]:
    """Return the ticks of the frames at the middles of `num` parts; short clips repeat some."""
    length = (table.end - table.pts[0]) * table.tick
    first = 0.0 if start is None else float(start)
    last = length if end is None else min(float(end), length)
    if not (math.isfinite(first) and (end is None or float(end) > first)) or first < 0:
        raise VideoError(f"{path}: no time from {start} to {end} s")
    if first >= length:
        raise VideoError(f"{path}: starts at {first:g} s, but the video ends at {length:.2f} s")
    chosen = []
    for i in range(num):
        at = first + (i + 0.5) * (last - first) / num
        ticks = table.pts[0] + at / table.tick
        chosen.append(table.pts[max(0, bisect.bisect_right(table.pts, ticks) - 1)])
    return chosen


def jumps(table: Timeline, wanted: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return (keyframe, frames after it) for each seek; empty if decoding everything is cheaper."""
    if not table.exact or not table.keys:
        return []
    plan: dict[int, list[int]] = {}
    for ticks in sorted(set(wanted)):
        place = bisect.bisect_right(table.keys, ticks) - 1
        if place < 0:
            return []
        plan.setdefault(table.keys[place], []).append(ticks)

    def index(ticks: int) -> int:
        return bisect.bisect_left(table.pts, ticks)

    by_jumps = sum(SEEK_COST + index(t[-1]) - index(key) + 1 for key, t in plan.items())
    return list(plan.items()) if by_jumps < index(max(wanted)) + 1 else []
