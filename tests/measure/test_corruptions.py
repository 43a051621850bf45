"""Corruptions: what the benchmark's own code makes of the same draws, pinned pixels, and more."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F

from lab.data import shapes
from lab.data.images import Dataset
from lab.measure import corruptions

CORRUPTIONS = {corruption.name: corruption for corruption in corruptions.ALL}
NAMES = sorted(CORRUPTIONS)

# Sums of position-weighted pixels, modulo a prime, of `blocks` at severities 1, 3 and 5.
PINNED = {
    "gaussian_noise": [985860, 253522, 223871],
    "shot_noise": [851506, 322391, 605279],
    "impulse_noise": [822885, 383548, 472627],
    "speckle_noise": [839075, 252539, 44353],
    "gaussian_blur": [976003, 542935, 464778],
    "defocus_blur": [899352, 624577, 518973],
    "glass_blur": [65647, 226536, 607571],
    "motion_blur": [695847, 614773, 81618],
    "snow": [187104, 133326, 535703],
    "spatter": [130406, 466061, 377019],
    "zoom_blur": [190931, 50761, 589814],
    "fog": [58817, 276640, 271623],
    "brightness": [413985, 392639, 241822],
    "contrast": [124184, 4491, 624042],
    "saturate": [736076, 308859, 832513],
    "elastic_transform": [698803, 178086, 650315],
    "pixelate": [728, 721254, 435436],
    "jpeg_compression": [708669, 753385, 817986],
}


def blocks(count=20):
    """Images of coloured blocks, made of whole numbers alone: the same on every machine."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return torch.from_numpy(coarse.repeat(4, 1).repeat(4, 2))


def checksum(pixels):
    flat = pixels.flatten().long()
    return int((flat * (torch.arange(len(flat)) % 1009 + 1)).sum() % 1_000_003)


