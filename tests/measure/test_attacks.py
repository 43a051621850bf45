"""Attacks: within their bounds, no weaker than a library's, and of any function to logits."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import KEYS
from statsmodels.stats.multitest import multipletests

from lab.data import shapes
from lab.data.images import Images, to_input
from lab.machine.device import Hardware
from lab.measure import attacks, statistics
from lab.measure.attacks import Attacked

QUICK = attacks.Settings(epsilons=(2, 8), attack_steps=10)


def attack(networks, key, images, settings=QUICK, precision="fp32"):
    models = {name: one.model.eval() for name, one in networks.items()}
    hardware = Hardware(torch.device("cpu"), precision, "", eval_batch=40)
    return attacks.attack(key, models, images, settings, hardware)


@pytest.mark.parametrize("epsilon", [2 / 255, 8 / 255])
def test_attacks_stay_in_the_ball_and_in_the_image(trained, epsilon):
    _, hardware, data, networks = trained
    pixels = data.test.pixels[:60].clone()
    ends = pixels[:20].where(pixels[:20] > 128, 0).where(pixels[:20] < 128, 255)
    pixels[:20] = ends  # at the range's ends
    x = to_input(pixels)
    labels = data.test.labels[:60]
    model = networks["baseline"].model.eval()
    victims = attacks.find_victims(model, x, labels, hardware)
    towards = torch.zeros_like(labels)
    how = attacks.Round(steps=20, entry=0)
    pushed = attacks.push(model, victims, x, towards, epsilon, how, hardware).images
    change = (pushed - x).abs()
    assert 0.9 * epsilon < change.max() <= epsilon + 1e-6
    assert pushed.min() >= 0 and pushed.max() <= 1
    fooled = model(pushed).argmax(1) != labels
    assert fooled.any() and not (model(x).argmax(1) != labels).all()


@pytest.mark.slow
@pytest.mark.parametrize("network", KEYS)
def test_attacks_leave_no_more_than_autoattacks_parts_do(trained, network):
    """APGD on cross-entropy and on the ratio of logits, and Square, as ART has them: of 30 images
    at most one more is left than all of these together leave. On CIFAR-10, with more steps and
    images, benchmarks/attacks.py asks the same."""
    from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
    from art.estimators.classification import PyTorchClassifier

    _, _, data, networks = trained
    images = data.test.select(torch.arange(30))
    model = networks[network].model.eval()
    theirs = PyTorchClassifier(
        model, torch.nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1), device_type="cpu"
    )
    x = to_input(images.pixels).numpy()
    labels = images.labels.numpy()
    epsilons = (0.5, 2)
    found = attack(networks, network, images, attacks.Settings(epsilons=epsilons))
    for k, epsilon in enumerate(epsilons):
        step = 2 * epsilon / 255
        common = {"eps": epsilon / 255, "verbose": False}
        left = theirs.predict(x).argmax(1) == labels
        for made in (
            AutoProjectedGradientDescent(
                theirs, eps_step=step, max_iter=30, nb_random_init=1,
                loss_type="cross_entropy", **common,
            ),
            AutoProjectedGradientDescent(
                theirs, eps_step=step, max_iter=30, nb_random_init=1,
                loss_type="difference_logits_ratio", **common,
            ),
            SquareAttack(theirs, max_iter=100, nb_restarts=1, **common),
        ):  # fmt: skip
            adversarial = made.generate(x, labels)
            assert np.abs(adversarial - x).max() <= epsilon / 255 + 1e-6
            left &= theirs.predict(adversarial).argmax(1) == labels
        assert found.robust[k].sum() <= left.sum() + 1, (epsilon, left.sum())
        assert epsilon > 1 or left.sum() > 3  # there is something to find


def test_attacks_hurt_more_the_farther_they_may_go(stressed):
    for one in stressed.values():
        scores = one.attacks
        assert scores.epsilons == (0.25, 0.5, 1, 2, 4, 8)
        robust = [accuracy.mean() for accuracy in scores.robust]
        assert scores.clean.mean() >= robust[0] > robust[-1]
        assert (np.diff(robust) <= 0).all()
        assert not scores.is_masked()
        median = scores.median_epsilon
        assert 0.25 < median.interval.low < median.by_seed[0] < median.interval.high < 8


@pytest.fixture(scope="module")
def attacked(trained):
    """The first of the test images, and the attack on the Baseline there."""
    _, _, data, networks = trained
    images = data.test.select(torch.arange(20))
    return images, attack(networks, "baseline", images)


class Scaled(torch.nn.Module):
    """A network whose logits are multiplied: as by a temperature."""

    def __init__(self, model, factor):
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, x):
        return self.factor * self.model(x)


@pytest.mark.parametrize("factor", [1 / 64, 16])  # powers of two: exact
def test_a_temperature_changes_nothing_under_attack(trained, attacked, factor):
    *_, networks = trained
    images, before = attacked
    model = Scaled(networks["baseline"].model, factor)
    scaled = {**networks, "baseline": dataclasses.replace(networks["baseline"], model=model)}
    after = attack(scaled, "baseline", images)
    assert 0 < before.robust.mean() < before.clean.mean()
    assert np.array_equal(before.robust, after.robust)
    key = "se_attention"
    assert np.array_equal(before.correct_by_others[key], after.correct_by_others[key])


def test_attacks_are_as_strong_where_first_gradients_are_rough(trained, attacked):
    """As of networks that were trained in bfloat16."""
    *_, networks = trained
    images, fp32 = attacked
    bf16 = attack(networks, "baseline", images, QUICK, "bf16")
    assert np.abs(fp32.robust.sum(1) - bf16.robust.sum(1)).max() <= 1


class Unsure(torch.nn.Module):
    """A network that bfloat16 makes err on every image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        return -logits if torch.is_autocast_enabled("cpu") else logits


