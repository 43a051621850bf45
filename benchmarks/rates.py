"""How often the verdict errs and its intervals cover, simulated; the tables of docs/rates.md.

    python benchmarks/rates.py

Networks are made whose true difference is known: images differ in difficulty, networks may prefer
some of them, and their quality may differ from seed to seed. Each rate is of 1,000 experiments
unless said, so that its standard error is 0.7 points at 5 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.measure import estimates, looks, planning, statistics
from lab.measure.statistics import PairedAnswers, Verdict

EXPERIMENTS = 1000
SEEDS = (2, 3, 5, 10)
RULES = statistics.Settings()
# How far quality differs from seed to seed, and images are preferred, on the scale of logits
REGIMES = {
    "quality does not differ": (0.0, 0.0),
    "quality differs": (0.3, 0.0),
    "images are preferred": (0.0, 1.0),
    "both": (0.3, 1.0),
}


def answers(
    rng: np.random.Generator, seeds: int, luck: float, preference: float, images: int = 2000
) -> np.ndarray:
    """By how much one network answers better than another that is as good: -1, 0 or 1, [S, N]."""
    difficulty = rng.normal(1.5, 1.5, images)
    liking = rng.normal(0, preference, images)
    quality = rng.normal(0, luck, (2, seeds, 1))
    sure = difficulty + np.stack([-liking / 2, liking / 2])[:, None] + quality
    right = rng.random(sure.shape) < 1 / (1 + np.exp(-sure))
    return right[1].astype(int) - right[0]


def false_equivalence(experiments: int = 20000) -> pd.DataFrame:
    """One seed, a true difference of exactly the margin: how often "equivalent", in percent."""
    rng = np.random.default_rng(0)
    rows = {}
    for images in (200, 1000, 10000):
        row = {}
        for discordance in (0.5, 1, 2, 5, 10):
            gained = (discordance + RULES.margin) / 200
            lost = (discordance - RULES.margin) / 200
            shares = [gained, lost, 1 - gained - lost]
            counts = rng.multinomial(images, shares, experiments)[:, :2]
            outcomes, repeats = np.unique(counts, axis=0, return_counts=True)
            wrong = 0
            for (more, fewer), repeat in zip(outcomes.tolist(), repeats.tolist(), strict=True):
                if PairedAnswers(more, fewer, images).margin_p(RULES.margin) < RULES.level:
                    wrong += repeat
            row[f"{discordance:g} %"] = 100 * wrong / experiments
        rows[f"{images:,} images"] = row
    return pd.DataFrame(rows).T


def false_verdicts() -> pd.DataFrame:
    """Networks that are as good on all images that there could be: how often "better" or "worse" of
    those that are tested, and how often the interval over seeds and images holds 0; percent."""
    rows = {}
    for regime, (luck, preference) in REGIMES.items():
        rng = np.random.default_rng(0)
        row = {}
        for seeds in SEEDS:
            told = 0
            covered = 0
            for _ in range(EXPERIMENTS):
                gains = answers(rng, seeds, luck, preference)
                verdict = statistics.judge_answers(gains, RULES).verdict
                told += verdict in (Verdict.BETTER, Verdict.WORSE)
                both = statistics.over_seeds_and_images(100 * gains).interval(0.95)
                covered += both.low <= 0 <= both.high
            row[f"told apart, {seeds} seeds"] = 100 * told / EXPERIMENTS
            row[f"covered, {seeds} seeds"] = 100 * covered / EXPERIMENTS
        rows[regime] = row
    table = pd.DataFrame(rows).T
    return table[sorted(table.columns, key=lambda name: name.split(",")[0], reverse=True)]


FEW_IMAGES = (10, 25, 50, 200)
ROWS = 55  # of the stress tests' table; Holm's method divides the level by them first
# What draws changes of a shape, and what a single image counts (0: anything)
CHANGES: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], np.ndarray], float]] = {
    "normal": (lambda rng, shape: rng.normal(0, 1, shape), 0.0),
    "skewed": (lambda rng, shape: rng.exponential(1, shape) - 1, 0.0),
    "answers, 20 % differ": (
        lambda rng, shape: rng.choice([-100, 0, 100], shape, p=[0.1, 0.8, 0.1]),
        100.0,
    ),
}


def few_images() -> pd.DataFrame:
    """One seed, a mean over few images that does not change: how often it is told apart at the
    level, and at what Holm's method leaves of it to the first row of 55, 0.09 %; percent, 20,000
    experiments."""
    rows = {}
    for kind, (draw, of_one_image) in CHANGES.items():
        rng = np.random.default_rng(0)
        row = {}
        for images in FEW_IMAGES:
            told = np.zeros(2)
            none = np.zeros((1, images))
            first = estimates.estimate_mean(none, RULES, of_one_image)
            for changes in draw(rng, (20_000, images)):
                other = estimates.estimate_mean(changes[None], RULES, of_one_image)
                change = estimates.change_of(other, first)
                for k, level in enumerate((RULES.level, RULES.level / ROWS)):
                    told[k] += abs(change.mean) > change.half_width(level / 2)
            row[f"{images} images"] = 100 * told[0] / 20_000
            row[f"{images} images, of {ROWS}"] = 100 * told[1] / 20_000
        rows[kind] = row
    return pd.DataFrame(rows).T


def misled_by_looking() -> pd.DataFrame:
    """Seeds added from 2 to 20 until something is decided: how often it is false; percent.

    Of networks that are as good, and of such that differ by the margin.
    """
    rows = {}
    for name, of_quality, of_few_images in (
        ("accuracy", 0.1, 0.2),
        ("corrupted accuracy", 0.7, 0.1),
    ):
        row = {}
        for what, true in (("told apart", 0.0), ("called equivalent", RULES.margin)):
            for spends in (False, True):
                rng = np.random.default_rng(0)
                misled = 0
                for _ in range(EXPERIMENTS):
                    change = true + rng.normal(0, np.hypot(of_quality, of_few_images), 20)
                    decided = look_until_decided(change, of_few_images, spends)
                    was_told_apart = decided in (Verdict.BETTER, Verdict.WORSE)
                    was_called_equivalent = decided is Verdict.EQUIVALENT
                    misled += was_told_apart if true == 0 else was_called_equivalent
                rule = "as here" if spends else "the whole level each time"
                row[f"{what}, {rule}"] = 100 * misled / EXPERIMENTS
        rows[f"spread of {name}"] = row
    return pd.DataFrame(rows).T


def look_until_decided(change: np.ndarray, of_few_images: float, spends: bool) -> Verdict:
    """The first verdict that is said of the first 2, 3, … seeds' `change`."""
    taken: list[looks.Look] = []
    for seeds in range(2, len(change) + 1):
        level = RULES.level
        if spends:
            taken = looks.take(taken, range(seeds), RULES.level)
            level = looks.level_of(taken, range(seeds), RULES.level)
        test = statistics.t_test(change[:seeds], 0.01, of_few_images / np.sqrt(seeds))
        verdict = statistics.judge_by(test, replace(RULES, level=level)).verdict
        if verdict is not Verdict.UNDECIDED:
            return verdict
    return Verdict.UNDECIDED


