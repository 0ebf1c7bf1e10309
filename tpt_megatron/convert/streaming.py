"""Reading and writing large files once, from one end to the other: in bounded memory, of the process and of the kernel's page cache.

A model of many GB that passes through the page cache drives everything else out of it, and pages that are used again are several
times as fast as fresh ones. So what was read or written is given back at once.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tpt_megatron.files import FileEntry

_AT_ONCE = 1 << 23
"""Bytes that are read, or written and hashed, in one go: few enough to be in the processor's cache for the second use."""
_WINDOW = 1 << 26
"""Bytes after which what was written is given back."""


class StreamedWriter:
    """A file that is written from its beginning to its end, and hashed on the way where its checksum is wanted."""

    def __init__(self, path: Path, *, with_checksum: bool) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115 (it closes with this)
        self._hash = hashlib.sha256() if with_checksum else None
        self._bytes = self._given_back = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def tell(self) -> int:
        """Return how many bytes there are so far."""
        return self._bytes

    def flush(self) -> None:
        """Leave nothing in this process."""
        self._file.flush()

    def write(self, data: Any) -> int:
        """Write bytes, or whatever has a buffer."""
        view = memoryview(data).cast("B")
        for at in range(0, len(view), _AT_ONCE):
            part = view[at : at + _AT_ONCE]
            self._file.write(part)
            if self._hash is not None:
                self._hash.update(part)
            self._bytes += len(part)
            if self._bytes - self._given_back >= _WINDOW:
                self._given_back = self._bytes
                _give_back(self._file.fileno(), 0, self._bytes)  # starts to write out what is new, and drops what was written out since the last time
        return len(view)

    def entry(self) -> FileEntry:
        """Return name, size and SHA-256 of the file as it is so far."""
        assert self._hash is not None
        return FileEntry(name=self._path.name, bytes=self._bytes, sha256=self._hash.hexdigest())


class StreamedView(io.RawIOBase):
    """A part of a file to read, as a file of its own."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (it closes with this)
        self._offset, self._length, self._at = offset, length, 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def seekable(self) -> bool:
        """Say that this can be read in any order."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Read on from another place."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        """Return the place in the part."""
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer`, or as much of it as the part has left."""
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        done = 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done : done + _AT_ONCE]], self._offset + self._at)
            if not got:
                break
            if got == _AT_ONCE:  # small ones share pages with what comes next
                _give_back(self._file.fileno(), self._offset + self._at, got)
            done += got
            self._at += got
        return done


def sha256_of(path: Path, progress: Callable[[int], object]) -> str:
    """Return the SHA-256 of a file's bytes, in hex. `progress` hears of them as they are read."""
    digest, buffer = hashlib.sha256(), bytearray(_AT_ONCE)
    with StreamedView(path, 0, path.stat().st_size) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            progress(count)
    return digest.hexdigest()


def _give_back(descriptor: int, offset: int, length: int) -> None:
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


class Budget:
    """Bytes of memory that threads share."""

    def __init__(self, total: int) -> None:
        self._free, self._total = total, total
        self._changed = threading.Condition()

    @contextmanager
    def taking(self, count: int) -> Iterator[None]:
        """Wait until there are `count` bytes, and have them until the block ends; more than there are in all means all of them."""
        count = min(count, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()
