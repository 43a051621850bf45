"""People's answers: which mistakes are theirs too, and how far probabilities are their shares."""

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from helpers import KEYS, SE, evaluation_of

from lab.measure import calibration, people, statistics
from lab.measure.people import Outcome

RULES = statistics.Settings(score_resamples=50)


def made(images=400, mended=0, seed=0):
    """Labels, people's shares, and two networks: the first wrong on each tenth image, the other one
    right on `mended` of these; people are sure of the first half."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, 4, images))
    share = torch.full((images,), 0.98, dtype=torch.float64)
    share[images // 2 :] = 0.7
    shares = ((1 - share) / 3)[:, None].repeat(1, 4).scatter(1, labels[:, None], share[:, None])
    called = labels.clone()
    called[::10] = (labels[::10] + 1) % 4
    better = called.clone()
    better[: 10 * mended : 10] = labels[: 10 * mended : 10]
    confidence = torch.full((images,), 0.9)
    by_network = {
        "baseline": [evaluation_of(called, confidence, labels)],
        "se_attention": [evaluation_of(better, confidence, labels, network=SE)],
    }
    return labels, shares, by_network


def test_mistakes_are_counted_by_peoples_agreement():
    labels, shares, by_network = made(mended=15)
    found = people.compare(by_network, labels, shares, RULES, 42)
    assert [(group.low, group.images) for group in found.groups] == [(50, 200), (95, 200)]
    assert found.clear.low == 95 and found.unclear.high == 95
    assert found.groups[1].mistakes == {"baseline": 20, "se_attention": 5}
    assert found.groups[1].error["baseline"].value == 10
    assert found.groups[1].error["se_attention"].value == pytest.approx(2.5)
    changes = [group.change["se_attention"] for group in found.groups]
    assert [one.interval.value for one in changes] == pytest.approx([0, -7.5])
    p = scipy.stats.binomtest(15, 15).pvalue
    assert changes[1].p == pytest.approx(p) and changes[1].p_holm == pytest.approx(2 * p)
    assert changes[0].p == 1
    contrast = found.contrast["se_attention"]
    assert contrast.interval.value == pytest.approx(7.5) and contrast.p_holm < 0.01
    assert found.share[Outcome.ALL_RIGHT].value == pytest.approx(84, abs=0.01)
    assert found.share[Outcome.SOME_WRONG].value == pytest.approx(98)
    assert found.share[Outcome.ALL_WRONG].value == pytest.approx((5 * 98 + 20 * 70) / 25)


def test_networks_that_mend_both_kinds_alike_are_seldom_told_to_differ():
    """Of 200 experiments in at most 5 %, and three standard errors."""
    rng = np.random.default_rng(0)
    sure = np.arange(1000) < 700
    said = 0
    for k in range(200):
        right = rng.random((2, 1, 1000)) < 0.8
        correct = dict(zip(KEYS, right, strict=True))
        found = people.find_contrasts(correct, sure, RULES, k)
        said += found["se_attention"].p_holm < 0.05
    assert said <= 200 * 0.05 + 3 * np.sqrt(200 * 0.05 * 0.95)


def test_where_people_are_sure_of_all_or_none_nothing_is_contrasted():
    labels, _, by_network = made()
    all_agree = F.one_hot(labels, 4).double()
    none_agrees = torch.full((len(labels), 4), 0.25, dtype=torch.float64)
    for shares in (all_agree, none_agrees):
        found = people.compare(by_network, labels, shares, RULES, 42)
        assert found.contrast == {} and None in (found.clear, found.unclear)


def test_images_are_rejected_where_more_people_choose_another_class():
    shares = torch.tensor([[0.5, 0.5, 0], [0.4, 0.6, 0], [0.4, 0.35, 0.25]], dtype=torch.float64)
    assert people.rejected(shares, torch.zeros(3, dtype=torch.int64)).tolist() == [
        False, True, False,
    ]  # fmt: skip


def test_probabilities_that_are_peoples_have_their_entropy_and_no_error():
    rng = np.random.default_rng(0)
    shares = torch.from_numpy(rng.dirichlet(np.ones(4), 2000))
    perfect = people.score([shares.log().float()], shares, 15, RULES, 42)
    own = float(people.entropy(shares).mean())
    assert own == pytest.approx(scipy.stats.entropy(shares.numpy(), axis=1).mean())
    assert perfect.cross_entropy.mean() == pytest.approx(own, rel=1e-5)
    assert perfect.error.mean() < 1e-4
    assert perfect.doubt.mean() == pytest.approx(1)
    # Twice as sure: worse by the divergence, and as doubtful where people are
    surer = (2 * shares.log()).log_softmax(1)
    found = people.score([surer.float()], shares, 15, RULES, 42)
    divergence = scipy.stats.entropy(shares.numpy(), surer.exp().numpy(), axis=1).mean()
    assert found.cross_entropy.mean() == pytest.approx(own + divergence, rel=1e-5)
    assert found.error.mean() > 5 and found.doubt.mean() > 0.9


def test_the_calibration_error_against_people_of_sure_people_is_the_usual_one():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 4, generator=generator)
    labels = torch.randint(0, 4, (500,), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, 4).double()
    against_people = people.score([logits], one_hot, 15, RULES, 42)
    usual = calibration.score([logits], labels, 15, RULES, 42)
    assert against_people.error.mean() == pytest.approx(usual.error.mean())
    assert against_people.doubt.mean() == 0  # of people who never doubt
    assert against_people.cross_entropy.mean() == pytest.approx(
        usual.negative_log_likelihood.mean()
    )