def test_only_float32_says_what_has_fallen(trained, attacked):
    """And what a rough arithmetic takes for misclassified as it is, is pushed by float32."""
    *_, networks = trained
    images, fp32 = attacked
    hardware = Hardware(torch.device("cpu"), "bf16", "", eval_batch=40)
    model = networks["baseline"].model.eval()
    unsure = Unsure(model)
    found = attacks.attack("unsure", {"unsure": unsure}, images, QUICK, hardware)
    assert found.clean.any() and np.array_equal(found.clean, fp32.clean)
    assert np.array_equal(found.robust, fp32.robust)
    x = to_input(images.pixels)
    victims = attacks.find_victims(unsure, x, images.labels, hardware)
    rough = attacks.race(unsure, victims, 8 / 255, QUICK.rounds()[:1], hardware)
    assert np.array_equal(rough.robust, fp32.clean)


class Curved(torch.nn.Module):
    """A network whose farthest class, were it linear, is the only one that is within reach."""

    def forward(self, x):
        change = 255 * (x.flatten(1).mean(1) - 0.5)
        label = torch.zeros_like(change)
        straight = (change - 1.2).repeat(8, 1)
        curved = -change + 0.7 * change**2 - 1.5  # the other way
        return torch.stack([label, *straight, curved], dim=1)


def test_a_class_that_seems_farther_than_others_is_tried():
    images = Images(torch.full((3, 3, 32, 32), 0.5), torch.zeros(3, dtype=torch.int64))
    settings = attacks.Settings(epsilons=(0.7, 1))
    hardware = Hardware(torch.device("cpu"), "fp32", "", eval_batch=16)
    found = attacks.attack("curved", {"curved": Curved()}, images, settings, hardware)
    assert found.robust.tolist() == [[True] * 3, [False] * 3]


