"""Trainings and their files: which are done, whether a file is what it should be, who does which.

In come jobs and a function that trains one; out come trained networks, each read from its file. How
a network is trained is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

from filelock import Timeout

from lab.machine import console
from lab.machine.device import Hardware, Precision
from lab.machine.files import CURE, hold_lock, remove_unfinished
from lab.machine.options import UserError
from lab.machine.parallel import in_parallel
from lab.measure.models import (
    Checkpoint,
    Network,
    TrainedModel,
    build_network,
    load_checkpoint,
    resume_path_of,
)


class AnyRecipe(Protocol):
    """All that shapes a network's weights."""

    @property
    def seed(self) -> int: ...

    def differences(self, recorded: Mapping[str, object]) -> list[str]:
        """In what it differs from the recipe that a file of weights names, for people."""


RecipeType = TypeVar("RecipeType", bound=AnyRecipe)


@dataclass(frozen=True)
class Job(Generic[RecipeType]):
    """One network to be trained with one seed, or to be read from its file."""

    network: Network
    recipe: RecipeType
    path: Path
    log: Path | None = None  # where each epoch leaves a line

    @property
    def resume_path(self) -> Path:
        """Where the state of an unfinished training is kept."""
        return resume_path_of(self.path)


# Files


def load(path: Path, job: Job[Any], classes: int, precision: str) -> TrainedModel:
    """The network in a file, on the CPU; UserError where it is not what the job would make.

    `precision` is the arithmetic that it must have been trained in; "auto" takes any. A training
    half done is taken from the job's `resume_path` alone.
    """
    checkpoint = load_checkpoint(path)
    refuse_other(path, checkpoint, job, precision)
    model = build_network(job.network, job.recipe, classes)
    try:
        model.load_state_dict(checkpoint.state_dict)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold this network's weights: {CURE}") from error
    for tensor in model.state_dict().values():
        if not tensor.isfinite().all():
            raise UserError(f"{path} holds weights that are not finite: {CURE}")
    if checkpoint.optimizers is not None and path != job.resume_path:
        raise UserError(f"{path} holds a training half done: {CURE}")
    return TrainedModel(job.network, job.recipe.seed, model.eval(), checkpoint)


def refuse_other(path: Path, checkpoint: Checkpoint, job: Job[Any], precision: str) -> None:
    """UserError where a file's weights come from another recipe, network or arithmetic."""
    differing = job.recipe.differences(checkpoint.settings)
    if checkpoint.network != job.network.key:
        differing.append(f"network {checkpoint.network} (now {job.network.key})")
    if precision not in ("auto", checkpoint.precision):
        differing.append(f"precision {checkpoint.precision} (now {precision})")
    if differing:
        raise UserError(f"{path} was trained otherwise, {', '.join(differing)}: {CURE}")


def delete(jobs: Sequence[Job[Any]]) -> None:
    """Delete the weights of finished and of unfinished trainings."""
    for job in jobs:
        job.path.unlink(missing_ok=True)
        job.resume_path.unlink(missing_ok=True)


def precision_of_files(jobs: Sequence[Job[Any]], precision: str, classes: int) -> Precision | None:
    """The arithmetic that the jobs' files were trained in; None where there is no file.

    UserError, before hours of work, where a file does not fit or not all are of one arithmetic.
    """
    paths: dict[Precision, Path] = {}
    for job in jobs:
        if job.path.exists():
            checkpoint = load(job.path, job, classes, precision).checkpoint
            console.say(f"Using {job.path}, {checkpoint.device}, {checkpoint.precision}")
            paths[checkpoint.precision] = job.path
        elif job.resume_path.exists():
            checkpoint = load(job.resume_path, job, classes, precision).checkpoint
            paths[checkpoint.precision] = job.resume_path
    if len(paths) > 1:
        files = " and ".join(f"{path} in {arithmetic}" for arithmetic, path in paths.items())
        raise UserError(f"{files} were trained in different arithmetic: {CURE}")
    return next(iter(paths), None)


def agree_on_precision(
    jobs: Sequence[Job[Any]], wanted: str, classes: int, retrain: bool, hardware: Hardware
) -> Hardware:
    """The hardware in the arithmetic of the files there are, so that no choice by measuring counts.

    Rank 0 reads them for all ranks. What is to be trained again is deleted first.
    """
    precision = hardware.precision
    if hardware.ranks.rank == 0:
        if retrain:
            delete(jobs)
        precision = precision_of_files(jobs, wanted, classes) or precision
    agreed = hardware.ranks.share("precision", precision)
    if agreed == hardware.precision:
        return hardware
    reason = "the weights there are were trained in it"
    return replace(hardware, precision=cast(Precision, agreed), reason=reason)


# Who does which


def do_all(
    jobs: Sequence[Job[RecipeType]],
    train: Callable[[Job[RecipeType]], None],
    classes: int,
    hardware: Hardware,
) -> list[TrainedModel]:
    """The jobs' networks on the device, from their files or by `train`; on ranks but 0 none.

    `train` does a job and writes its file. Ranks share the work through the folder: a job is done
    by whoever holds its lock. Rank 0 waits for the others, and does what one that died has left.
    """
    do = partial(do_if_free, train=train)
    in_parallel(partial(do, patience=0), jobs, hardware)
    if hardware.ranks.rank != 0:
        return []
    in_parallel(partial(do, patience=-1), jobs, hardware)  # waits without end
    trained = []
    for job in jobs:
        loaded = load(job.path, job, classes, hardware.precision)
        loaded.model.to(hardware.device)
        trained.append(loaded)
    return trained


def do_if_free(
    job: Job[RecipeType], train: Callable[[Job[RecipeType]], None], patience: float
) -> None:
    """Do a job that no one has done; pass over one whose lock is held for `patience` seconds."""
    lock = hold_lock(job.path.with_name(f".{job.path.name}.lock"), patience)
    with suppress(Timeout), lock:
        if not job.path.exists():
            remove_unfinished(job.path.parent, job.path.name)
            remove_unfinished(job.path.parent, job.resume_path.name)
            train(job)
