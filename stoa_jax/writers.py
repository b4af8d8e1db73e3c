"""Metric writers: JSON lines and TensorBoard event files.

They have clu's `MetricWriter` interface, so that a writer of clu can replace them. clu's own
writers import TensorFlow, which a training process does not need. An event file is a sequence of
small protocol buffers, which are encoded here directly.
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

from stoa_jax.files import write_text


class Writer:
    """Interface of `clu.metric_writers.MetricWriter`; a writer ignores what it cannot store."""

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Write arbitrary tensors."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers."""

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write images [H, W, C] or [N, H, W, C], uint8 or floats in [0, 1]."""

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Write videos [T, H, W, C]."""

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Write audio [N, T, C]."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts."""

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, Any],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Write histograms of arrays."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the run's configuration."""

    def flush(self) -> None:
        """Flush buffered data to disk."""

    def close(self) -> None:
        """Flush and close the file."""


def _each(name: str) -> Callable[..., None]:
    def call(self: "Writers", *args: Any, **kwargs: Any) -> None:
        for writer in self.writers:
            getattr(writer, name)(*args, **kwargs)

    return call


class Writers(Writer):
    """A writer that forwards every call to several writers."""

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
    """Writer of JSON lines, one object per line: `{"step": 50, "loss": 3.2, ...}`.

    Rows after step `start`, which an interrupted run left behind, are removed, so that the resumed
    run writes every step once.
    """

    def __init__(self, path: str | Path, start: int = 0):
        self.path = Path(path)
        if self.path.exists():
            kept = [json.dumps(row) for row in read_lines(self.path) if row["step"] <= start]
            write_text(self.path, "".join(f"{line}\n" for line in kept))
        self._file = open(self.path, "a")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Append one line."""
        row = {"step": step, **{name: _number(value) for name, value in scalars.items()}}
        self._file.write(json.dumps(row) + "\n")
        # Others read the file while the run continues, and a killed process must not lose lines.
        self._file.flush()

    def flush(self) -> None:
        """Flush buffered data to disk."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON lines file, up to a last line that was only partly written."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class TensorBoard(Writer):
    """Writer of an event file that TensorBoard reads."""

    def __init__(self, folder: str | Path, start: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The process id distinguishes two starts within one second.
        name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}.stoa"
        self._file = open(folder / name, "ab")
        self._event(0, _bytes(3, b"brain.Event:2"))
        # SessionLog START makes TensorBoard discard later steps of older files.
        self._event(start, _bytes(7, _varint_field(1, 1)))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write one point of each curve."""
        self._summary(step, [(n, _float_field(2, _number(v))) for n, v in scalars.items()])

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write images, encoded as PNG."""
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
        """Write texts, which TensorBoard renders as Markdown."""
        values = []
        for name, text in texts.items():
            plugin = _bytes(9, _bytes(1, _bytes(1, b"text")))
            shape = _bytes(2, _bytes(2, _varint_field(1, 1)))
            tensor = _varint_field(1, 7) + shape + _bytes(8, text.encode())
            values.append((name, plugin + _bytes(8, tensor)))
        self._summary(step, values)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the run's configuration as a table."""
        rows = "".join(f"| {name} | `{value}` |\n" for name, value in sorted(hparams.items()))
        self.write_texts(0, {"config": "| key | value |\n|---|---|\n" + rows})

    def flush(self) -> None:
        """Flush buffered data to disk."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
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


# Protocol buffers: a field is a tag (its number and wire type) followed by a varint, by four bytes,
# or by a length and that many bytes.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _float_field(number: int, value: float) -> bytes:
    # NumPy turns a float64 beyond float32's range into infinity, where struct.pack would fail.
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
    """Return the masked CRC-32C of the record format."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