def test_an_image_is_pushed_as_long_as_a_class_is_near():
    """Of a linear module, whose gaps close at a known rate."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    x = torch.full((6, 3, 32, 32), 0.5) + 0.1 * torch.rand(6, 3, 32, 32)
    labels = model(x).argmax(1)
    hardware = Hardware(torch.device("cpu"), "fp32", "")
    victims = attacks.find_victims(model, x, labels, hardware)
    pushed = []

    def count_pushes(images):
        if images.requires_grad:
            pushed.append(len(images))
        return model(images)

    rounds = attacks.Settings().rounds()
    counts = set()
    for share in (0.3, 0.55, 0.7, 0.95):
        for k in range(6):
            limit = share * victims.distances[k, 0].item()
            pushed.clear()
            one = victims.select(torch.tensor([k]))
            tried = attacks.race(count_pushes, one, limit, rounds, hardware)
            assert tried.robust.all()
            expected = steps_of_linear(victims.distances[k, :9], limit)
            assert sum(pushed) == expected, (share, k)
            counts.add(expected)
    assert {6, 16, 22} < counts and max(counts) > 100


def steps_of_linear(distances, limit):
    """How often an image is pushed if the gaps to classes so far away close at a known rate."""
    in_reach = distances <= limit + attacks.BEND * limit**2
    in_reach[0] = True  # the nearest class is tried even so
    closed = in_reach * limit / distances
    entered = torch.stack([in_reach, closed >= 0.6, closed >= 0.85])
    return (entered.sum(1) * torch.tensor([6, 10, 40])).sum().item()


class Coarse(torch.nn.Module):
    """A network that rounds its images: no gradient comes through, and little is withstood."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((x * 128).round() / 128 + 0 * x)


def test_masked_gradients_are_found_by_what_fools_other_networks(trained):
    _, _, data, networks = trained
    images = data.test.select(torch.arange(40))
    coarse = dataclasses.replace(networks["baseline"], model=Coarse(networks["baseline"].model))
    tried = {"baseline": coarse, "se_attention": networks["baseline"]}
    found = {key: [attack(tried, key, images)] for key in tried}
    scores = attacks.score(found, QUICK.epsilons, statistics.Settings(), 42)
    robust = np.mean([accuracy.mean() for accuracy in scores["baseline"].robust])
    assert robust > scores["baseline"].clean.mean() - 1
    assert scores["baseline"].is_masked() and not scores["se_attention"].is_masked()


def test_distances_are_those_of_a_linear_network():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(10, 3 * 32 * 32, generator=generator)

    def model(x):
        return x.flatten(1) @ weights.T

    x = torch.rand(5, 3, 32, 32, generator=generator)
    labels = model(x).argmax(1)
    hardware = Hardware(torch.device("cpu"), "fp32", "")
    found = attacks.class_distances(model, x, labels, hardware)
    for n, label in enumerate(labels.tolist()):
        for target in range(10):
            gap = (model(x)[n, label] - model(x)[n, target]).item()
            length = (weights[label] - weights[target]).abs().sum().item()
            expected = np.inf if target == label else gap / length
            assert found[n, target].item() == pytest.approx(expected, rel=1e-3)


def test_scores_of_attacks_are_those_of_their_images():
    """Two seeds, three epsilons, four images, counted by hand."""
    clean = np.array([True, True, True, False])
    one = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    two = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    seen = np.ones((3, 4), bool)
    found = {}
    for key, other in (KEYS, reversed(KEYS)):
        found[key] = [Attacked(clean, of_seed, {other: seen}) for of_seed in (one, two)]
    found["se_attention"][0] = Attacked(clean, two, {"baseline": one})
    scores = attacks.score(found, (1, 2, 4), statistics.Settings(), 42)
    assert scores["baseline"].epsilons == (1, 2, 4)
    assert scores["baseline"].clean.by_seed.tolist() == [75, 75]
    robust = [accuracy.by_seed.tolist() for accuracy in scores["baseline"].robust]
    assert robust == [[50, 75], [25, 50], [0, 25]]
    assert scores["baseline"].transferred.tolist() == [[50, 25, 0], [100, 100, 100]]
    assert scores["baseline"].change is None
    assert [interval.value for interval in scores["se_attention"].change] == [12.5, 12.5, 12.5]
    # Of three images two withstand 1 and one 2: half of them what lies between, by its logarithm
    expected = [2**0.5, 2**1.5]
    assert scores["baseline"].median_epsilon.by_seed.tolist() == pytest.approx(expected)


