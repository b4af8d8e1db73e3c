"""Decode video files: containers, timelines, frames."""

from stoa_jax.data.video.container import VideoError
from stoa_jax.data.video.frames import ReadInfo, VideoInfo, probe, read_frames

__all__ = ["ReadInfo", "VideoError", "VideoInfo", "probe", "read_frames"]
