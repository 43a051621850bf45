"""Attacks: small changes of an image that make a network answer wrongly.

In come networks, any functions from images float32 [N, 3, H, W] in [0, 1] to logits [N, classes],
with images and labels; out comes which images are classified correctly whatever was tried, by the
largest change allowed. Modules must be in evaluation mode. Whatever the training's arithmetic, it
is float32 that has the last word: gradients that are lost to rounding would pass for robustness.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from lab.data.images import Images, to_input
from lab.machine.device import Hardware
from lab.machine.options import Between, without_it
from lab.machine.parallel import Tick, try_each
from lab.machine.pieces import Pieces
from lab.measure import statistics
from lab.measure.estimates import PERCENT, Estimate, estimate, estimate_mean
from lab.measure.evaluation import ByNetwork, at_labels, first_key
from lab.measure.models import fingerprint
from lab.measure.statistics import Difference, Interval, Verdict

Classify = Callable[[Tensor], Tensor]  # a network: from images to logits
PUSH_MOMENTUM = 0.75
# A network bends: classes fall to an epsilon that lie, were it linear, as far away as
# epsilon * (1 + BEND * epsilon). Measured: docs/measured.md
BEND = 2 * 255
IMAGES_AT_ONCE = 100  # on a CPU: what is lost when a run is killed


@dataclass(frozen=True)
class Settings:
    """Which images are attacked, and how hard."""

    attack_images: Annotated[int | None, Between(10), without_it("INT", "400, of shapes 60")] = None
    """test images to attack, the first of each class"""
    epsilons: Annotated[tuple[float, ...], Between(0.01, 255)] = (0.25, 0.5, 1, 2, 4, 8)
    """largest change of a pixel by an attack, of 255"""
    attack_steps: Annotated[int, Between(2)] = 40
    """steps of an attack towards the classes that an image comes nearest to"""

    def rounds(self) -> list[Round]:
        """Few steps towards many classes, then more towards fewer."""
        brief = math.ceil(0.15 * self.attack_steps)
        longer = math.ceil(0.25 * self.attack_steps)
        return [
            Round(brief, entry=1, is_rough=True),
            Round(longer, entry=0.6, is_rough=True),
            Round(self.attack_steps, entry=0.85),
        ]


@dataclass(frozen=True)
class Round:
    """A part of an attack: so many steps towards each class that is near enough by then."""

    steps: int
    entry: float  # the share of the gap to a class that must be closed; 1 lets in what is in reach
    is_rough: bool = False  # whether gradients are in the training's arithmetic, which is faster


def class_distances(
    classify: Classify, images: Tensor, labels: Tensor, hardware: Hardware
) -> Tensor:
    """How far from `images` each class begins, were the network linear: float32 [N, classes].

    The gap between the label's logit and the class's, over the L1 norm of its gradient: the
    smallest change of all pixels that closes it (Moosavi-Dezfooli et al., CVPR 2016). The label's
    own class is infinitely far. In the training's arithmetic, since only their order is asked for.
    """
    images = images.clone().requires_grad_()
    with hardware.autocast():
        logits = classify(images).float()
    distances = torch.full_like(logits, math.inf)
    for target in range(logits.shape[1]):
        gap = at_labels(logits, labels) - logits[:, target]
        (gradient,) = torch.autograd.grad(gap.sum(), images, retain_graph=True)
        length = gradient.flatten(1).abs().sum(1)
        distances[:, target] = gap.detach() / length.clamp_min(1e-12)
    return distances.scatter(1, labels[:, None], math.inf)


@dataclass(frozen=True)
class Victims:
    """Images to be changed, and what they must not be taken for any more."""

    clean: Tensor  # float32 [N, 3, H, W] in [0, 1]
    labels: Tensor  # int64 [N]
    logits: Tensor  # float32 [N, classes] of the clean images
    nearest: Tensor  # int64 [N, classes]: the other classes, the nearest first, the label last
    distances: Tensor  # float32 [N, classes], of these

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Victims:
        return Victims(
            self.clean[index],
            self.labels[index],
            self.logits[index],
            self.nearest[index],
            self.distances[index],
        )


def find_victims(classify: Classify, clean: Tensor, labels: Tensor, hardware: Hardware) -> Victims:
    """Of images float32 [N, 3, H, W] and their labels [N]."""
    with torch.no_grad():
        logits = classify(clean)
    distances, nearest = class_distances(classify, clean, labels, hardware).sort(1)
    return Victims(clean, labels, logits, nearest, distances)


@dataclass(frozen=True)
class Pushed:
    """What pushing made of images, and which of them its own arithmetic took for misclassified."""

    images: Tensor  # float32 [N, 3, H, W]
    fell: Tensor  # bool [N]


def push(
    classify: Classify,
    victims: Victims,
    start: Tensor,
    towards: Tensor,
    epsilon: float,
    how: Round,
    hardware: Hardware,
) -> Pushed:
    """From `start` on, images at most `epsilon` from the clean ones in any value.

    Each is pushed towards one of its nearest classes, int64 [N] by place from 0 on. A step goes
    along the sign of the gradient of the gap between that class's logit and the label's, so that
    neither the loss nor the logits' scale matters. Steps fall from 2 `epsilon` to zero by a cosine,
    and keep their momentum as those of APGD do (Croce & Hein, ICML 2020). An image is left alone as
    soon as it is misclassified.
    """
    labels = victims.labels
    targets = at_labels(victims.nearest, towards)
    low = (victims.clean - epsilon).clamp_min(0)
    high = (victims.clean + epsilon).clamp_max(1)
    pushed = start.clone()
    previous = start.clone()
    remaining = torch.arange(len(victims), device=start.device)  # not yet misclassified
    for step in range(how.steps):
        hardware.raise_if_cancelled()
        current = pushed[remaining].requires_grad_()
        with hardware.autocast() if how.is_rough else nullcontext():
            logits = classify(current).float()
        gap = at_labels(logits, targets[remaining]) - at_labels(logits, labels[remaining])
        (gradient,) = torch.autograd.grad(gap.sum(), current)
        still_correct = logits.argmax(1) == labels[remaining]
        remaining = remaining[still_correct]
        if len(remaining) == 0:
            break
        current = current.detach()[still_correct]
        step_size = 2 * epsilon * (1 + math.cos(math.pi * step / how.steps)) / 2
        moved = current + step_size * gradient[still_correct].sign()
        moved = moved.clamp(low[remaining], high[remaining])
        moved = current + PUSH_MOMENTUM * (moved - current)
        moved += (1 - PUSH_MOMENTUM) * (current - previous[remaining])
        previous[remaining] = current
        pushed[remaining] = moved.clamp(low[remaining], high[remaining])
    fell = torch.ones_like(labels, dtype=torch.bool)
    fell[remaining] = False
    return Pushed(pushed, fell)


@dataclass(frozen=True)
class Tried:
    """What an attack made of images, and which of them are classified correctly all the same."""

    images: Tensor  # float32 [N, 3, H, W]: what fools, or came nearest to it
    robust: Tensor  # bool [N]


def race(
    classify: Classify,
    victims: Victims,
    epsilon: float,
    rounds: Sequence[Round],
    hardware: Hardware,
) -> Tried:
    """Push images towards several classes, as a race that fewer and fewer of them stay in.

    A brief round tells towards which classes an image comes nearest to being misclassified. Those
    that came near are pushed on from where they got, towards these classes alone. Most images that
    fall do so in the first steps towards the first class, and one that is still far from all
    classes then holds out (docs/measured.md): successive halving (Jamieson & Talwalkar, AISTATS
    2016) spares what would not change that.
    """
    others = victims.nearest.shape[1] - 1
    made = victims.clean.repeat(others, 1, 1, 1, 1)  # towards each class [K, N, 3, H, W]
    distances = victims.distances[:, :others].T
    in_reach = distances <= epsilon * (1 + BEND * epsilon)
    in_reach[0] = True  # the nearest class is tried even so
    # What lets in: at first 1 for a class in reach, once it is tried the share of the gap closed.
    nearness = in_reach.to(made.dtype)
    for one in rounds:
        order = nearness.argsort(dim=0, descending=True, stable=True)
        enters = nearness >= one.entry
        for towards in order:
            holds_out = nearness.amax(0) < math.inf
            remaining = (at_labels(enters.T, towards) & holds_out).nonzero()[:, 0]
            if len(remaining) == 0:
                break
            place = towards[remaining]
            some = victims.select(remaining)
            pushed = push(classify, some, made[place, remaining], place, epsilon, one, hardware)
            made[place, remaining] = pushed.images
            nearness[place, remaining] = share_closed(classify, some, pushed, place)
    best = nearness.argmax(0)
    every_image = torch.arange(len(victims), device=best.device)
    return Tried(made[best, every_image], nearness.amax(0) < math.inf)


@torch.no_grad()
def share_closed(classify: Classify, victims: Victims, pushed: Pushed, towards: Tensor) -> Tensor:
    """Of the gap between the label's logit and the class's, what is closed: float32 [N].

    From 0 for the clean image to 1; infinite where the image is misclassified, as anything. At
    least 1 where only a rough arithmetic takes it for misclassified: then the next round decides.
    """
    logits = classify(pushed.images)
    targets = at_labels(victims.nearest, towards)
    gap = at_labels(logits, victims.labels) - at_labels(logits, targets)
    clean = at_labels(victims.logits, victims.labels) - at_labels(victims.logits, targets)
    closed = 1 - gap / clean.clamp_min(1e-12)
    closed = closed.where(~pushed.fell, closed.clamp_min(1))
    return closed.where(logits.argmax(1) == victims.labels, math.inf)


@dataclass(frozen=True)
class Attacked:
    """What a network answers to the attack on it, and the others of its seed to the same images.

    True where the answer is right.
    """

    clean: np.ndarray  # bool [N], of the images as they are
    robust: np.ndarray  # bool [epsilons, N], of whatever was tried, the smallest epsilon first
    correct_by_others: dict[str, np.ndarray]  # bool [epsilons, N] of what was made, by network


def attack(
    key: str,
    networks: Mapping[str, Classify],
    images: Images,
    settings: Settings,
    hardware: Hardware,
    tick: Tick = lambda _: None,
) -> Attacked:
    """Attack the network `key` of `networks`, and show the others what it is shown.

    `tick` is told of each image and epsilon that is done.
    """
    parts = []
    for index in batches_of(images, hardware):
        parts.append(attack_batch(key, networks, images.select(index), settings, hardware, tick))
    return join(parts)


def batches_of(images: Images, hardware: Hardware) -> Sequence[Tensor]:
    """Indices of images that are attacked together."""
    at_once = hardware.eval_batch
    if hardware.device.type == "cpu":
        at_once = min(IMAGES_AT_ONCE, at_once)
    return torch.arange(len(images)).split(at_once)


def join(parts: Sequence[Attacked]) -> Attacked:
    """What became of several batches, as of one."""
    by_others = {}
    for other in parts[0].correct_by_others:
        of_parts = [part.correct_by_others[other] for part in parts]
        by_others[other] = np.concatenate(of_parts, axis=1)
    return Attacked(
        clean=np.concatenate([part.clean for part in parts]),
        robust=np.concatenate([part.robust for part in parts], axis=1),
        correct_by_others=by_others,
    )


def attack_batch(
    key: str,
    networks: Mapping[str, Classify],
    images: Images,
    settings: Settings,
    hardware: Hardware,
    tick: Tick,
) -> Attacked:
    """The attack on images that are attacked together, the largest epsilon first.

    What withstands that is tried but briefly with smaller ones, since whatever fools at those was
    there to be found before; what does fall to a small one has fallen to all larger ones.
    """
    classify = networks[key]
    clean = to_input(images.pixels.to(hardware.device))
    labels = images.labels.to(hardware.device)
    victims = find_victims(classify, clean, labels, hardware)
    correct = victims.logits.argmax(1) == labels
    rounds = settings.rounds()
    brief = rounds[:1]
    robust = torch.zeros_like(correct)  # against the epsilon before, which is larger
    adversarial = clean.clone()  # what fools this network, or came nearest to it
    robust_by_epsilon = []
    by_others: dict[str, list[Tensor]] = {other: [] for other in networks if other != key}
    for epsilon in sorted(settings.epsilons, reverse=True):
        limit = epsilon / 255
        for tried_before, how in ((robust.clone(), brief), (correct & ~robust, rounds)):
            index = tried_before.nonzero()[:, 0]
            tried = race(classify, victims.select(index), limit, how, hardware)
            adversarial[index] = tried.images
            robust[index] = tried.robust
        robust_by_epsilon.append(robust.clone())
        adversarial = (clean + (adversarial - clean).clamp(-limit, limit)).clamp(0, 1)
        for other, seen in by_others.items():
            seen.append(is_correct(networks[other], adversarial, labels))
        tick(len(images))
    return Attacked(
        clean=correct.cpu().numpy(),
        robust=np.logical_and.accumulate(stack_reversed(robust_by_epsilon)),
        correct_by_others={other: stack_reversed(seen) for other, seen in by_others.items()},
    )


def stack_reversed(answers: Sequence[Tensor]) -> np.ndarray:
    """From the largest epsilon first to [epsilons, N] by the smallest."""
    return torch.stack(list(reversed(answers))).cpu().numpy()


@torch.no_grad()
def is_correct(classify: Classify, images: Tensor, labels: Tensor) -> Tensor:
    """Whether images float32 [N, 3, H, W] are given their labels: bool [N]."""
    return classify(images).argmax(1) == labels


@dataclass(frozen=True)
class Scores:
    """A network's accuracy under attack, in percent, by the largest change of a pixel."""

    epsilons: tuple[float, ...]  # of 255
    clean: Estimate
    robust: tuple[Estimate, ...]  # by epsilon
    transferred: np.ndarray  # float64 [seeds, epsilons], under what was made for other networks
    median_epsilon: Estimate  # of 255; half of the images withstand it
    change: tuple[Interval, ...] | None  # of `robust` from the first network, in points
    # From `robust` to `transferred`, by epsilon; p is corrected over these and all networks
    transfer: tuple[Difference, ...]

    def is_masked(self) -> bool:
        """Whether what was made for other networks fools this one more than what was made for it.

        Beyond chance, at any epsilon. Then its gradients hide what it does not withstand (Athalye
        et al., ICML 2018).
        """
        return any(difference.verdict is Verdict.WORSE for difference in self.transfer)