# Of any function to logits


def attack_and_show_twin(model, images, settings):
    """The attack on a module, and what the same module under another name answers to it."""
    hardware = Hardware(torch.device("cpu"), "fp32", "", eval_batch=16)
    ticks = []
    networks = {"any": model, "twin": model}
    found = attacks.attack("any", networks, images, settings, hardware, ticks.append)
    assert sum(ticks) == len(images) * len(settings.epsilons)
    assert list(found.correct_by_others) == ["twin"]
    return found, found.correct_by_others["twin"]


def test_the_attack_on_a_linear_module_finds_its_true_limits():
    """Of a plain module, and of images so grey that no change leaves their range, it is known which
    changes suffice: the gap to another class's logit over the L1 norm of the weights' difference.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    pixels = torch.randint(100, 156, (40, 32, 32, 3), dtype=torch.uint8)
    x = to_input(pixels)
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % 10  # which it gets wrong as it is
    weights = model[1].weight
    gaps = model(x).gather(1, labels[:, None]) - model(x)
    lengths = (weights[labels][:, None] - weights).abs().sum(2)
    distances = (gaps / lengths.clamp_min(1e-9)).scatter(1, labels[:, None], np.inf)
    nearest = 255 * distances.amin(1).detach()
    epsilons = nearest[1:].quantile(torch.tensor([0.8, 0.2, 0.45])).tolist()  # between two images'
    assert max(epsilons) < 100
    settings = attacks.Settings(epsilons=tuple(epsilons), attack_steps=10)
    found, by_twin = attack_and_show_twin(model, Images(pixels, labels), settings)
    assert found.clean.tolist() == [False] + [True] * 39
    for k, epsilon in enumerate(sorted(epsilons)):
        assert np.array_equal(found.robust[k], found.clean & (nearest > epsilon).numpy())
    assert np.array_equal(by_twin[-1], found.robust[-1])


def test_any_module_can_be_attacked():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(8 * 7 * 7, 10),
    ).eval()  # fmt: skip
    pixels = shapes.draw(40, 1).pixels
    images = Images(pixels, model(to_input(pixels)).argmax(1))
    settings = attacks.Settings(epsilons=(8, 0.1, 2), attack_steps=10)
    found, by_twin = attack_and_show_twin(model, images, settings)
    assert found.clean.all()
    assert (found.robust.dtype, found.robust.shape) == (bool, (3, 40))
    left = found.robust.mean(1)
    assert left[0] > left[1] > left[2] and left[2] < 0.2
    assert np.array_equal(by_twin[-1], found.robust[-1])


class Banded(torch.nn.Module):
    """A network that errs where its pixels' mean lies in a narrow band, which large steps jump
    over: gradients lead through it and on."""

    def forward(self, x):
        change = 255 * (x.flatten(1).mean(1) - 0.5)
        outside = ((change - 1).abs() > 0.1).float()
        outwards = change - change.detach()
        return torch.stack([outside - outwards, 0.5 + outwards], dim=1)


def test_what_withstands_a_large_change_is_tried_with_small_ones_too():
    """And what falls to a small one has fallen to all larger ones."""

    pixels = torch.full((3, 32, 32, 3), 0.5)
    images = Images(pixels.permute(0, 3, 1, 2), torch.zeros(3, dtype=torch.int64))
    settings = attacks.Settings(epsilons=(0.5, 1, 2, 8), attack_steps=20)
    hardware = Hardware(torch.device("cpu"), "fp32", "", eval_batch=16)
    model = Banded()
    victims = attacks.find_victims(model, images.pixels, images.labels, hardware)
    how = attacks.Round(steps=20, entry=0)
    towards = torch.zeros_like(images.labels)
    far = attacks.push(model, victims, images.pixels, towards, 8 / 255, how, hardware)
    assert (model(far.images).argmax(1) == 0).all()  # it jumps over the band
    assert not far.fell.any()
    found = attacks.attack("banded", {"banded": model}, images, settings, hardware)
    assert found.robust.tolist() == [[True] * 3, [False] * 3, [False] * 3, [False] * 3]


@pytest.mark.parametrize(("more", "masked"), [(0, False), (1, False), (2, False), (12, True)])
def test_gradients_are_called_masked_beyond_chance_alone(more, masked):
    """`more` of 100 images are fooled by what was made for the other network alone."""
    epsilons = (1.0, 2.0, 4.0)
    robust = np.zeros((3, 100), bool)
    robust[:, :60] = True
    transferred = robust.copy()
    transferred[1, :more] = False
    clean = np.ones(100, bool)
    found = {
        "baseline": [Attacked(clean, robust, {"se_attention": robust})],
        "se_attention": [Attacked(clean, robust, {"baseline": transferred})],
    }
    scores = attacks.score(found, epsilons, statistics.Settings(), 42)
    assert scores["baseline"].is_masked() == masked
    assert not scores["se_attention"].is_masked()
    transfer = scores["baseline"].transfer[1]
    assert transfer.interval.value == -more and transfer.p_holm >= transfer.p


@pytest.mark.slow
@pytest.mark.parametrize("networks", [2, 8])
def test_noise_is_seldom_called_masked_gradients(networks):
    """200 experiments of three epsilons in which no attack is the stronger: of any network in 5 %,
    and three standard errors, at most."""
    rng = np.random.default_rng(0)
    rules = statistics.Settings(score_resamples=10)
    called = 0
    for _ in range(200):
        robust = rng.random((networks, 3, 100)) < 0.5
        seen = robust ^ (rng.random((networks, 3, 100)) < 0.05)  # by the network before
        found = {}
        for k in range(networks):
            correct = {str(other): np.ones((3, 100), bool) for other in range(networks)}
            correct[str((k + 1) % networks)] = seen[(k + 1) % networks]
            found[str(k)] = [Attacked(np.ones(100, bool), robust[k], correct)]
        scores = attacks.score(found, (1.0, 2.0, 4.0), rules, 42)
        called += any(one.is_masked() for one in scores.values())
    assert called / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200), called


def test_transfers_p_is_corrected_over_epsilons_and_networks():
    rng = np.random.default_rng(1)
    robust = rng.random((3, 2, 100)) < 0.5
    found = {}
    for k, key in enumerate("abc"):
        seen = {other: rng.random((2, 100)) < 0.6 for other in "abc" if other != key}
        found[key] = [Attacked(np.ones(100, bool), robust[k], seen)]
    scores = attacks.score(found, (1.0, 2.0), statistics.Settings(), 42)
    every = [one for of_network in scores.values() for one in of_network.transfer]
    holm = multipletests([one.p for one in every], method="holm")[1]
    assert [one.p_holm for one in every] == pytest.approx(holm.tolist())
    for k, key in enumerate("abc"):
        others = [found[other][0].correct_by_others[key] for other in "abc" if other != key]
        correct = np.logical_and(*others)
        assert scores[key].transferred.tolist() == [(100 * correct.mean(1)).tolist()]
        lost = 100 * (correct.mean(1) - robust[k].mean(1))
        values = [one.interval.value for one in scores[key].transfer]
        assert values == pytest.approx(lost.tolist())
