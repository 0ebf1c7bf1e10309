"""A folder's disk: space, speed, and what checkpoints and claims ask of its file system.

Checkpoints are renamed when they are whole, shards of `tpt augment` are claimed by creating a link that only one can create, and a run keeps
others out of its folder by a lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tpt_megatron.doctor.findings import Finding, in_bytes, ok, problem, warning

CHUNK = 8_000_000
MOST_BYTES = 256_000_000
MOST_SECONDS = 3.0
"""For writing, and again for reading."""
LITTLE_SPACE, NO_SPACE = 50_000_000_000, 1_000_000_000
SLOW_BYTES_A_SECOND = 50_000_000
CLOCKS_APART_S = 5.0
REPLACEMENTS = 200


def disk_findings(path: Path, quick: bool) -> list[Finding]:
    """Return what is found about the disk of a folder; the folder is left as it was. quick: no speeds."""
    try:
        is_there = path.is_dir()
    except OSError as error:  # above it, a folder that this user may not look into
        return [problem("disk", f"{path}: {error.strerror or error}", "give this user the right to look there, or another --path")]
    if path.exists() and not is_there:
        return [problem("disk", f"{path}: not a folder", "give --path the folder that runs and data are to be in")]
    if not is_there and ":" in path.parts[0]:
        return [problem("disk", f"{path}: an address, and not a folder of this machine", "give --path a folder of this machine's")]
    if not is_there:
        return [problem("disk", f"{path}: no such folder", f"mkdir -p {path}, or give another --path")]
    kind = _file_system(path)
    findings = [_space(path, kind)]
    try:
        with tempfile.TemporaryDirectory(prefix=".tpt-doctor-", dir=path) as made:
            folder = Path(made)
            findings += [_clock(folder, path), _renames(folder), _links(folder), _locks(folder)]
            if not quick:
                findings += _speeds(folder, path)
    except OSError as error:
        full, read_only = error.errno in (errno.ENOSPC, errno.EDQUOT), error.errno == errno.EROFS
        do = "make room there" if full else "mount it so that it can be written to" if read_only else "give this user the right to write there"
        findings.append(problem("disk", f"{path}: {error.strerror or error}", f"{do}, or give another --path"))
    return findings


def _space(path: Path, kind: str) -> Finding:
    status = os.statvfs(path)
    free, size = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    found = f"{in_bytes(free)} free of {in_bytes(size)} at {path.absolute()}{kind}"
    if status.f_files and status.f_favail < 1000:
        return problem("disk", f"{found}, and room for {status.f_favail} more files only", "remove small files there, or give another --path")
    if free < NO_SPACE:
        return problem("disk", found, "make room there, or give another --path")
    if free < LITTLE_SPACE:
        return warning("disk", found, "make room: `tpt plan` says what a run's checkpoints take")
    return ok("disk", found)


def _file_system(path: Path) -> str:
    place = os.path.realpath(path)
    mounted = [disk for disk in psutil.disk_partitions(all=True) if place == disk.mountpoint or place.startswith(disk.mountpoint.rstrip("/") + "/")]
    return f" ({max(mounted, key=lambda disk: len(disk.mountpoint)).fstype})" if mounted else ""


def _clock(folder: Path, path: Path) -> Finding:
    before = time.time()
    (folder / "clock").write_bytes(b"")
    stamped, after = (folder / "clock").stat().st_mtime, time.time()
    apart = stamped - after if stamped > after else stamped - before if stamped < before else 0.0
    if abs(apart) > CLOCKS_APART_S:
        how = f"{abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} this machine's clock"
        return warning("disk clock", f"{path} stamps files {how}", "set both clocks by NTP: timedatectl set-ntp true")
    return ok("disk clock", "files are stamped with this machine's time")


def _renames(folder: Path) -> Finding:
    """Replace a file again and again under a reader, which must find the old one or the new one, whole, each time."""
    name, failures, done = folder / "replaced", [], threading.Event()
    name.write_bytes(b"0" * 1000)

    def read() -> None:
        while not done.is_set():
            try:
                data = name.read_bytes()
            except OSError as error:
                failures.append(error.strerror or str(error))
                return
            if len(data) != 1000 or len(set(data)) != 1:
                failures.append("a reader found half a file")
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(REPLACEMENTS):
            (folder / "new").write_bytes(b"%d" % (number % 10) * 1000)
            os.replace(folder / "new", name)
    finally:
        done.set()
        reader.join()
    (folder / "whole.tmp").mkdir()
    os.rename(folder / "whole.tmp", folder / "whole")
    if failures:
        return problem("atomic rename", f"not here: {failures[0]}", "give run_dir and output on another file system; object storage is for checkpoint.mirror")
    return ok("atomic rename", f"{REPLACEMENTS} files replaced under a reader, and a folder renamed")


def _links(folder: Path) -> Finding:
    do = "give the output of tpt augment and run_dir on another file system"
    (folder / "claim").write_bytes(b"")
    try:
        os.link(folder / "claim", folder / "taken")
    except OSError as error:
        return problem("hard links", f"not here ({error.strerror}), and claims of tpt augment are made by them", do)
    try:
        os.link(folder / "claim", folder / "taken")
    except FileExistsError:
        return ok("hard links", "a name that is taken cannot be claimed again")
    return problem("hard links", "a name that is taken can be claimed again", do)


TRY_LOCK = "import fcntl, sys\ntry: fcntl.flock(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: sys.exit(9)"


def _locks(folder: Path) -> Finding:
    do = "see to it yourself that no two runs share a run_dir there, or mount it with locks (NFS: version 4, or without nolock; Lustre: flock)"
    with open(folder / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return warning("file locks", f"not here ({error.strerror}): a second run in one run_dir is not noticed", do)
        try:
            other = subprocess.run([sys.executable, "-I", "-S", "-c", TRY_LOCK, str(folder / "lock")], capture_output=True, timeout=30)
        except subprocess.TimeoutExpired:
            return warning("file locks", "asking for a lock has no answer in 30 s", do)
    if other.returncode == 9:
        return ok("file locks", "another process finds what is locked to be so")
    return warning("file locks", "another process can lock what is locked: a second run in one run_dir is not noticed", do)


def _speeds(folder: Path, path: Path) -> list[Finding]:
    status = os.statvfs(folder)
    limit = min(MOST_BYTES, status.f_bavail * status.f_frsize // 4) // CHUNK * CHUNK
    if not limit:
        return []  # said above: there is no room
    data = os.urandom(CHUNK)
    with open(folder / "speed", "w+b", buffering=0) as file:

        def write() -> int:
            written = file.write(data)
            os.fsync(file.fileno())
            return written

        size, seconds = _bounded(write, limit)
        written = size / seconds
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        wrong: list[int] = []

        def read() -> int:
            place, found = file.tell(), file.read(CHUNK)
            if found != data[: len(found)]:
                wrong.append(place)
            return len(found)

        got, seconds = _bounded(read, size)
    if wrong or not got:
        return [problem("disk speed", f"{path}: what was read is not what was written", "do not use this disk; look at the kernel's log: dmesg | tail")]
    found = f"{in_bytes(written)}/s written with fsync, {in_bytes(got / seconds)}/s read ({in_bytes(size)})"
    if min(written, got / seconds) < SLOW_BYTES_A_SECOND:
        return [warning("disk speed", found, "put runs on a faster disk, or save less often (checkpoint.every_steps) and with checkpoint.asynchronous=true")]
    return [ok("disk speed", found)]


def _bounded(step: Callable[[], int], limit: int) -> tuple[int, float]:
    """Call `step` until it has moved so many bytes, moves none, or the time is over; return bytes and seconds."""
    moved, began = 0, time.perf_counter()
    while moved < limit and (count := step()):
        moved += count
        if time.perf_counter() - began > MOST_SECONDS:
            break
    return moved, max(time.perf_counter() - began, 1e-9)
