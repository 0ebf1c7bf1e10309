"""Places for files, local or remote: `Location` is a path that does not care where it lies.

Local paths go through the operating system, so that writes are synced and renamed; everything else goes through fsspec
(`s3://`, `gs://`, `hf://`, `memory://`, ...), where one object is written whole or not at all. Two promises hold in both:
`write` never shows half of a file under its name, and `create` succeeds for exactly one of several that try.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from tpt_megatron.errors import ConfigError, DataError, MachineError, TptError


class Location(ABC):
    """A file or a folder. `str()` gives it as people write it."""

    @abstractmethod
    def __truediv__(self, name: str) -> Location:
        """Return what lies at `name` (which may have slashes) below this folder."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Last part of the path."""

    @abstractmethod
    def is_file(self) -> bool:
        """Say whether it is there, as a file."""

    @abstractmethod
    def is_dir(self) -> bool:
        """Say whether it is there, as a folder."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the names directly below this folder, sorted, with their sizes in bytes, in one listing; none where there is no folder."""

    def names(self) -> list[str]:
        """Return the names directly below this folder, sorted; none where there is no folder."""
        return list(self.sizes())

    @abstractmethod
    def glob(self) -> list[Location]:
        """Return the files that this path, read as a glob, stands for, sorted."""

    @abstractmethod
    def size(self) -> int:
        """Return the file's size in bytes."""

    @abstractmethod
    def stamp(self) -> str:
        """Return a text that changes when the file is written anew: size and time, or the store's own tag."""

    @abstractmethod
    def open(self) -> IO[bytes]:
        """Open the file for reading, seekable."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Write the whole file, over any that is there."""

    @abstractmethod
    def create(self, data: bytes) -> bool:
        """Write the whole file unless one is there; say whether this call wrote it.

        Of several at once that write different bytes one wins; of those that write the same bytes each may be told it did.
        """

    @abstractmethod
    def remove(self) -> None:
        """Remove the file, or the folder with all in it; nothing happens where there is none."""

    @abstractmethod
    def upload(self, path: Path) -> None:
        """Write the whole file, over any that is there, from one of this machine, of any size. Only a part of it is in memory at a time."""

    @abstractmethod
    def download(self, path: Path) -> None:
        """Copy the file to this machine, of any size. `path` is there before it is whole: for a folder that has no finished name yet."""

    def remove_unfinished_uploads(self) -> None:  # noqa: B027 - most stores keep nothing of them
        """Remove what killed uploads left below this folder where no listing shows it. For when no other writer is at work there."""

    def resolved(self) -> str:
        """Return one name for it, however it was given."""
        return str(self)

    @abstractmethod
    def contains(self, other: Location) -> bool:
        """Say whether `other` is this folder or lies somewhere below it."""

    @abstractmethod
    def __str__(self) -> str: ...

    def read_bytes(self) -> bytes:
        """Return the file's content; DataError when it is missing."""
        try:
            with self.open() as file:
                return file.read()
        except FileNotFoundError:
            raise DataError(f"{self}: no such file") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


class LocalLocation(Location):
    """A path of this machine's file systems."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> LocalLocation:
        return LocalLocation(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.name

    def is_file(self) -> bool:
        """Say whether it is there, as a file."""
        return self.path.is_file()

    def is_dir(self) -> bool:
        """Say whether it is there, as a folder."""
        return self.path.is_dir()

    def sizes(self) -> dict[str, int]:
        """Return the names directly below this folder with their sizes, without unfinished files."""
        found = {}
        if self.path.is_dir():
            with os.scandir(self.path) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # another worker removed it meanwhile
                        if not _is_temporary(entry.name):
                            found[entry.name] = entry.stat().st_size
        return dict(sorted(found.items()))

    def glob(self) -> list[Location]:
        """Return the files that this path, read as a glob, stands for."""
        anchor = Path(self.path.anchor or ".")
        pattern = str(self.path.relative_to(self.path.anchor)) if self.path.anchor else str(self.path)
        return [LocalLocation(path) for path in sorted(anchor.glob(pattern)) if path.is_file()]

    def size(self) -> int:
        """Return the file's size in bytes."""
        return self.path.stat().st_size

    def stamp(self) -> str:
        """Return size and time of the last change."""
        status = self.path.stat()
        return f"{status.st_size}-{status.st_mtime_ns}"

    def open(self) -> IO[bytes]:
        """Open the file for reading."""
        return open(self.path, "rb")

    def write(self, data: bytes) -> None:
        """Write the file beside its place, sync it, and rename it."""
        temporary = self._unfinished(data)
        try:
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self.path.parent)

    def create(self, data: bytes) -> bool:
        """Write the file beside its place, sync it, and link it, which fails where the name is taken."""
        if self.path.exists():
            return False
        temporary = self._unfinished(data)
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            # A network file system may have linked it, lost its answer, and tried once more.
            if not os.path.samefile(temporary, self.path):
                return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self.path.parent)
        return True

    def remove(self) -> None:
        """Remove the file, or the folder with all in it."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)  # another worker may be removing it too
        else:
            self.path.unlink(missing_ok=True)

    def upload(self, path: Path) -> None:
        """Copy the file beside its place, sync it, and rename it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.name}.{uuid.uuid4().hex}.tmp")
        try:
            shutil.copyfile(path, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self.path.parent)

    def download(self, path: Path) -> None:
        """Copy the file."""
        shutil.copyfile(self.path, path)

    def resolved(self) -> str:
        """Return its absolute path, links followed."""
        return str(self.path.resolve())

    def contains(self, other: Location) -> bool:
        """Say whether `other` is this folder or lies somewhere below it, links followed."""
        return isinstance(other, LocalLocation) and self.path.resolve() in (other.path.resolve(), *other.path.resolve().parents)

    def _unfinished(self, data: bytes) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


