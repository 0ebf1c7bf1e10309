"""Files on their way between stages: atomic writes, compressed lines, checksums, manifests.

Nothing half-written carries a finished name: writers fill a temporary neighbour, sync it to disk, and rename it.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, cast, overload

import orjson
import zstandard
from pydantic import BaseModel, ConfigDict, ValidationError

from tpt_megatron import __version__
from tpt_megatron.errors import ConfigError, DataError, RecordError

MANIFEST_VERSION = 1
AUGMENTED = "augmented"


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_neighbour(path: Path) -> Path:
    """Return a hidden name beside `path`, of this process alone, for what is not finished yet."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that no longer run left under temporary names in `folder`."""
    for path in folder.glob(".*.tmp"):
        process = path.suffixes[-2].removeprefix(".") if len(path.suffixes) > 1 else ""
        if process.isdigit() and not _is_running(int(process)):
            path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it runs, as another user's
    return True


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


def read_json(path: Path) -> Any:
    """Read one JSON file; DataError when it is missing or is not JSON."""
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); it was damaged or is another kind of file") from None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error, and vanishes otherwise.

    Every file in it is synced before the rename. `path` must not exist (OSError otherwise), or be empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_neighbour(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        os.rename(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand_inputs(patterns: tuple[str, ...]) -> list[Path]:
    """Return the files that names, folders and globs stand for, each once, in sorted order within a pattern.

    A folder stands for the record files in it; an output folder of `tpt augment` stands for its shards, whose sizes are
    checked. Raises DataError when a pattern matches nothing, or when such an output is incomplete.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        base = Path(pattern)
        if base.is_dir():
            matches = _augmented_shards(base) or sorted(path for path in base.iterdir() if path.is_file() and is_record_file(path))
        else:
            matches = [base] if base.exists() else sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        for path in matches:
            if path.suffix == ".parquet":
                raise DataError(f"{path}: Parquet input is not supported yet; write it as .jsonl, .jsonl.gz or .jsonl.zst")
        if not matches:
            raise DataError(f"{pattern}: no input file matches; give a .jsonl, .jsonl.gz or .jsonl.zst file, a folder of them, or a glob")
        found.update(dict.fromkeys(matches))
    return list(found)


def refuse_inputs_in_output(patterns: tuple[str, ...], output: Path) -> None:
    """Raise ConfigError when a stage would read what it writes: on the next run its output would be its input."""
    for pattern in patterns:
        if output.resolve() in (Path(pattern).resolve(), *Path(pattern).resolve().parents):
            raise ConfigError(f"input={pattern} lies in output={output}; give an output folder apart from the input")


def _augmented_shards(folder: Path) -> list[Path]:
    """Return the shards of an augment output; none where the folder is something else."""
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        if (folder / "shards").is_dir():
            raise DataError(f"{folder}: an unfinished output of tpt augment (shards without manifest.json); run it again, it goes on where it stopped")
        return []
    value = read_json(manifest_path)
    if not isinstance(value, dict) or value.get("kind") != AUGMENTED:
        return []
    manifest = read_manifest(manifest_path, AUGMENTED)
    check_outputs(manifest, folder, checksums=False)
    return [folder / entry.name for entry in manifest.outputs if entry.name.startswith("shards/")]


def is_record_file(path: Path) -> bool:
    """Say whether a file's name is one of a record file that `read_lines` understands."""
    return path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")) and not path.name.startswith(".")


class _ZstdFrames(io.RawIOBase):
    """Bytes of all frames of a zstd file. The library's own reader stops after the first, and takes a cut-off one for whole."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._rest = b""
        self._in_frame = False

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer`; EOFError when the file ends within a frame."""
        while not self._rest:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._in_frame = zstandard.ZstdDecompressor().decompressobj(), False
            data = data or self._file.read(1 << 17)
            if not data:
                if self._in_frame:
                    raise EOFError("it ends within a zstd frame")
                return 0
            self._in_frame = True
            self._rest = self._frame.decompress(data)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _decompressed(file: IO[bytes], path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFrames(file), 1 << 17)
    return file


def read_lines(path: Path, progress: Callable[[int], object] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its end) of a plain, gzip or zstd file, one line in memory at a time.

    A byte-order mark before the first line is left out. `progress`, when given, hears of the file's bytes as they are
    read. Raises DataError when the file cannot be read or its compressed stream is cut off or damaged.
    """
    number = reported = 0
    try:
        with open(path, "rb") as file:
            for line in _decompressed(file, path):
                number += 1
                yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").rstrip(b"\r\n")
                if progress is not None and number % 256 == 0:
                    at = os.lseek(file.fileno(), 0, os.SEEK_CUR)
                    progress(at - reported)
                    reported = at
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut off after line {number} ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read after line {number}: {error.strerror or error}") from None


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

    def write(self, path: Path) -> None:
        """Write the manifest atomically; it is always the last file of an output."""
        write_json(path, self.model_dump(mode="json"))


def read_manifest(path: Path, kind: str) -> Manifest:
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


def describe_file(path: Path, name: str | None = None) -> FileEntry:
    """Return name, size and SHA-256 of a file; DataError when it is missing."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return FileEntry(name=name or path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


def check_outputs(manifest: Manifest, folder: Path, *, checksums: bool) -> None:
    """Check that a manifest's outputs are there with the right size, and with `checksums` the right bytes (DataError)."""
    for entry in manifest.outputs:
        path = folder / entry.name
        if not path.is_file():
            raise DataError(f"{path}: named in the manifest but missing")
        if path.stat().st_size != entry.bytes:
            raise DataError(f"{path}: {path.stat().st_size} bytes, the manifest says {entry.bytes}; make it again")
        if checksums and sha256_of(path) != entry.sha256:
            raise DataError(f"{path}: its SHA-256 is not the manifest's; the file was changed or damaged, make it again")