def planned_seeds() -> pd.DataFrame:
    """How many seeds would decide, planned from some at a true spread of 0.23: in most experiments
    (10th to 90th percentile), and how often the range that is given holds the true number."""
    true = planning.count_deciding_seeds(0.23, RULES)
    rows = {}
    for seeds in SEEDS:
        rng = np.random.default_rng(0)
        counts = []
        held = 0
        for _ in range(EXPERIMENTS // 5):
            deviation = rng.normal(0, 0.23, seeds).std(ddof=1)
            found = planning.plan(deviation, seeds, RULES, known_from=seeds).deciding
            assert found is not None and true is not None
            most = found.most or np.inf
            counts.append(found.seeds or planning.MOST_SEEDS)
            held += (found.fewest or np.inf) <= true <= most
        low, high = np.quantile(counts, [0.1, 0.9])
        rows[f"{seeds} seeds"] = {
            "true": true,
            "planned, 10th percentile": low,
            "planned, 90th percentile": high,
            "range holds the true number (%)": 100 * held / (EXPERIMENTS // 5),
        }
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    for table in (false_equivalence, false_verdicts, few_images, misled_by_looking, planned_seeds):
        lines = (table.__doc__ or "").split()
        print(f"\n{' '.join(lines)}\n")
        print(table().round(2).to_markdown())