class RemoteLocation(Location):
    """A path of a store that fsspec speaks to. Listings are never taken from a cache: other workers write too."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path.rstrip("/")

    def __truediv__(self, name: str) -> RemoteLocation:
        return RemoteLocation(self._fs, f"{self._path}/{name}")

    def __str__(self) -> str:
        return str(self._fs.unstrip_protocol(self._path))

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self._path.rsplit("/", 1)[-1]

    def is_file(self) -> bool:
        """Say whether it is there, as an object."""
        self._fs.invalidate_cache()
        return bool(self._fs.isfile(self._path))

    def is_dir(self) -> bool:
        """Say whether any object lies below it."""
        self._fs.invalidate_cache()
        return bool(self._fs.isdir(self._path))

    def sizes(self) -> dict[str, int]:
        """Return the names directly below with their sizes."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        named = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in found}
        return {name: named[name] for name in sorted(named) if name}

    def glob(self) -> list[Location]:
        """Return the objects that this path, read as a glob, stands for."""
        self._fs.invalidate_cache()
        return [RemoteLocation(self._fs, path) for path in sorted(self._fs.glob(self._path)) if self._fs.isfile(path)]

    def size(self) -> int:
        """Return the object's size in bytes."""
        return int(self._fs.size(self._path))

    def stamp(self) -> str:
        """Return the store's tag of the object, or its size and time."""
        self._fs.invalidate_cache()
        info = self._fs.info(self._path)
        tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("LastModified") or info.get("created")
        return f"{info['size']}-{tag}"

    def open(self) -> IO[bytes]:
        """Open the object for reading, through fsspec's read-ahead. Its files cannot read a line up to a limit; Python's can."""
        return io.BufferedReader(cast(io.RawIOBase, self._fs.open(self._path, "rb")), 1 << 17)

    def read_bytes(self) -> bytes:
        """Return the object's content in one request; DataError when it is missing."""
        try:
            return bytes(self._fs.cat_file(self._path))
        except FileNotFoundError:
            raise DataError(f"{self}: no such file") from None

    def write(self, data: bytes) -> None:
        """Put the object; stores show an object when all of it has come."""
        self._fs.pipe_file(self._path, data)

    def create(self, data: bytes) -> bool:
        """Put the object on condition that none is there (on S3 the request header If-None-Match)."""
        try:
            self._fs.pipe_file(self._path, data, mode="create")
        except OSError as error:
            refusals = ("PreconditionFailed", "ConditionalRequestConflict", "pre-conditions")
            if not isinstance(error, FileExistsError) and not any(refusal in str(error) for refusal in refusals):
                raise
            # The client library may have put it, lost the answer, and tried once more: then it is ours.
            return self.read_bytes() == data
        return True

    def remove(self) -> None:
        """Remove the object, or all that lies below."""
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):  # another worker may be removing it too
            if self._fs.exists(self._path):
                self._fs.rm(self._path, recursive=True)

    def upload(self, path: Path) -> None:
        """Put the object, a large one in parts; stores show it when all of it has come."""
        self._fs.put_file(str(path), self._path)

    def download(self, path: Path) -> None:
        """Get the object, a block at a time."""
        self._fs.get_file(self._path, str(path))

    def remove_unfinished_uploads(self) -> None:
        """On S3, have the parts of objects that were never completed removed: they are paid for."""
        if "s3" not in self._fs.protocol:
            return
        bucket, _, key = self._path.partition("/")
        listed = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/" if key else "")
        for upload in listed.get("Uploads", []):
            self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def contains(self, other: Location) -> bool:
        """Say whether `other` is this folder or lies somewhere below it."""
        return f"{other}/".startswith(f"{self}/")


def locate(place: str | Path | Location) -> Location:
    """Return the location that a path or a URL names.

    Raises ConfigError for a protocol that fsspec does not know, and MachineError when its package is not installed.
    """
    if isinstance(place, Location):
        return place
    text = str(place)
    if "://" not in text:
        return LocalLocation(Path(text))
    protocol = text.split("://", 1)[0]
    if protocol in ("file", "local"):
        return LocalLocation(Path(text.split("://", 1)[1]))
    import fsspec  # here, since most runs are local and it takes a while to load

    try:
        fs, path = fsspec.core.url_to_fs(text)
    except ImportError as error:
        raise MachineError(f"{text}: {protocol}:// needs a package that is not installed ({error})") from None
    except ValueError as error:
        raise ConfigError(f"{text}: {error}; give a local path, or a URL such as s3://bucket/folder") from None
    return RemoteLocation(fs, path)


def explain(error: Exception) -> str | None:
    """Return one line for an error that a person can act on: our own, the system's, a store's. None for a bug, whose traceback tells."""
    if isinstance(error, OSError) and error.strerror is not None:  # no permission, no space, a file where a folder should be
        return f"{error.filename or 'a file'}: {error.strerror}"
    botocore = sys.modules.get("botocore.exceptions")  # loaded where s3:// was used
    if isinstance(error, (TptError, OSError)) or (botocore is not None and isinstance(error, botocore.BotoCoreError)):
        return " ".join(str(error).split())
    return None


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def remove_unfinished(folder: Location) -> None:
    """Remove what killed writers left in a local folder. For when no writer is at work any more."""
    if isinstance(folder, LocalLocation) and folder.path.is_dir():
        for path in folder.path.iterdir():
            if _is_temporary(path.name):
                path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
