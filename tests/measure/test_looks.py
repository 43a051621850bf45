"""Looking again: how often what is not there is found, by who adds seeds until it is decided."""

import numpy as np
import pytest

from lab.measure import looks, statistics


def test_the_first_look_has_the_whole_level_and_the_same_seeds_are_no_further_one():
    taken = looks.take([], range(42, 47), 0.05)
    assert looks.level_of(taken, range(42, 47), 0.05) == 0.05
    assert looks.take(taken, range(42, 47), 0.05) == taken
    more = looks.take(taken, range(42, 52), 0.05)
    assert looks.level_of(more, range(42, 52), 0.05) == pytest.approx(0.005)
    assert looks.level_of(more, range(42, 47), 0.05) == 0.05
    for count in range(11, 40):
        more = looks.take(more, range(42, 42 + count), 0.05)
    assert sum(look.level for look in more) <= 0.06


def test_one_seed_is_no_look():
    assert looks.take([], [42], 0.05) == []
    assert looks.level_of([], [42], 0.05) == 0.05


@pytest.mark.parametrize("quality", [0.0, 0.3])
def test_who_looks_after_every_seed_is_seldom_misled(quality):
    """1,000 experiments, from 2 to 20 seeds of 10,000 images, networks that are the same."""
    rng = np.random.default_rng(0)
    misled = 0
    for _ in range(1000):
        change = rng.normal(0, quality, 20) + rng.normal(0, 0.2, 20)
        taken = []
        for seeds in range(2, 21):
            taken = looks.take(taken, range(seeds), 0.05)
            level = looks.level_of(taken, range(seeds), 0.05)
            if statistics.t_test(change[:seeds], 0.01).p() < level:
                misled += 1
                break
    assert misled / 1000 <= 0.06 + 2 * np.sqrt(0.05 * 0.95 / 1000), misled
