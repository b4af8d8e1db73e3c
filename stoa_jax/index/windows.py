"""How a video is cut into segments: windows of one length, or shots."""

import math
from pathlib import Path

from stoa_jax.errors import UserError

SCENE = "scene"
_SLIVER = 0.1  # seconds: a shorter remainder is added to the window before it

Window = tuple[float, float]  # start and end in seconds


def check(segment: float | str, stride: float) -> None:
    """Raise UserError unless windows of this length and stride cover a video."""
    if segment == SCENE:
        return
    if isinstance(segment, str) or not (math.isfinite(segment) and segment > 0):
        raise UserError(f"segment: {segment!r}; give seconds above 0, or {SCENE!r}")
    if not 0 < stride <= segment:
        raise UserError(
            f"stride: {stride!r}; give seconds above 0 and at most the segment's {segment:g}, or "
            "parts of a video would be in no segment"
        )


def cut(start: float, end: float, segment: float, stride: float) -> list[Window]:
    """Return windows that cover [start, end]; the last may be shorter than `segment`."""
    windows = [(start, min(end, start + segment))]
    while windows[-1][1] < end - _SLIVER:
        first = start + len(windows) * stride
        windows.append((first, min(end, first + segment)))
    windows[-1] = (windows[-1][0], end)
    return windows


def shots(path: Path, start: float, end: float) -> list[Window]:
    """Return the shots of a video between `start` and `end`, found by PySceneDetect."""
    try:
        import scenedetect
    except ImportError as error:
        raise UserError(
            "segment='scene' needs PySceneDetect: pip install 'scenedetect-headless>=0.7,<0.8'"
        ) from error
    video = scenedetect.open_video(str(path), backend="pyav")
    manager = scenedetect.SceneManager()
    manager.add_detector(scenedetect.AdaptiveDetector())
    manager.detect_scenes(video)
    found = [
        (max(start, first.seconds), min(end, last.seconds))
        for first, last in manager.get_scene_list()
    ]
    found = [(first, last) for first, last in found if last - first > _SLIVER]
    if not found:
        return [(start, end)]
    # Until the container's end, which may be a frame later than the detector's.
    return [*found[:-1], (found[-1][0], end)]
