"""The videos that the page may show: rows of the index, resolved to files inside the library.

A request contains only a row number. No text of a request becomes a path.
"""

import dataclasses
import io
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from stoa_jax.errors import UserError


class GoneError(UserError):
    """A video of the index that cannot be shown because it was deleted, moved, or is outside."""


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """A regular file inside the library, opened for reading."""

    file: io.FileIO
    path: Path  # with all links resolved
    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, file: io.FileIO, path: Path) -> "OpenFile":
        """Describe an open file."""
        status = os.fstat(file.fileno())
        return cls(file, path, status.st_size, status.st_mtime_ns, status.st_ino)

    @property
    def key(self) -> tuple[str, int, int, int]:
        """Key that changes whenever the content does."""
        return str(self.path), self.size, self.modified_ns, self.inode


class Library:
    """Numbered videos below one or more directories; `videos` maps each id to its file or None."""

    def __init__(
        self, videos: Mapping[str, str | None], roots: Iterable[str | os.PathLike[str]] = ()
    ):
        self._videos = dict(videos)
        self._ids = list(self._videos)
        self._rows = {identity: row for row, identity in enumerate(self._ids)}
        files = [video for video in self._videos.values() if video is not None]
        self.roots = tuple(os.path.realpath(root) for root in list(roots) or [common_root(files)])

    def __len__(self) -> int:
        return len(self._ids)

    def row(self, identity: str) -> int | None:
        """Return the number of an id, or None if the id was not there at the start."""
        return self._rows.get(identity)

    def identity(self, row: int) -> str:
        """Return the id of a row."""
        if not 0 <= row < len(self._ids):
            raise GoneError(f"no video {row}; the library has {len(self)}")
        return self._ids[row]

    def open(self, row: int) -> OpenFile:
        """Open the file of a row, or raise GoneError with the reason."""
        identity = self.identity(row)
        stored = self._videos[identity]
        if stored is None:
            raise GoneError(f"{printable(identity)}: the index has no file for it")
        name = printable(os.path.basename(stored) or identity)
        try:
            path = os.path.realpath(stored, strict=True)
        except (OSError, ValueError):
            raise GoneError(
                f"{name}: the video was moved or deleted since it was indexed; put it back, or "
                "delete its id from the index"
            ) from None
        if not any(_inside(path, root) for root in self.roots):
            raise GoneError(
                f"{name}: it is outside the library, or is a link that leads out of it; allow "
                "its directory with --library=DIR"
            )
        # All links are resolved: a link that replaced the file since then is refused.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            file = io.FileIO(path, opener=lambda name, _: os.open(name, flags))
        except OSError as error:  # for example a directory
            raise GoneError(f"{name}: cannot be opened ({error.strerror})") from None
        opened = OpenFile.of(file, Path(path))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or not opened.size:
            file.close()
            raise GoneError(f"{name}: no longer a video file; index it again")
        return opened

    def check(self, row: int) -> None:
        """Raise `GoneError` unless the row can be shown."""
        self.open(row).file.close()


def common_root(videos: Iterable[str]) -> str:
    """Return the deepest directory above all videos, as their paths are written."""
    # What the first and the last in order share, all share.
    folders = [os.path.join(os.path.dirname(os.path.abspath(video)), "") for video in videos]
    if not folders:
        raise UserError("the index contains no video files; add some with `stoa index add`")
    root = os.path.commonpath([min(folders), max(folders)])
    if root == os.path.dirname(root):
        raise UserError(
            "the indexed videos have no directory in common but the root; name the directories "
            "that may be served with --library=DIR"
        )
    return root


def printable(name: str) -> str:
    """Return a name that UTF-8 can encode; file names may contain arbitrary bytes."""
    return name.encode("utf-8", "replace").decode()


def _inside(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root and path != root