def study(
    by_network: ByNetwork,
    images: Images,
    settings: Settings,
    rules: statistics.Settings,
    seed: int,
    hardware: Hardware,
    pieces: Pieces,
) -> dict[str, Scores]:
    """Attack each network of each seed, some images at a time."""
    seeds = len(by_network[first_key(by_network)])
    batches = batches_of(images, hardware)
    jobs = list(itertools.product(by_network, range(seeds), range(len(batches))))
    hardness = dataclasses.asdict(settings)
    del hardness["attack_images"]

    def attack_one(job: tuple[str, int, int], tick: Tick) -> Attacked:
        key, k, batch = job
        some = images.select(batches[batch])
        of_seed = {other: evaluations[k] for other, evaluations in by_network.items()}
        networks: dict[str, Classify] = {}
        depends_on: dict[str, object] = {"images": fingerprint(some.tensors()), **hardness}
        for other, one in of_seed.items():
            networks[other] = one.trained.model
            depends_on[f"network {other}"] = one.identity
        make = partial(attack_batch, key, networks, some, settings, hardware, tick)
        return of_seed[key].measured_once(pieces, f"attack{batch}", depends_on, make, Attacked)

    total = len(images) * len(settings.epsilons) * seeds * len(by_network)
    parts = dict(zip(jobs, try_each(attack_one, jobs, hardware, "attacks", total), strict=True))
    attacked: dict[str, list[Attacked]] = {}
    for key in by_network:
        attacked[key] = []
        for k in range(seeds):
            attacked[key].append(join([parts[key, k, batch] for batch in range(len(batches))]))
    return score(attacked, sorted(settings.epsilons), rules, seed)


