"""Files on their way between stages: atomic writes, compressed lines, checksums, manifests.

Nothing half-written carries a finished name: writers fill a temporary neighbour, sync it to disk, and rename it.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import IO, Any, Literal, cast, overload

import orjson
import psutil
import zstandard
from pydantic import BaseModel, ConfigDict, ValidationError

from tpt_megatron import __version__
from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.storage import Location, locate, sync_folder

Place = Path | Location
"""Where functions that read take a local path as well as a location."""
MANIFEST_VERSION = 1
AUGMENTED = "augmented"


def temporary_neighbour(path: Path) -> Path:
    """Return a hidden name beside `path`, of this process alone, for what is not finished yet."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_stale_neighbours(path: Path) -> None:
    """Delete what killed processes left of `path` half written, before this one begins. For an output that is made on this machine and no other."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        process = leftover.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        # In containers, where the first process has number 1, this one may have a killed one's.
        if process.isdecimal() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            shutil.rmtree(leftover, ignore_errors=True)


@overload
def open_atomic(path: Path, mode: Literal["wb"] = "wb") -> Any: ...
@overload
def open_atomic(path: Path, mode: Literal["w"]) -> Any: ...
@contextmanager
def open_atomic(path: Path, mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Open a file that takes the name `path` only when the block ends without an error. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_neighbour(path)
    try:
        with open(temporary, mode, encoding="utf-8" if mode == "w" else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically."""
    with open_atomic(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically, with a newline at the end."""
    with open_atomic(path) as file:
        file.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_json(path: Place) -> Any:
    """Read one JSON file; DataError when it is missing or is not JSON."""
    try:
        return orjson.loads(locate(path).read_bytes())
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); it was damaged or is another kind of file") from None


@contextmanager
def whole_folder(path: Path, do: Callable[[Callable[[], None]], object] = lambda call: call()) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error, and vanishes otherwise.

    Every file in it is synced before the rename. `path` must not exist (OSError otherwise), or be empty. `do` is given the call that
    syncs and renames, and may leave it to another thread.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_neighbour(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()

    is_begun = False

    def give_name() -> None:
        nonlocal is_begun
        is_begun = True
        try:
            sync_tree(temporary)
            os.rename(temporary, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        do(give_name)
    except BaseException:
        if not is_begun:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def sha256_of(path: Place) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with locate(path).open() as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


AT_ONCE = 1 << 10
"""Bytes of a zstd file that are decompressed at once."""


class _ZstdFrames(io.RawIOBase):
    """Bytes of all frames of a zstd file. The library's own reader stops after the first, and takes a cut-off one for whole."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._read = memoryview(b"")  # of the file, not yet decompressed
        self._rest = memoryview(b"")
        self._in_frame = False

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer`; EOFError when the file ends within a frame."""
        while not self._rest:
            if self._frame.eof:
                unused = self._frame.unused_data
                self._read = memoryview(unused + bytes(self._read)) if unused else self._read
                self._frame, self._in_frame = zstandard.ZstdDecompressor().decompressobj(), False
            if not self._read:
                self._read = memoryview(self._file.read(1 << 17))
            # A little at a time: what compresses very well would come out by the gigabyte.
            data, self._read = self._read[:AT_ONCE], self._read[AT_ONCE:]
            if not data:
                if self._in_frame:
                    raise EOFError("it ends within a zstd frame")
                return 0
            self._in_frame = True
            self._rest = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def is_compressed(name: str) -> bool:
    """Say whether a file of this name must be read from its beginning."""
    return name.endswith((".gz", ".zst"))


def decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    """Return the stream of a file's bytes as they were before a compression that its name tells."""
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(file), 1 << 17)
    return file


def read_lines(path: Place, progress: Callable[[int], object] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its end) of a plain, gzip or zstd file, one line in memory at a time.

    A byte-order mark before the first line is left out. `progress`, when given, hears of the file's bytes as they are
    read. Raises DataError when the file cannot be read or its compressed stream is cut off or damaged.
    """
    for number, (line, _) in enumerate(stream_lines(path, progress=progress), 1):
        yield number, line


def stream_lines(path: Place, *, offset: int = 0, longest: int | None = None, progress: Callable[[int], object] | None = None) -> Iterator[tuple[bytes, int]]:
    """Yield (line without its end, its bytes in the file) as `read_lines` reads them.

    `offset` is where to begin in a file that is not compressed. Of a line of more than `longest` bytes only the beginning
    comes, one or two bytes more than `longest`, and the rest is passed over without being held.
    """
    place, number, reported = locate(path), 0, 0
    with reading(place, lambda: number), place.open() as file:
        if offset:
            file.seek(offset)
        stream = decompressed(file, place.name)
        while line := stream.readline(-1 if longest is None else longest + 2):
            number += 1
            length = len(line)
            if longest is not None and length == longest + 2 and not line.endswith(b"\n"):
                length += _pass_over(stream)
                yield line, length
            else:
                yield line.removeprefix(codecs.BOM_UTF8 if number == 1 and not offset else b"").rstrip(b"\r\n"), length
            if progress is not None and number % 256 == 0:
                at = file.tell()
                progress(at - reported)
                reported = at


@contextmanager
def reading(place: Location, lines: Callable[[], int]) -> Iterator[None]:
    """Turn what goes wrong while a file of lines is read into a DataError that says after which line (`lines()`)."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{place}: no such file") from None
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{place}: the compressed file is damaged or cut off after line {lines()} ({error})") from None
    except OSError as error:
        raise DataError(f"{place}: cannot be read after line {lines()}: {error.strerror or error}") from None


def _pass_over(stream: IO[bytes]) -> int:
    passed = 0
    while part := stream.readline(1 << 20):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def parse_json_line(line: bytes, where: str) -> Any:
    """Parse one JSONL line. Raises RecordError (with `where`) for what is not UTF-8 or not JSON."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as bad:
            raise RecordError(where, f"not valid UTF-8 at byte {bad.start}") from None
        raise RecordError(where, f"not valid JSON: {error}") from None


class FileEntry(BaseModel):
    """One file of an output, named relative to its manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What made an output, from what, with which settings: counts and checksums prove it complete.

    `inputs` name files as they were given; `outputs` are relative to the manifest's folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    manifest_version: int = MANIFEST_VERSION
    tpt_megatron_version: str = __version__
    settings: dict[str, Any]
    inputs: tuple[FileEntry, ...]
    outputs: tuple[FileEntry, ...]
    counts: dict[str, int]
    details: dict[str, Any] = {}

    def write(self, path: Place) -> None:
        """Write the manifest atomically; it is always the last file of an output."""
        locate(path).write(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the manifest as the JSON that a file holds."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def read_manifest(path: Place, kind: str) -> Manifest:
    """Read a manifest and check that it is of `kind`; DataError when it is missing, damaged or of another kind."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("kind") != kind:
        found = value.get("kind") if isinstance(value, dict) else None
        raise DataError(f"{path}: expected a manifest of kind {kind!r}, found {found!r}")
    if value.get("manifest_version") != MANIFEST_VERSION:
        raise DataError(f"{path}: manifest version {value.get('manifest_version')} is not supported (this release reads {MANIFEST_VERSION})")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{path}: a damaged manifest ({error.error_count()} field(s) missing or wrong); make what it describes again") from None


def describe_file(path: Place, name: str | None = None) -> FileEntry:
    """Return name, size and SHA-256 of a file; DataError when it is missing."""
    place = locate(path)
    if not place.is_file():
        raise DataError(f"{place}: no such file")
    return FileEntry(name=name or place.name, bytes=place.size(), sha256=sha256_of(place))


def check_outputs(manifest: Manifest, folder: Place, *, checksums: bool) -> None:
    """Check that a manifest's outputs are there with the right size, and with `checksums` the right bytes (DataError).

    Sizes are read off listings: one a folder, however many files.
    """
    place = locate(folder)
    listed: dict[str, dict[str, int]] = {}
    for entry in manifest.outputs:
        parent, _, name = entry.name.rpartition("/")
        if parent not in listed:
            listed[parent] = (place / parent if parent else place).sizes()
        size = listed[parent].get(name)
        path = place / entry.name
        if size is None:
            raise DataError(f"{path}: named in the manifest but missing")
        if size != entry.bytes:
            raise DataError(f"{path}: {size} bytes, the manifest says {entry.bytes}; make it again")
        if checksums and sha256_of(path) != entry.sha256:
            raise DataError(f"{path}: its SHA-256 is not the manifest's; the file was changed or damaged, make it again")
