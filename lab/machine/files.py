"""Files written whole or not at all, locks, and the list of a run's results.

In come paths and what is to lie there. Nothing else ever sees half a file; what a person can mend
is a `UserError`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from lab.machine.options import UserError

if sys.platform != "win32":
    import fcntl

PATIENCE = 2.0  # seconds: for how long a virus scanner may hold a file

CURE = "delete it, pass --retrain to train again, or choose another --output-dir"


def write_file(path: Path, content: bytes | str) -> None:
    """Write to a temporary file beside `path`, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with name_in_errors(path), temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Let the system's errors say where they arose: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def move(source: Path, target: Path) -> None:
    """Rename, in place of any old `target`.

    On Windows that fails while a reader or a virus scanner has the old one open: it is tried again
    for a moment.
    """
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Delete what processes that are gone left of `write_file`; for who may write there alone."""
    for temporary in folder.glob(f".{name}.*.tmp"):
        writer = temporary.name.split(".")[-2]
        if writer.isdecimal() and not is_another_process(int(writer)):
            temporary.unlink(missing_ok=True)


def is_another_process(number: int) -> bool:
    """Whether a process of this number runs here, other than this one."""
    if number == os.getpid() or sys.platform == "win32":  # where to ask would be to end it
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, and is someone else's
        return True
    return True


@contextmanager
def hold_lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold a lock; Timeout where another process has it for `timeout` seconds, -1 for ever.

    The system lets go of it when this process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_without_locks(path.parent)
    with FileLock(path).acquire(timeout, poll_interval=0.2):
        yield


def refuse_without_locks(folder: Path) -> None:
    """UserError where the file system has no locks, as those of clusters may be mounted.

    What FileLock does there depends on its version: it waits for ever, or makes a lock that a
    killed process leaves behind.
    """
    if sys.platform == "win32":
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"the file system of {folder} has no locks ({error.strerror}), without which two "
                "runs could spoil each other's files: choose a folder on another disk"
            ) from error


def as_csv(rows: Iterable[Sequence[str]]) -> str:
    """Rows of a table as a file's text, the headings first."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def as_json(content: object) -> str:
    """`content` may hold arrays, which become lists. ValueError for NaN, which JSON has not."""
    return json.dumps(content, indent=2, default=np.ndarray.tolist, allow_nan=False) + "\n"


def as_tensors(content: dict[str, Any]) -> bytes:
    """What torch.save makes, and its SHA-256 behind it, which torch.load passes over."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    saved = buffer.getvalue()
    return saved + hashlib.sha256(saved).digest()


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """A file of `as_tensors`."""
    write_file(path, as_tensors(content))


def read_tensors(path: Path) -> dict[str, Any]:
    """What `write_tensors` wrote. Raises UserError for any other or damaged file; runs no code."""
    raw = path.read_bytes()
    saved = raw[:-32]
    digest = raw[-32:]
    try:
        if hashlib.sha256(saved).digest() != digest:
            raise pickle.UnpicklingError
        return torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        problem = f"{path} is damaged, or not a file of this program"
        raise UserError(f"{problem}: {CURE}") from error


def read_array(path: Path, cure: str) -> np.ndarray:
    """An array that another program wrote with np.save; it stays on the disk until it is used.

    UserError, with the cure, for anything else: also several arrays zipped, and a pickle, which is
    not loaded.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is no array: {cure}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds several arrays: {cure}")
    return array


class ResultFiles:
    """The files of a run's results, each written whole or not at all.

    One that can't be written does not keep the others from it. Those that an earlier run left in
    the folder, and this one did not make, are deleted by `finish`.
    """

    list_name = "results/files.json"  # the list of all that may be there

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listed = self.read_list()
        self.written: set[str] = set()
        self.problems: dict[str, str] = {}

    def read_list(self) -> set[str]:
        try:
            return set(json.loads((self.folder / self.list_name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none yet, or not by this program
            return set()

    def write(self, name: str, content: bytes | str) -> None:
        """`name` is the file's path in the folder, with forward slashes."""
        self.written.add(name)
        if name not in self.listed:  # listed first, so that a killed run's files are known
            self.listed.add(name)
            self.try_to_write(self.list_name, as_json(sorted(self.listed)))
        self.try_to_write(name, content)

    def try_to_write(self, name: str, content: bytes | str) -> None:
        try:
            write_file(self.folder / name, content)
        except OSError as error:
            self.problems[name] = str(error.strerror)

    def is_among_results(self, path: Path) -> bool:
        """Whether it lies where results do, whatever a damaged list says."""
        folders = [self.folder / name for name in ("results", "plots", "gradcam")]
        return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)

    def finish(self) -> None:
        """UserError where a file could not be written or deleted."""
        for name in sorted(self.listed - self.written):
            path = self.folder / name
            try:
                if self.is_among_results(path):
                    path.unlink(missing_ok=True)
                self.listed.remove(name)
            except OSError as error:
                self.problems[name] = str(error.strerror)
        self.try_to_write(self.list_name, as_json(sorted(self.listed)))
        if self.problems:
            problems = [f"{name} ({problem})" for name, problem in self.problems.items()]
            raise UserError(
                f"could not write to {self.folder}: {', '.join(problems)}: mend that and run again "
                "(weights are kept)"
            )


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a folder of results; UserError where another run does.

    What killed runs left half written there is deleted.
    """
    holder = folder / ".held_by"
    with ExitStack() as held:
        try:
            held.enter_context(hold_lock(folder / ".lock", timeout=0))
        except Timeout as error:
            who = "another process"
            if holder.exists():
                who = holder.read_text(encoding="utf-8")
            cure = "wait for it, or choose another --output-dir"
            raise UserError(f"{folder} is in use by {who}: {cure}") from error
        for own in (folder, folder / "results", folder / "plots", *folder.glob("gradcam/*")):
            remove_unfinished(own)
        write_file(holder, f"process {os.getpid()} on {platform.node()}")
        yield