def score(
    attacked: Mapping[str, Sequence[Attacked]],
    epsilons: Sequence[float],
    rules: statistics.Settings,
    seed: int,
) -> dict[str, Scores]:
    """Scores by network, from each seed's attack; `epsilons` are sorted."""
    robust = {}  # bool [seeds, epsilons, images]
    for key, by_seed in attacked.items():
        robust[key] = np.stack([one.robust for one in by_seed])
    transferred = {}
    transfers = {}  # by network and epsilon
    for key, of_network in robust.items():
        transferred[key] = seen_of_others(key, attacked, of_network)
        lost = judge_by_epsilon(100.0 * transferred[key] - 100.0 * of_network, rules)
        for k, difference in enumerate(lost):
            transfers[key, k] = difference
    transfers = statistics.correct_by_key(transfers, rules.level)

    first = robust[first_key(attacked)]
    scores = {}
    for key, by_seed in attacked.items():
        change = None
        if key != first_key(attacked):
            gains = 100.0 * robust[key] - 100.0 * first
            change = tuple(one.interval for one in judge_by_epsilon(gains, rules))
        clean = np.stack([one.clean for one in by_seed])
        scores[key] = Scores(
            epsilons=tuple(epsilons),
            clean=share_of(clean, rules),
            robust=tuple(share_of(robust[key][:, k], rules) for k in range(len(epsilons))),
            transferred=100 * transferred[key].mean(2),
            median_epsilon=estimate(
                partial(median_epsilon, epsilons=epsilons),
                [(one.clean, one.robust.T) for one in by_seed],
                rules,
                seed,
                between=(0, max(epsilons)),
            ),
            change=change,
            transfer=tuple(transfers[key, k] for k in range(len(epsilons))),
        )
    return scores


