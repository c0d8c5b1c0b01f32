"""Writes files whole: at every instant a path has its old or its new content. And locks what several runs share."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from .errors import SaveError, UserError, first_line

PARTIAL = ".partial-"  # before the name of a folder or file that is being written, or removed


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`, this writer's alone, which takes its place at the end: on the disk, at once, or not at all.

    Raises SaveError for what a writer says of a full or failing disk; nothing of the attempt stays.
    """
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")
    try:
        yield partial
        to_disk(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # the latter two: how their writers report a full disk
        raise SaveError(f"could not write {path}: {reason(error, path)}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


CHECKSUMS = "checksums.txt"  # in a folder: a line "crc32  name" for every file, and one for the lines before it


def crc32_of(path: Path) -> str:
    """About 1.5 GB/s of one core (blake2b 0.4, SHA-256 0.7), and other threads go on: it tells damage, not forgery."""
    found, buffer = 0, memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found = zlib.crc32(buffer[:size], found)
    return f"{found:08x}"


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Of all files in it. known: those that another process has computed."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = "".join(f"{known.get(name) or crc32_of(folder / name)}  {name}\n" for name in names)
    (folder / CHECKSUMS).write_text(f"{lines}{zlib.crc32(lines.encode()):08x}  {CHECKSUMS}\n", encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, str]:
    """Name -> crc32; empty where there are none. Raises UserError for a damaged list."""
    try:
        *lines, own = (folder / CHECKSUMS).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    except ValueError:
        lines, own = [], b""
    if own != f"{zlib.crc32(b''.join(lines)):08x}  {CHECKSUMS}\n".encode():
        raise UserError(f"{folder / CHECKSUMS}: is damaged")
    pairs = (line.decode().rstrip("\n").split("  ", 1) for line in lines)
    return {name: crc for crc, name in pairs}


def to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: Exception, path: Path) -> str:
    """Why writing `path` failed, with the space that is left there."""
    free = shutil.disk_usage(_existing(path)).free
    return f"{getattr(error, 'strerror', None) or first_line(error)} ({free / 2**20:,.0f} MiB free on that disk)"


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


class FileLock:
    """A file that one process at a time holds; the system takes it back on any death of its holder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: IO[str] | None = None
        self.impossible = ""  # why there is no lock to be had: NFS without its lock service, Lustre without flock

    def take(self) -> str:
        """Who holds it, or "": then it is this process, if it is possible at all. Does not wait."""
        import fcntl

        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = self.path.open("a+")
            except OSError as error:
                raise SaveError(f"could not write {self.path}: {reason(error, self.path)}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                with file:
                    return file.read() or "another process"
            except OSError as error:
                file.close()
                self.impossible = str(error.strerror)
                return ""
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    break
            file.close()  # removed by the one that held it, between the two calls
        self.held = file
        with suppress(OSError):  # a full disk: it is held all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        return ""

    def release(self) -> None:
        if self.held is not None:
            self.path.unlink(missing_ok=True)
            with suppress(OSError):
                self.held.close()
            self.held = None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a `FileLock`, and waits for who holds it; without one where there is none to be had."""
    lock = FileLock(path)
    while lock.take():
        time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


def remove_partials(path: Path) -> None:
    """What killed writers of `path` left; for one who holds the lock that they have to hold."""
    for partial in path.parent.glob(f"{PARTIAL}*-{glob.escape(path.name)}"):
        partial.unlink(missing_ok=True)
