"""Archives from the network: fetched from one of several mirrors, resumed, and whole or not at all.

In come an archive's facts and where it is to lie. Out comes the file with the right hash, or a
`UserError` that says what each mirror answered.
"""

from __future__ import annotations

import hashlib
import time
import urllib.parse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import requests
from tqdm import tqdm

from lab.machine.console import on_terminal
from lab.machine.files import move, name_in_errors
from lab.machine.options import Between, Seconds, UserError


@dataclass(frozen=True)
class Settings:
    """How archives are fetched."""

    mirror: str = ""
    """address of the CIFAR-10 archive to try before the built-in ones"""
    connect_seconds: Seconds = 10.0
    """longest wait for a mirror's connection"""
    slow_seconds: Seconds = 20.0
    """how long a mirror may stay silent or below --slow-rate"""
    slow_rate: Annotated[float, Between(0)] = 200.0
    """kB/s below which another mirror is tried while one is left"""


@dataclass(frozen=True)
class Archive:
    """What is known of an archive before it is there."""

    title: str  # of what it holds
    size: int  # bytes
    hashed_by: str  # as hashlib calls it
    hash: str
    mirrors: tuple[str, ...]  # addresses, the first tried first
    instead: str  # what a person can do without it

    def is_at(self, path: Path) -> bool:
        """Whether the file is this archive, to the bit."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, self.hashed_by).hexdigest() == self.hash


class MirrorError(Exception):
    """A mirror does not give the archive, or gives it too slowly."""


TRIES = 5  # of each address, with what it gave before kept


def fetch(archive: Archive, path: Path, settings: Settings) -> None:
    """Download `archive` to `path` from the first mirror that gives it whole.

    Mirrors take turns. One that gave something before it failed is tried again after the others,
    and goes on where it stopped; so is one that went on from what turned out to be bad. None is
    tried more than `TRIES` times. A UserError says what each did.
    """
    part = path.with_name(f"{path.name}.part")
    waiting = list(archive.mirrors)
    if settings.mirror:
        waiting.insert(0, settings.mirror)
    tries: Counter[str] = Counter()
    problems: dict[str, Exception] = {}
    while waiting:
        url = waiting.pop(0)
        tries[url] += 1
        had = size_of(part)
        is_last = not waiting or url in problems
        try:
            if had < archive.size:  # else a killed process left it whole
                append(archive, url, part, is_last, settings)
            if not archive.is_at(part):
                part.unlink()
                raise MirrorError(f"what it gave has another {archive.hashed_by.upper()}")
            move(part, path)
            return
        except (MirrorError, requests.RequestException) as error:
            problems[url] = error
            has_grown = size_of(part) > had
            went_on_from_bad = had > 0 and not part.exists()
            if (has_grown or went_on_from_bad) and tries[url] < TRIES:
                waiting.append(url)
    raise UserError(say_failed(archive, path, problems))


def say_failed(archive: Archive, path: Path, problems: Mapping[str, Exception]) -> str:
    """What was tried, what is there, and what can be done."""
    there = ""
    if path.exists():
        size = f"{size_of(path):,} of {archive.size:,} bytes"
        there = f"{path} is not whole ({size}, or other ones), and "
    tried = ""
    for url, error in problems.items():
        tried += f"; {without_secrets(url, url)}: {without_secrets(str(error), url)}"
    return (
        f"{there}{archive.title} could not be downloaded{tried}. Place {path.name} "
        f"({archive.hashed_by.upper()} {archive.hash}) in {path.parent}, or {archive.instead}"
    )


def without_secrets(text: str, url: str) -> str:
    """`text` without the user, password and query of `url`; the last may be a token."""
    parts = urllib.parse.urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    for secret in (user + at, "?" + parts.query):
        if len(secret) > 1:
            text = text.replace(secret, "")
    return text


def size_of(path: Path) -> int:
    """Bytes in a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def append(archive: Archive, url: str, part: Path, is_last: bool, settings: Settings) -> None:
    """Append to `part` what it lacks of the archive.

    Raises MirrorError, or an error of requests, where that fails or, unless this is the last
    address, is too slow to wait for.
    """
    have = size_of(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = (settings.connect_seconds, settings.slow_seconds)
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if not response.ok:
            raise MirrorError(f"answers {response.status_code} {response.reason}")
        if response.status_code != requests.codes.partial:
            have = 0  # it starts from the beginning
        length = response.headers.get("Content-Length")
        if length != str(archive.size - have):
            kind = response.headers.get("Content-Type")
            raise MirrorError(f"offers {length} bytes of {kind}, not the archive")
        bar = tqdm(
            desc=f"{archive.title} from {urllib.parse.urlsplit(url).hostname}",
            total=archive.size,
            initial=have,
            unit="B",
            unit_scale=True,
            mininterval=0.1 if on_terminal() else 60,  # in a log file a line a minute
        )
        with name_in_errors(part), part.open("ab" if have else "wb") as file, bar:
            window_start = time.monotonic()
            window_bytes = 0
            for block in response.iter_content(2**13):
                file.write(block)
                bar.update(len(block))
                window_bytes += len(block)
                waited = time.monotonic() - window_start
                if waited > settings.slow_seconds:
                    rate = window_bytes / waited / 1000
                    if rate < settings.slow_rate and not is_last:
                        raise MirrorError(f"slow: {rate:.0f} kB/s")
                    window_start = time.monotonic()
                    window_bytes = 0