def seen_of_others(
    key: str, attacked: Mapping[str, Sequence[Attacked]], robust: np.ndarray
) -> np.ndarray:
    """What a network classifies correctly of all that was made for the others.

    bool [seeds, epsilons, images], as its own attack left it `robust`.
    """
    correct = np.ones_like(robust)
    for other, by_seed in attacked.items():
        if other != key:
            correct &= np.stack([one.correct_by_others[key] for one in by_seed])
    return correct


def share_of(correct: np.ndarray, rules: statistics.Settings) -> Estimate:
    """In percent, of `correct` bool [seeds, images]."""
    return estimate_mean(100.0 * correct, rules, of_one_image=100, between=PERCENT)


def judge_by_epsilon(gains: np.ndarray, rules: statistics.Settings) -> list[Difference]:
    """The differences that are the means of `gains` [seeds, epsilons, images], in points."""
    differences = []
    for k in range(gains.shape[1]):
        differences.append(statistics.judge(gains[:, k], rules))
    return differences


def median_epsilon(clean: np.ndarray, robust: np.ndarray, epsilons: Sequence[float]) -> float:
    """What half of the images that are classified correctly withstand, between those tried.

    On a logarithmic scale, as the epsilons are, from a quarter of the smallest to the largest of
    them. `clean` bool [N], `robust` bool [N, epsilons].
    """
    images = max(1, clean.sum())
    shares = [1.0, *(robust.sum(0) / images)]
    sizes = np.log2((min(epsilons) / 4, *epsilons))
    return float(2 ** np.interp(0.5, np.flip(shares), np.flip(sizes)))
