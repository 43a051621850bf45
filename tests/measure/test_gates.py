"""Gates: those of the blocks, and what holding them at their means costs."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from statsmodels.stats.multitest import multipletests

import main
from lab.data.images import to_input
from lab.measure import gates, statistics
from lab.measure.evaluation import outputs_of

RULES = statistics.Settings()


def study(models, data, hardware):
    """Each model's gates, as another seed's."""
    by_seed = []
    for model in models:
        outputs = outputs_of(model, data.test.pixels, hardware, with_stages=True)
        by_seed.append(gates.look_into(model, outputs, data.test, len(data.classes), hardware))
    return gates.score(by_seed, RULES, 42)


def test_gates_are_those_of_the_blocks(trained, stressed):
    _, hardware, data, networks = trained
    hardware = dataclasses.replace(hardware, precision="fp32")
    model = networks["se_attention"].model
    before = copy.deepcopy(model.state_dict())
    found = study([model], data, hardware)
    with torch.no_grad():
        x = F.relu(model.stem(model.normalise(to_input(data.test.pixels))))
        learnt = model.attention[0].gate(model.stages[0](x))
    ring = data.classes.index("ring")
    expected = learnt[data.test.labels == ring].mean(0).numpy()
    np.testing.assert_allclose(found.mean_by_class[1][ring], expected, atol=1e-4)
    assert list(found.share_between_classes) == [1, 2, 3]
    assert all(0 <= share.mean() <= 1 for share in found.share_between_classes.values())
    assert gates.has_gates(model) and not gates.has_gates(networks["baseline"].model)
    assert all(
        isinstance(block, main.SEBlock) for block in model.attention
    )  # only the copy's were fixed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert stressed["se_attention"].gates is not None and stressed["baseline"].gates is None


def test_gates_held_at_their_means_cost_nothing_where_they_answer_to_no_image(trained):
    """With the weights of the bottleneck at zero, every image has the same gates."""
    _, hardware, data, networks = trained
    model = copy.deepcopy(networks["se_attention"].model)
    for block in model.attention:
        torch.nn.init.zeros_(block.reduce.weight)
    found = study([model], data, hardware)
    assert found.accuracy_as_learnt.mean() == found.accuracy_at_means.mean()
    assert found.change.interval.value == 0 and found.change.p == 1


def test_gates_that_know_nothing_of_classes_have_no_variance_between_them():
    """However few images there are: of 5 a class, class means differ by chance alone."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        labels = torch.arange(50) % 10
        drawn = torch.from_numpy(rng.normal(0, 1, (50, 20))).float()
        means = torch.stack([drawn[labels == label].mean(0) for label in range(10)])
        spread = gates.spread_of(drawn, means, labels)
        shares.append(gates.share_between(spread.mean(0)))
    assert abs(np.mean(shares)) < 0.01


def test_stages_without_gates_are_left_out(trained):
    """As where the last stage alone has attention; and gates that never change know no classes."""
    _, hardware, data, networks = trained
    model = copy.deepcopy(networks["se_attention"].model)
    model.attention[0] = torch.nn.Identity()
    torch.nn.init.zeros_(model.attention[2].reduce.weight)
    found = study([model], data, hardware)
    assert gates.has_gates(model)
    assert list(found.mean_by_class) == list(found.share_between_classes) == [2, 3]
    assert 0 < found.share_between_classes[2].mean() < 1
    assert found.share_between_classes[3].mean() == 0


def test_several_seeds_gates_are_tested_together(trained):
    _, hardware, data, networks = trained
    models = [networks["se_attention"].model] * 2
    found = study(models, data, hardware)
    one = study(models[:1], data, hardware)
    assert found.accuracy_at_means.by_seed.tolist() == [one.accuracy_at_means.mean()] * 2
    assert found.change.interval.value == pytest.approx(one.change.interval.value)
    assert one.change.interval.value == pytest.approx(
        one.accuracy_as_learnt.mean() - one.accuracy_at_means.mean()
    )


def test_p_is_corrected_over_the_networks():
    rng = np.random.default_rng(0)
    scores = {}
    for key in "abc":
        correct = rng.random((2, 300)) < 0.8
        at_means = rng.random((2, 300)) < 0.75
        spread = {1: rng.random((300, 2))}
        by_seed = [
            gates.SeedGates({1: np.zeros(2)}, spread, *pair)
            for pair in zip(correct, at_means, strict=True)
        ]
        scores[key] = gates.score(by_seed, statistics.Settings(score_resamples=10), 42)
    corrected = gates.correct_over_networks(scores, 0.05)
    holm = multipletests([one.change.p for one in scores.values()], method="holm")[1]
    assert [one.change.p_holm for one in corrected.values()] == pytest.approx(holm.tolist())
    assert gates.correct_over_networks({}, 0.05) == {}


def test_gates_held_fixed_compute_in_the_arithmetic_of_those_that_are_not():
    """Else gates at their means would be compared with gates as learnt in another arithmetic."""
    activations = torch.randn(3, 5, 4, 4, dtype=torch.bfloat16)
    means = torch.rand(5)
    found = gates.FixedGates(means)(activations)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, activations * means.bfloat16()[:, None, None])
