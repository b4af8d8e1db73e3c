"""Where metrics go: JSON lines and TensorBoard event files.

clu's `MetricWriter` interface, so that its writers can be used in their place. clu's own import
TensorFlow, which a training process does without: an event file is records of a small protocol
buffer, written here directly.
"""

import io
import json
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Writer:
    """The interface of `clu.metric_writers.MetricWriter`; what a writer cannot keep it drops."""

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Arbitrary tensors."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Numbers."""

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """[H, W, C] or [N, H, W, C], uint8 or floats in [0, 1]."""

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """[T, H, W, C]."""

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """[N, T, C]."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Words."""

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, Any],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Distributions."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """The settings of the run."""

    def flush(self) -> None:
        """Everything to the disk."""

    def close(self) -> None:
        """Flush, and let go."""


def _each(name: str) -> Callable[..., None]:
    def call(self: "Writers", *args: Any, **kwargs: Any) -> None:
        for writer in self.writers:
            getattr(writer, name)(*args, **kwargs)

    return call


class Writers(Writer):
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = tuple(writers)

    write_summaries = _each("write_summaries")
    write_scalars = _each("write_scalars")
    write_images = _each("write_images")
    write_videos = _each("write_videos")
    write_audios = _each("write_audios")
    write_texts = _each("write_texts")
    write_histograms = _each("write_histograms")
    write_hparams = _each("write_hparams")
    flush = _each("flush")
    close = _each("close")


class JsonLines(Writer):
    """One JSON object a line: `{"step": 50, "loss": 3.2, ...}`.

    A run that goes on from `start` drops what an earlier, interrupted one wrote beyond it, so that
    every step is there once.
    """

    def __init__(self, path: str | Path, start: int = 0):
        self.path = Path(path)
        if self.path.exists():
            kept = [json.dumps(row) for row in read_lines(self.path) if row["step"] <= start]
            part = self.path.with_suffix(".part")
            part.write_text("".join(f"{line}\n" for line in kept))
            os.replace(part, self.path)
        self._file = open(self.path, "a")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Append a line."""
        row = {"step": step, **{name: _number(value) for name, value in scalars.items()}}
        self._file.write(json.dumps(row) + "\n")
        # A line is read while the run goes on, and survives its end.
        self._file.flush()

    def flush(self) -> None:
        """Everything to the disk."""
        self._file.flush()

    def close(self) -> None:
        """Flush, and let go."""
        self._file.close()


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; a last line that was cut off is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class TensorBoard(Writer):
    """An event file in a folder that TensorBoard reads."""

    def __init__(self, folder: str | Path, start: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The process id keeps two starts within a second apart.
        name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}.stoa"
        self._file = open(folder / name, "ab")
        self._event(0, _bytes(3, b"brain.Event:2"))
        # SessionLog START: TensorBoard forgets what lies beyond this step in older files.
        self._event(start, _bytes(7, _varint_field(1, 1)))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Points of curves."""
        self._summary(step, [(n, _float_field(2, _number(v))) for n, v in scalars.items()])

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Pictures as PNG."""
        from PIL import Image

        values = []
        for name, image in images.items():
            image = np.asarray(image)
            for i, one in enumerate(image if image.ndim == 4 else image[None]):
                if one.dtype != np.uint8:
                    one = (np.clip(one, 0, 1) * 255).astype(np.uint8)
                png = io.BytesIO()
                Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one).save(png, "PNG")
                picture = (
                    _varint_field(1, one.shape[0])
                    + _varint_field(2, one.shape[1])
                    + _varint_field(3, one.shape[2])
                    + _bytes(4, png.getvalue())
                )
                values.append((f"{name}/{i}" if image.ndim == 4 else name, _bytes(4, picture)))
        self._summary(step, values)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Markdown."""
        values = []
        for name, text in texts.items():
            plugin = _bytes(9, _bytes(1, _bytes(1, b"text")))
            shape = _bytes(2, _bytes(2, _varint_field(1, 1)))
            tensor = _varint_field(1, 7) + shape + _bytes(8, text.encode())
            values.append((name, plugin + _bytes(8, tensor)))
        self._summary(step, values)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """A table of the settings."""
        rows = "".join(f"| {name} | `{value}` |\n" for name, value in sorted(hparams.items()))
        self.write_texts(0, {"config": "| key | value |\n|---|---|\n" + rows})

    def flush(self) -> None:
        """Everything to the disk."""
        self._file.flush()

    def close(self) -> None:
        """Flush, and let go."""
        self._file.close()

    def _summary(self, step: int, values: Sequence[tuple[str, bytes]]) -> None:
        body = b"".join(_bytes(1, _bytes(1, name.encode()) + value) for name, value in values)
        self._event(step, _bytes(5, body))

    def _event(self, step: int, what: bytes) -> None:
        clock = b"\x09" + struct.pack("<d", time.time())
        event = clock + _varint_field(2, step) + what
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))


def _number(value: Any) -> float | int:
    return np.asarray(value).item()


# Protocol buffers: a field is its number and wire type, then a varint, four bytes, or a length
# and so many bytes.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _float_field(number: int, value: float) -> bytes:
    # Clamped: a float64 beyond float32's range would not pack.
    with np.errstate(over="ignore"):
        return _varint(number << 3 | 5) + np.float32(value).tobytes()


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, turned and shifted as the record format wants."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