def test_constants_are_the_benchmarks():
    """Those of make_cifar_c.py in hendrycks/robustness, typed from there."""
    benchmark = {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot_noise": (500, 250, 100, 75, 50),
        "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
        "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "glass_blur": ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),  # max_delta is 1
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "spatter": (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0), (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        "elastic_transform": (
            (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        "jpeg_compression": (80, 65, 58, 50, 40),
    }  # fmt: skip
    found = {}
    for name, corruption in CORRUPTIONS.items():
        found[name] = tuple(plain(strength) for strength in corruption.strengths[1:])
    assert found == benchmark
    extra = {name for name, corruption in CORRUPTIONS.items() if corruption.is_extra}
    assert extra == {"speckle_noise", "gaussian_blur", "spatter", "saturate"}


def plain(strength):
    """Numbers without their names."""
    return dataclasses.astuple(strength) if dataclasses.is_dataclass(strength) else strength


def test_glass_blur_takes_pixels_as_the_benchmarks_loop_does():
    """Which walks from the last pixel, and where it was to swap two copies the one to the other."""
    x = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    for rounds in (1, 2):
        drawn = np.random.default_rng(7)
        expected = x.copy()
        for _ in range(rounds):
            up, left = drawn.integers(0, 2, (2, 3, 32, 32))
            for k in range(3):
                for h in range(31, 1, -1):
                    for w in range(31, 1, -1):
                        expected[k, h, w] = expected[k, h - up[k, h, w], w - left[k, h, w]]
        found = corruptions.glass_blur(x / 255, (0, rounds), np.random.default_rng(7))
        assert np.array_equal(corruptions.round_down(found), expected)
        assert not np.array_equal(expected, x)


class Replayed:
    """Stands for a generator: draws for each image what the benchmark's code drew for it.

    That code corrupts one image after the other, and draws from NumPy's old generator.
    """

    def __init__(self, seeds):
        self.images = [np.random.RandomState(seed) for seed in seeds]

    def normal(self, mean, deviation, shape):
        return np.stack([image.normal(mean, deviation, shape[1:]) for image in self.images])

    def poisson(self, rates):
        drawn = zip(self.images, rates, strict=True)
        return np.stack([image.poisson(of_image) for image, of_image in drawn])

    def uniform(self, low, high, shape):
        if isinstance(shape, int):  # an angle for each image
            return np.array([image.uniform(low, high) for image in self.images])
        if shape[1:3] == (
            32,
            32,
        ):  # a wave: first all that goes to the right, then all that goes down
            drawn = [image.uniform(low, high, (2, 32, 32)) for image in self.images]
            return np.moveaxis(np.stack(drawn), 1, -1)
        if len(shape) == 4:  # a sky's noise: for middles, then for edges
            of_one = (3, *shape[2:])
            return np.stack([image.uniform(low, high, of_one) for image in self.images], axis=1)
        return np.stack([image.uniform(low, high, shape[1:]) for image in self.images])

    def integers(self, low, high, shape):
        """Glass: -1 or 0 for each pixel, the last first, which is where to copy from."""
        drawn = np.zeros(shape, int)
        for k, image in enumerate(self.images):
            for row in range(31, 1, -1):
                for column in range(31, 1, -1):
                    right, down = image.randint(-1, 1, size=2)
                    drawn[:, k, row, column] = -down, -right
        return drawn


COUPLED = [name for name in NAMES if name != "impulse_noise"]
# These round nowhere else than the benchmark; the others do, to the next level for some pixels.
EXACT = (
    "gaussian_noise", "shot_noise", "speckle_noise", "glass_blur", "fog", "brightness", "contrast",
    "gaussian_blur", "saturate", "pixelate", "jpeg_compression",
)  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_the_benchmarks_own_code_makes_the_same_of_the_same_draws(name):
    """Images that benchmarks/corruption_references.py has made with that code."""
    with np.load(Path(__file__).with_name("cifar10c_reference.npz")) as reference:
        images = reference["images"]
        seeds = reference["seeds"]
        theirs = reference[name].astype(int)
    for severity in corruptions.SEVERITIES:
        corruption = CORRUPTIONS[name]
        draws = Replayed(seeds[severity - 1])
        made = corruption.apply(images / 255, corruption.strengths[severity], draws)
        difference = np.abs(corruptions.round_down(made) - theirs[severity - 1])
        assert difference.max() <= (0 if name in EXACT else 1), severity
        assert (difference > 0).mean() < 0.06


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_impulse_noise_hits_each_value_alone_and_as_often_as_the_benchmarks(severity):
    """scikit-image draws it so there: a share of all values, half of them 0 and half 255."""
    grey = torch.full((200, 32, 32, 3), 100, dtype=torch.uint8)
    noisy = corruptions.corrupt(grey, CORRUPTIONS["impulse_noise"], severity, 0)
    assert set(noisy.unique().tolist()) == {0, 100, 255}
    share = CORRUPTIONS["impulse_noise"].strengths[severity]
    hit = (noisy != 100).numpy()
    assert scipy.stats.binomtest(int(hit.sum()), hit.size, share).pvalue > 0.001
    assert scipy.stats.binomtest(int((noisy == 0).sum()), int(hit.sum()), 0.5).pvalue > 0.001
    pixels = hit[..., 0].size
    both = int((hit[..., 0] & hit[..., 1]).sum())
    assert scipy.stats.binomtest(both, pixels, share**2).pvalue > 0.001


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_snow_and_spatter_lie_where_they_should(severity):
    grey = torch.full((50, 32, 32, 3), 100, dtype=torch.uint8)
    snowed = corruptions.corrupt(grey, CORRUPTIONS["snow"], severity, 0).float()
    assert (snowed >= 100).all() and (snowed[..., 0] == snowed[..., 2]).all()
    turned = snowed.rot90(2, (1, 2))
    assert (snowed - turned).abs().max() <= 1  # flakes fall, and once more turned around
    spattered = corruptions.corrupt(grey, CORRUPTIONS["spatter"], severity, 0).float()
    change = spattered - grey
    touched = change.abs().amax(-1) > 2
    assert 0.005 < touched.float().mean() < 0.3
    colour = change[touched].mean(0)
    mud = torch.tensor([63.0, 42, 20]) - 100
    water = torch.tensor([175.0, 238, 238])
    expected = water if severity <= 3 else mud
    assert F.cosine_similarity(colour, expected, dim=0) > 0.99


LADDERS = [name for name in NAMES if name not in ("saturate", "spatter", "elastic_transform")]


@pytest.mark.parametrize("name", LADDERS)
def test_severity_five_changes_more_than_one(name):
    """Saturate and spatter are no ladders: they turn from less to more, from water to mud; the
    elastic transform goes from shifts to waves."""
    x = shapes.draw(100, 4).pixels
    changes = []
    for severity in (1, 5):
        made = corruptions.corrupt(x, CORRUPTIONS[name], severity, 0)
        changes.append(float((made.float() - x.float()).abs().mean()))
    assert changes[1] > changes[0]


@pytest.mark.parametrize("name", NAMES)
def test_strength_zero_gives_back_the_image(name):
    """But for rounding: on its way through other colours a value may lose what makes it whole."""
    ramp = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 32, 32, 3)
    pixels = torch.cat([shapes.draw(30, 1).pixels, ramp])
    made = corruptions.corrupt(pixels, CORRUPTIONS[name], 0, seed=3)
    assert (made.int() - pixels.int()).abs().max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_pinned_and_follow_the_seed(name):
    pixels = blocks()
    corruption = CORRUPTIONS[name]
    made = [corruptions.corrupt(pixels, corruption, severity, seed=0) for severity in (1, 3, 5)]
    assert [checksum(x) for x in made] == PINNED[name]
    assert all(
        torch.equal(x, corruptions.corrupt(pixels, corruption, k, 0))
        for x, k in zip(made, (1, 3, 5), strict=True)
    )
    drawn = name.endswith("_noise") or name in (
        "glass_blur", "motion_blur", "snow", "fog", "elastic_transform", "spatter",
    )  # fmt: skip
    assert torch.equal(made[2], corruptions.corrupt(pixels, corruption, 5, seed=1)) != drawn


def test_a_corruption_does_not_depend_on_its_place_in_the_table(monkeypatch):
    """One put before the others changes none of them; two of the same kind draw apart by name."""
    _, data = shapes.draw(20, 0), shapes.draw(20, 3)
    dataset = Dataset("made", tuple("abcdefghij"), ("a",), data, data, {})
    index = torch.arange(5)
    before = {name: corruptions.images_under(name, dataset, index, seed=42) for name in NAMES}
    twin = dataclasses.replace(CORRUPTIONS["gaussian_noise"], name="twin")
    monkeypatch.setattr(corruptions, "ALL", [twin, *reversed(corruptions.ALL)])
    assert corruptions.names_of(dataset) == [
        "twin",
        *(c.name for c in reversed(list(CORRUPTIONS.values()))),
    ]
    after = {name: corruptions.images_under(name, dataset, index, seed=42) for name in NAMES}
    assert all(torch.equal(before[name], after[name]) for name in NAMES)
    drawn = corruptions.images_under("twin", dataset, index, seed=42)
    assert not torch.equal(drawn, after["gaussian_noise"])


def test_corruptions_are_what_their_names_say():
    x = shapes.draw(50, 2).pixels
    made = {name: corruptions.corrupt(x, CORRUPTIONS[name], 3, 0).float() / 255 for name in NAMES}
    x = x.float() / 255
    assert (made["gaussian_noise"] - x).std() == pytest.approx(
        0.08, abs=0.012
    )  # clipped at the ends
    assert ((made["impulse_noise"] == 0) | (made["impulse_noise"] == 1)).float().mean() > 0.03
    assert (made["brightness"].amax(3) - x.amax(3))[x.amax(3) < 0.8].mean() == pytest.approx(
        0.15, abs=0.01
    )
    assert (made["contrast"].std((1, 2)) / x.std((1, 2)).clamp_min(1e-6)).mean() == pytest.approx(
        0.4, abs=0.03
    )

    def roughness(images):
        return images.diff(dim=1).abs().mean() + images.diff(dim=2).abs().mean()

    for name in ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur"):
        assert roughness(made[name]) < 0.8 * roughness(x)
        assert (made[name].mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().max() < 0.04
    for name in ("elastic_transform", "pixelate", "jpeg_compression", "fog", "saturate"):
        assert 0.005 < (made[name] - x).abs().mean() < 0.2
    assert (made["saturate"].amax(3) - x.amax(3)).abs().max() < 0.01  # value stays
