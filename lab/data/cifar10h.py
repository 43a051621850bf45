"""What people answer to CIFAR-10's test images: CIFAR-10H (Peterson et al., ICCV 2019).

In comes the folder where the data lies; out come, for each test image, the shares of people who
chose each class, or None where their answers are not there. What is there and wrong is a
`UserError` before any training.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lab.data import download
from lab.machine.files import read_array
from lab.machine.options import UserError

FOLDER = "cifar10h"
COUNTS = "cifar10h-counts.npy"
SHARES = "cifar10h-probs.npy"
ARCHIVE = download.Archive(
    title="CIFAR-10H",
    size=800_128,
    hashed_by="sha256",
    hash="9b36b4550349af56c79083356312eb4af856cc5fd3caf1f669d40b9d0bbb69ff",
    mirrors=(f"https://raw.githubusercontent.com/jcpeterson/cifar-10h/master/data/{COUNTS}",),
    instead="go without people's answers, as this run does",
)
LEAST_AGREEMENT = 0.9  # of people's majority with the labels; it is 0.992
CURE = f"delete it, or fetch {ARCHIVE.mirrors[0]} again"


def fetch(folder: Path, settings: download.Settings) -> None:
    """Download the answers into the folder where CIFAR-10 lies; one line where they can't be had.

    Nothing else depends on them.
    """
    path = folder / FOLDER / COUNTS
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The mirror that a person may have named is CIFAR-10's.
        download.fetch(ARCHIVE, path, dataclasses.replace(settings, mirror=""))
    except UserError as error:
        print(error)
        with suppress(OSError):  # what was begun is kept
            path.parent.rmdir()


def find(folder: Path, labels: Tensor) -> Tensor | None:
    """The shares of people who chose each class: float64 [N, classes], or None.

    Of the test images with `labels` int64 [N].
    """
    for name in (COUNTS, SHARES):
        for path in (folder / FOLDER / name, folder / name):
            if path.exists():
                return read(path, labels)
    print(
        f"People's answers (CIFAR-10H) are not in {folder / FOLDER}, so that mistakes are not held "
        f"against theirs; they come from {ARCHIVE.mirrors[0]}"
    )
    return None


def read(path: Path, labels: Tensor) -> Tensor:
    """The file's counts or shares, as shares; UserError for anything else."""
    answers = read_array(path, CURE)
    classes = int(labels.max()) + 1
    shape = (len(labels), classes)
    if answers.shape != shape or answers.dtype.kind not in "iuf":
        kind = f"{answers.dtype} {list(answers.shape)}, not numbers {list(shape)}"
        raise UserError(f"{path} holds {kind}: {CURE}")
    answers = answers.astype(np.float64)
    totals = answers.sum(1, keepdims=True)
    if not np.isfinite(answers).all() or (answers < 0).any() or (totals == 0).any():
        raise UserError(f"{path} holds what are no counts of answers: {CURE}")
    agreement = float((answers.argmax(1) == labels.numpy()).mean())
    if agreement < LEAST_AGREEMENT:
        raise UserError(
            f"{path} is of other images, or of another order: most people's answer is the label "
            f"on {100 * agreement:.0f} % of the test images: {CURE}"
        )
    return torch.from_numpy(answers / totals)
