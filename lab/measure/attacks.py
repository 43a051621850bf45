"""Attacks: small changes of an image that make a network answer wrongly.

In come networks, any functions from images float32 [N, 3, H, W] in [0, 1] to logits [N, classes],
with images and labels; out comes which images are classified correctly whatever was tried, by the
largest change allowed. Modules must be in evaluation mode. All is computed in float32, whatever the
training's arithmetic: gradients that are lost to rounding would pass for robustness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from lab.measure import statistics
from lab.measure.estimates import PERCENT, Estimate, estimate, estimate_mean
from lab.measure.evaluation import ByNetwork, at_labels, first_key
from lab.measure.statistics import Difference, Interval, Verdict

Classify = Callable[[Tensor], Tensor]  # a network: from images to logits
PUSH_MOMENTUM = 0.75
BRIEF_STEPS = 10  # towards one class, at an epsilon below one that has been withstood


@dataclass(frozen=True)
class Settings:
    """Which images are attacked, and how hard."""

    attack_images: Annotated[int | None, Between(10), without_it("INT", "400, of shapes 150")] = (
        None
    )
    """test images to attack, the first of each class"""
    epsilons: Annotated[tuple[float, ...], Between(0.01, 255)] = (0.25, 0.5, 1, 2, 4, 8)
    """largest change of a pixel by an attack, of 255"""
    attack_targets: Annotated[int, Between(1, 9)] = 5
    """classes that an image is pushed to, the nearest first"""
    attack_steps: Annotated[int, Between(2)] = 40
    """steps of an attack towards each of them"""


def class_distances(classify: Classify, images: Tensor, labels: Tensor) -> Tensor:
    """How far from `images` each class begins, were the network linear: float32 [N, classes].

    The gap between the label's logit and the class's, over the L1 norm of its gradient: the
    smallest change of all pixels that closes it (Moosavi-Dezfooli et al., CVPR 2016). The label's
    own class is infinitely far.
    """
    images = images.clone().requires_grad_()
    logits = classify(images)
    distances = torch.full_like(logits, math.inf)
    for target in range(logits.shape[1]):
        gap = at_labels(logits, labels) - logits[:, target]
        (gradient,) = torch.autograd.grad(gap.sum(), images, retain_graph=True)
        length = gradient.flatten(1).abs().sum(1)
        distances[:, target] = gap.detach() / length.clamp_min(1e-12)
    return distances.scatter(1, labels[:, None], math.inf)


def push(
    classify: Classify,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    epsilon: float,
    steps: int,
    hardware: Hardware,
) -> Tensor:
    """Images like `images` [N, 3, H, W], at most `epsilon` from them in any value.

    Each step goes along the sign of the gradient of the gap between the target's logit and the
    label's, so that neither the loss nor the logits' scale matters. Steps fall from 2 `epsilon` to
    zero by a cosine, and keep their momentum as those of APGD do (Croce & Hein, ICML 2020). An
    image is left alone as soon as it is misclassified.
    """
    low = (images - epsilon).clamp_min(0)
    high = (images + epsilon).clamp_max(1)
    pushed = images.clone()
    previous = images.clone()
    remaining = torch.arange(len(images), device=images.device)  # not yet misclassified
    for step in range(steps):
        hardware.raise_if_cancelled()
        current = pushed[remaining].requires_grad_()
        logits = classify(current)
        gap = at_labels(logits, targets[remaining]) - at_labels(logits, labels[remaining])
        (gradient,) = torch.autograd.grad(gap.sum(), current)
        still_correct = logits.argmax(1) == labels[remaining]
        remaining = remaining[still_correct]
        if len(remaining) == 0:
            break
        current = current.detach()[still_correct]
        step_size = 2 * epsilon * (1 + math.cos(math.pi * step / steps)) / 2
        moved = current + step_size * gradient[still_correct].sign()
        moved = moved.clamp(low[remaining], high[remaining])
        moved = current + PUSH_MOMENTUM * (moved - current)
        moved += (1 - PUSH_MOMENTUM) * (current - previous[remaining])
        previous[remaining] = current
        pushed[remaining] = moved.clamp(low[remaining], high[remaining])
    return pushed


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

    `tick` is told of each image, epsilon and target that is done.
    """
    parts = []
    for index in torch.arange(len(images)).split(hardware.eval_batch):
        parts.append(attack_batch(key, networks, images.select(index), settings, hardware, tick))
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
    """The attack on as many images as fit into memory.

    Each image is pushed towards the classes that are nearest, the largest epsilon first. What
    withstands that is tried but briefly with smaller ones, since whatever fools at those was there
    to be found before; what does fall to a small one has fallen to all larger ones.
    """
    classify = networks[key]
    others = [other for other in networks if other != key]
    clean = to_input(images.pixels.to(hardware.device))
    labels = images.labels.to(hardware.device)
    nearest = class_distances(classify, clean, labels).argsort(1)
    correct = is_correct(classify, clean, labels)
    robust = torch.zeros_like(correct)  # against the epsilon before, which is larger
    adversarial = clean.clone()  # what fools this network, or was tried last; the others see it
    robust_by_epsilon = []
    by_others: dict[str, list[Tensor]] = {other: [] for other in others}
    for epsilon in sorted(settings.epsilons, reverse=True):
        limit = epsilon / 255
        withstood = robust.nonzero()[:, 0]
        pushed = push(
            classify, clean[withstood], labels[withstood], nearest[withstood, 0], limit,
            min(BRIEF_STEPS, settings.attack_steps), hardware,
        )  # fmt: skip
        falls = ~is_correct(classify, pushed, labels[withstood])
        adversarial[withstood[falls]] = pushed[falls]
        remaining = (correct & ~robust).nonzero()[:, 0]
        robust[withstood[falls]] = False
        for k in range(settings.attack_targets):
            pushed = push(
                classify, clean[remaining], labels[remaining], nearest[remaining, k], limit,
                settings.attack_steps, hardware,
            )  # fmt: skip
            adversarial[remaining] = pushed
            remaining = remaining[is_correct(classify, pushed, labels[remaining])]
            tick(len(images))
        robust[remaining] = True
        robust_by_epsilon.append(robust.clone())
        adversarial = (clean + (adversarial - clean).clamp(-limit, limit)).clamp(0, 1)
        for other in others:
            by_others[other].append(is_correct(networks[other], adversarial, labels))
    return Attacked(
        clean=correct.cpu().numpy(),
        robust=np.logical_and.accumulate(stack_reversed(robust_by_epsilon)),
        correct_by_others={other: stack_reversed(by_others[other]) for other in others},
    )


