"""Accuracy on corrupted images.

In come evaluations and which test images to corrupt; out come each network's accuracy by corruption
and severity, means over the benchmark's corruptions, and their change from the first network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from lab.data.images import Dataset
from lab.machine.device import Hardware
from lab.machine.options import Between, without_it
from lab.machine.parallel import Tick, try_each
from lab.machine.pieces import Pieces
from lab.measure import corruptions, statistics
from lab.measure.corruptions import SEVERITIES
from lab.measure.estimates import PERCENT, Estimate, estimate_mean, estimate_of_means
from lab.measure.evaluation import ByNetwork, first_key, logits_of
from lab.measure.models import Model
from lab.measure.statistics import Difference


@dataclass(frozen=True)
class Settings:
    """Which images are corrupted."""

    stress_images: Annotated[int | None, Between(50), without_it("INT", "1000, of shapes 250")] = (
        None
    )
    """test images to corrupt, the first of each class"""


@dataclass(frozen=True)
class Scores:
    """A network's accuracy under corruption, in percent.

    Means, and what is made of them, are over the benchmark's corruptions, without the extra ones.
    """

    names: tuple[str, ...]
    accuracy: np.ndarray  # float64 [seeds, corruptions, severities]
    mean_accuracy: Estimate
    mean_accuracy_of_extra: Estimate | None  # if there are any
    mean_corruption_error: Estimate | None  # the first network's being 100, if that errs at all
    change: Difference | None  # of mean accuracy, from the first network


@dataclass(frozen=True)
class Answers:
    """What one trained network says of images under one corruption."""

    logits: np.ndarray  # float32 [severities, N, classes]


@dataclass(frozen=True)
class Study:
    """All networks under all corruptions, and what one image looks like under them."""

    scores: dict[str, Scores]  # by the network's key
    labels: Tensor  # int64 [N]
    # By network: float32 [seeds, corruptions, severities, N, classes], extra ones left out
    benchmark_logits: dict[str, Tensor]
    original: np.ndarray  # uint8 [32, 32, 3]
    examples: dict[str, np.ndarray]  # the same image under each corruption, at severity 3


def study(
    by_network: ByNetwork,
    data: Dataset,
    index: Tensor,
    rules: statistics.Settings,
    seed: int,
    hardware: Hardware,
    pieces: Pieces,
) -> Study:
    """Try all networks on test images `index`; each corruption is made once, if at all."""
    clean = data.test.select(index)
    names = corruptions.names_of(data)

    def try_all(name: str, _: Tick) -> dict[str, Tensor]:
        """By network the logits [seeds, severities, N, classes]."""
        make_images = cache(partial(corruptions.images_under, name, data, index, seed))
        depends_on = {"images": corruptions.identity(name, data, index), "seed": seed}
        logits = {}
        for key, evaluations in by_network.items():
            by_seed = []
            for one in evaluations:
                ask = partial(answer, one.trained.model, make_images, hardware)
                answers = one.measured_once(pieces, name, depends_on, ask, Answers)
                by_seed.append(torch.from_numpy(answers.logits))
            logits[key] = torch.stack(by_seed)
        return logits

    tries = try_each(try_all, names, hardware, "corruptions")
    examples = {}
    for name in names:
        of_one_image = corruptions.images_under(name, data, index[:1], seed)
        examples[name] = of_one_image[SEVERITIES.index(3), 0].numpy()
    is_benchmark = torch.tensor([name not in corruptions.EXTRA for name in names])
    correct = {}
    benchmark_logits = {}
    for key in by_network:
        logits = torch.stack([of_networks[key] for of_networks in tries], dim=1)
        correct[key] = (logits.argmax(-1) == clean.labels).numpy()
        benchmark_logits[key] = logits[:, is_benchmark]
    return Study(
        scores=score(tuple(names), correct, rules, seed),
        labels=clean.labels,
        benchmark_logits=benchmark_logits,
        original=clean.pixels[0].numpy(),
        examples=examples,
    )


def answer(model: Model, make_images: Callable[[], Tensor], hardware: Hardware) -> Answers:
    """A model's answers to images uint8 [severities, N, 32, 32, 3], which are made if need be."""
    pixels = make_images()
    flat = logits_of(model, pixels.flatten(0, 1), hardware)
    return Answers(flat.unflatten(0, pixels.shape[:2]).numpy())


def score(
    names: tuple[str, ...], correct: Mapping[str, np.ndarray], rules: statistics.Settings, seed: int
) -> dict[str, Scores]:
    """Scores from `correct` bool [seeds, corruptions, severities, images], by network."""
    is_extra = np.array([name in corruptions.EXTRA for name in names])
    on_benchmark = {key: of_network[:, ~is_extra] for key, of_network in correct.items()}
    first = on_benchmark[first_key(correct)]
    changes = changes_from_first(on_benchmark, rules)
    scores = {}
    for key, of_network in correct.items():
        benchmark = on_benchmark[key]
        mean_of_extra = None
        if is_extra.any():
            mean_of_extra = mean_accuracy(of_network[:, is_extra], rules)
        scores[key] = Scores(
            names=names,
            accuracy=100 * of_network.mean(3),
            mean_accuracy=mean_accuracy(benchmark, rules),
            mean_accuracy_of_extra=mean_of_extra,
            mean_corruption_error=corruption_error(benchmark, first, rules, seed),
            change=changes.get(key),
        )
    return scores


def changes_from_first(
    correct: Mapping[str, np.ndarray], rules: statistics.Settings
) -> dict[str, Difference]:
    """Of mean accuracy, by the other networks' keys; p corrected over the networks.

    `correct` bool [seeds, corruptions, severities, images].
    """
    first = correct[first_key(correct)]
    tries = first.shape[1] * first.shape[2]
    changes = {}
    for key, of_network in correct.items():
        if key != first_key(correct):
            # Of each seed and image, the mean over corruptions and severities
            gains = 100 * (of_network.sum((1, 2)) - first.sum((1, 2))) / tries  # [seeds, images]
            changes[key] = statistics.judge(gains, rules)
    return statistics.correct_by_key(changes, rules.level)


def mean_accuracy(correct: np.ndarray, rules: statistics.Settings) -> Estimate:
    """In percent, of `correct` [seeds, corruptions, severities, images]."""
    tries = correct.shape[1] * correct.shape[2]
    by_seed = [100 * of_seed.mean((0, 1)) for of_seed in correct]
    return estimate_mean(by_seed, rules, of_one_image=100 / tries, between=PERCENT)


def corruption_error(
    correct: np.ndarray, first: np.ndarray, rules: statistics.Settings, seed: int
) -> Estimate | None:
    """The mean corruption error in percent of the first network's; None where that never errs.

    Of both bool [seeds, corruptions, severities, images].
    """
    errs = ~first.all((0, 2, 3))  # under which corruptions
    if not errs.any():
        return None
    by_seed = []
    for of_seed, of_first in zip(correct[:, errs], first[:, errs], strict=True):
        wrong = np.stack([~of_seed, ~of_first]).mean(2)  # [2, corruptions, images]
        by_seed.append(100 * np.moveaxis(wrong, 2, 0))
    return estimate_of_means(mean_ratio, by_seed, rules, seed)


def mean_ratio(errors: np.ndarray) -> float:
    """Of errors [2, corruptions] of a network and the first: the mean ratio, in percent.

    Over the corruptions under which the first network errs at all.
    """
    own, first = errors[:, errors[1] > 0]
    return float(100 * (own / first).mean()) if len(first) > 0 else 100.0
