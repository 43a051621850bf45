"""Pieces of long work: what a killed run has finished is found again by the same command.

In come a name, all that a piece depends on, and what makes it; out comes the piece, made now or by
an earlier run, the same to the bit. What depends on anything else is never met.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from lab.machine.files import read_tensors, remove_unfinished, write_tensors
from lab.machine.options import UserError

Piece = TypeVar("Piece")  # a dataclass of arrays, and of lists and dictionaries of them


class Pieces:
    """Finished pieces in a folder, each of an owner: a network and its seed, as files name them.

    While a run goes on, each piece has a file of its own. When it is whole, `join` puts those that
    it used into one file for each owner, where a run of more seeds finds them.
    """

    def __init__(self, folder: Path | None = None, common: Mapping[str, object] | None = None):
        """Without a folder nothing is kept. `common` is what all pieces depend on."""
        self.folder = folder
        self.common = dict(common or {})
        self.used: dict[str, dict[str, Any]] = {}  # by owner and name
        self.joined: dict[str, dict[str, Any]] = {}  # of an earlier run that was whole, by owner
        self.found = 0
        self.made = 0
        self.lock = threading.Lock()
        if folder is not None:
            remove_unfinished(folder)
            remove_unfinished(folder / "unfinished")

    def get(
        self,
        owner: str,
        kind: str,
        depends_on: Mapping[str, object],
        make: Callable[[], Piece],
        restore: Callable[..., Piece],
    ) -> Piece:
        """The piece of this kind; `restore` makes one of the fields that lie in a file.

        What it depends on is plain: numbers, texts, and lists and dictionaries of them.
        """
        if self.folder is None:
            return make()
        name = f"{kind}-{digest_of({**self.common, **depends_on})}"
        path = self.folder / "unfinished" / f"{owner}-{name}.pth"
        content = self.find(path, owner, name)
        was_found = content is not None
        if content is not None:
            piece = restore(**as_arrays(content))
        else:
            piece = make()
            content = as_tensors(dataclasses.asdict(cast(Any, piece)))
            with suppress(OSError):  # what was measured is not lost to a full disk
                write_tensors(path, {"of": path.name, "content": content})
        with self.lock:
            self.used.setdefault(owner, {})[name] = content
            self.found += was_found
            self.made += not was_found
        return piece

    def find(self, path: Path, owner: str, name: str) -> dict[str, Any] | None:
        """The fields of a finished piece; None where there is none that is whole."""
        with self.lock:
            if owner not in self.joined:
                self.joined[owner] = read_own(self.path_of(owner)) or {}
        return read_own(path) or self.joined[owner].get(name)

    def path_of(self, owner: str) -> Path:
        """The file that holds an owner's pieces when a run is whole."""
        assert self.folder is not None
        return self.folder / f"{owner}.pth"

    def join(self) -> None:
        """One file for each owner; what was not used, or is of a killed run, is deleted.

        Not by a run that used none, as one without stress tests.
        """
        if self.folder is None or not self.used:
            return
        for owner, pieces in self.used.items():
            if pieces.keys() != self.joined[owner].keys():
                path = self.path_of(owner)
                write_tensors(path, {"of": path.name, "content": pieces})
        shutil.rmtree(self.folder / "unfinished", ignore_errors=True)

    def say(self) -> str:
        """How many pieces had been made before."""
        return f"{self.found} of {self.found + self.made} measurements were there already"


def read_own(path: Path) -> dict[str, Any] | None:
    """What was written under this very name; None where there is nothing, or it is damaged."""
    try:
        written = read_tensors(path)
    except (FileNotFoundError, UserError):
        return None
    return written["content"] if written.get("of") == path.name else None


def digest_of(depends_on: Mapping[str, object]) -> str:
    """The same for the same, and for nothing else."""
    text = json.dumps(depends_on, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def digest_of_files(paths: Iterable[Path]) -> str:
    """Of what stands in files, as of the program's own source."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def as_tensors(value: Any) -> Any:
    """Arrays as tensors, in nested dictionaries and sequences."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, dict):
        return {key: as_tensors(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_tensors(inner) for inner in value]
    return value


def as_arrays(value: Any) -> Any:
    """Tensors as arrays, in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: as_arrays(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_arrays(inner) for inner in value]
    return value