def stack_reversed(answers: Sequence[Tensor]) -> np.ndarray:
    """From the largest epsilon first to [epsilons, N] by the smallest."""
    return torch.stack(list(reversed(answers))).cpu().numpy()


@torch.no_grad()
def is_correct(classify: Classify, images: Tensor, labels: Tensor) -> Tensor:
    """Whether images float32 [N, 3, H, W] are given their labels: bool [N]."""
    if len(images) == 0:
        return torch.zeros(0, dtype=torch.bool, device=images.device)
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
    # From `robust` to `transferred`, by epsilon, with p corrected over these
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
) -> dict[str, Scores]:
    """Attack each network of each seed."""
    networks_by_seed: list[dict[str, Classify]] = []
    for of_seed in zip(*by_network.values(), strict=True):
        networks_by_seed.append({one.trained.network.key: one.trained.model for one in of_seed})
    pairs = []
    for key in by_network:
        for networks in networks_by_seed:
            pairs.append((key, networks))

    def attack_one(pair: tuple[str, dict[str, Classify]], tick: Tick) -> Attacked:
        key, networks = pair
        return attack(key, networks, images, settings, hardware, tick)

    pushes = len(images) * len(settings.epsilons) * settings.attack_targets
    results = try_each(attack_one, pairs, hardware, "attacks", total=pushes * len(pairs))
    attacked: dict[str, list[Attacked]] = {key: [] for key in by_network}
    for (key, _), result in zip(pairs, results, strict=True):
        attacked[key].append(result)
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
    first = robust[first_key(attacked)]
    scores = {}
    for key, by_seed in attacked.items():
        transferred = np.ones_like(robust[key])
        for other, others_by_seed in attacked.items():
            if other != key:
                transferred &= np.stack([one.correct_by_others[key] for one in others_by_seed])
        change = None
        if key != first_key(attacked):
            gains = 100.0 * robust[key] - 100.0 * first
            change = tuple(one.interval for one in judge_by_epsilon(gains, rules))
        transfer = judge_by_epsilon(100.0 * transferred - 100.0 * robust[key], rules)
        clean = np.stack([one.clean for one in by_seed])
        scores[key] = Scores(
            epsilons=tuple(epsilons),
            clean=share_of(clean, rules, seed),
            robust=tuple(share_of(robust[key][:, k], rules, seed) for k in range(len(epsilons))),
            transferred=100 * transferred.mean(2),
            median_epsilon=estimate(
                partial(median_epsilon, epsilons=epsilons),
                [(one.clean, one.robust.T) for one in by_seed],
                rules,
                seed,
                between=(0, max(epsilons)),
            ),
            change=change,
            transfer=statistics.correct_differences(transfer, rules.level),
        )
    return scores


def share_of(correct: np.ndarray, rules: statistics.Settings, seed: int) -> Estimate:
    """In percent, of `correct` bool [seeds, images]."""
    return estimate_mean(100.0 * correct, rules, seed, of_one_image=100, between=PERCENT)


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
