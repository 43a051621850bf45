"""The console: what is going on and for how long, and one line where a run can't go on.

In come errors, the folders of a run and what it keeps. Out come lines for a person to read.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from lab.machine.device import Hardware
from lab.machine.options import PROGRAM, UserError, option_of

WIDTH = 80  # letters in a line


def prepare() -> None:
    """Show progress in a log file at once; end at SIGTERM as at Ctrl-C.

    SIGTERM is how torchrun stops the other ranks when one dies.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook
            # What a console can't show (a folder's name) is shown by its number.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    # Elsewhere (as under Gradio, Streamlit or Ray) signals are the main thread's own business.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def end_unread() -> NoReturn:
    """End where no one reads the output any more; Python would say so once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def on_terminal() -> bool:
    """Whether progress bars are for a person's eyes, and not for a log file's."""
    return sys.stderr.isatty()


def say(line: str) -> None:
    """Print a line, above whatever progress bar is shown; on a terminal a long one as several."""
    tqdm.write("\n".join(wrapped(line)) if on_terminal() else line)


def wrapped(line: str, first: str = "", others: str = "  ") -> list[str]:
    """The line in parts that fit a terminal, after what the first and the others begin with."""
    return textwrap.wrap(
        line,
        WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


class Stopwatch:
    """The seconds that each phase of a run takes; says when one begins and when it ends."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        self.say(f"{name} begins")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.say(f"{name} took {self.seconds[name]:.1f} s")

    def say(self, line: str) -> None:
        """Print a line, unless silent: of several ranks one speaks."""
        if not self.silent:
            say(line)


class Parts:
    """The parts of a run: one that fails does not keep those after it from being done."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.errors: dict[str, Exception] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done inside; an error is said, and kept for the run's end."""
        try:
            with self.watch.phase(name):
                yield
        except Exception as error:
            self.errors[name] = error
            say(f"{name} failed, and the rest goes on: {describe_error(error)}")

    def failed(self) -> dict[str, str]:
        """What went wrong, by part."""
        return {name: describe_error(error) for name, error in self.errors.items()}

    def raise_first(self) -> None:
        """End as the first error would have ended it, if there was one."""
        for error in self.errors.values():
            raise error


def describe_error(error: Exception) -> str:
    """In one line; of an error that is the program's own, with its kind."""
    said = " ".join(str(error).split())
    return said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"


@contextmanager
def one_line_errors(
    hardware: Hardware, folders: Mapping[str, Path], interrupted: str
) -> Iterator[None]:
    """End in one line, with exit status 1, where a person can mend what went wrong.

    `folders` are those of the run, by the setting that names them; `interrupted` is said after
    Ctrl-C. Of several ranks, one says it.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        farewell = say_why(error, hardware, folders, interrupted)
        if farewell is None:
            raise
        if not hardware.ranks.is_first_to("say why the run ends"):
            sys.exit(1)
        sys.exit(f"{PROGRAM}: {farewell}")


def say_why(
    error: BaseException, hardware: Hardware, folders: Mapping[str, Path], interrupted: str
) -> str | None:
    """What a person is told of an error; None where it is the program's own."""
    if isinstance(error, KeyboardInterrupt):
        return interrupted
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return say_refused_by_system(error, folders)
    if is_lack_of_memory(error):
        return (
            f"the memory of {hardware.description} is full: lower --eval-batch or the number of "
            "images; or, with --retrain, --batch-size or --widths"
        )
    return None


def say_refused_by_system(error: OSError, folders: Mapping[str, Path]) -> str:
    """What the system would not do, where, and what can be done."""
    if not isinstance(error.filename, str):  # not of a file
        return str(error)
    cure = "mend that"
    where = Path(error.filename).absolute()
    for setting, folder in folders.items():
        place = folder.absolute()
        if where.is_relative_to(place) or place.is_relative_to(where):
            cure += f", or choose another {option_of(setting)}"
            break
    return f"{error.filename} can't be used ({error.strerror}): {cure}"


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, as NumPy, PyTorch and CUDA's libraries say it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    signs = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)
