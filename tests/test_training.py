"""Training: splits, crops, optimisers, and that networks learn the same bits side by side."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from helpers import BASELINE, SE, refused, small_network, small_recipe, tiny
from torch import nn

import main
from lab.machine.device import Hardware, MachineSettings, prepare_machine
from lab.measure.models import build_network, draws_in_training


def test_a_loss_that_is_not_finite_stops_training(tmp_path, capsys):
    message = refused(capsys, *tiny(tmp_path, "--precision", "fp32", "--learning-rate", "1e8"))
    for part in ("epoch 1", "step", "learning rate ", "--learning-rate"):
        assert part in message
    assert not list(tmp_path.rglob("*.pth"))


def test_plain_sgd_trains(tmp_path, undrawn):
    plain = ("--momentum", "0", "--muon-momentum", "0", "--precision", "fp32")
    main.main(tiny(tmp_path, *plain))
    assert (tmp_path / "results" / "summary.md").exists()


def job_for(network, recipe, folder):
    return main.TrainingJob(network, recipe, folder / "model.pth")


def train(network, recipe, folder):
    """Data, and the network trained on it."""
    data = main.load_data(main.Settings(recipe=recipe, shapes_test=20))
    hardware = prepare_machine(MachineSettings(precision="fp32"), networks=1)
    (one,) = main.train_all([job_for(network, recipe, folder)], data, hardware)
    return data, one


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_networks_side_by_side_learn_the_same_bits(tmp_path, precision):
    small = "--shapes-train 200 --shapes-test 20 --batch-size 90 --widths 8 8 16".split()
    data = main.load_data(main.parse_settings(tiny(tmp_path, *small)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    states = []
    for at_once in (1, 2):
        settings = main.parse_settings(tiny(tmp_path / str(at_once), *small))
        hardware = Hardware(torch.device("cpu"), precision, "", at_once=at_once)
        trained = main.train_all(main.training_jobs(settings), data, hardware)
        states.append([one.model.state_dict() for one in trained])
    torch.set_num_threads(threads)
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("size", "beyond"), [(32, 4), (24, 0), (20, 2)])
def test_crop_and_flip_is_torchvisions(size, beyond):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 32, 32, 3), generator=generator, dtype=torch.uint8)
    index = torch.randperm(50, generator=generator)
    last = 32 - size + beyond
    offsets = torch.randint(-beyond, last + 1, (50, 2), generator=generator)
    offsets[:3] = torch.tensor([[-beyond, -beyond], [last, last], [-beyond, last]])
    flip = torch.rand(50, generator=generator) < 0.5
    plan = main.EpochPlan(size, index, offsets, flip)
    ours = main.crop_and_flip(pixels, index, plan)
    for image, i in zip(ours, index, strict=True):
        (top, left), mirrored = offsets[i].tolist(), flip[i]
        padded = TF.pad(pixels[i].permute(2, 0, 1), 4, padding_mode="reflect")
        expected = TF.crop(padded, top + 4, left + 4, size, size)
        expected = TF.hflip(expected) if mirrored else expected
        assert torch.equal(image.permute(2, 0, 1), expected)


def test_epochs_are_planned_by_seed_and_epoch_alone():
    recipe = small_recipe()
    first, again, other = (main.plan_epoch(epoch, 1000, recipe) for epoch in (12, 12, 13))
    for name in ("order", "offsets", "flips"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert torch.equal(first.order.sort().values, torch.arange(1000))
    assert first.crop_size == 32
    assert (
        first.offsets.min() == -recipe.crop_padding and first.offsets.max() == recipe.crop_padding
    )
    assert 400 < first.flips.sum() < 600
    assert torch.equal(first.flips, ~other.flips)  # both sides of each image in two epochs
    crops = main.plan_epoch(0, 1000, recipe)
    assert crops.crop_size == recipe.crop_size
    assert (
        crops.offsets.min() == 0 and crops.offsets.max() == 32 - recipe.crop_size
    )  # crops stay inside
    sizes = [main.plan_epoch(epoch, 10, recipe).crop_size for epoch in range(recipe.epochs)]
    assert sizes == [24] * 12 + [32] * 3
    assert (
        main.plan_epoch(0, 10, small_recipe(epochs=1)).crop_size == 32
    )  # an only epoch sees whole images


def test_split_is_stratified_disjoint_and_seeded():
    labels = torch.arange(1000) % 10
    split, other = main.split_train(labels, 0.1, seed=42), main.split_train(labels, 0.1, seed=43)
    assert labels[split.training].bincount().tolist() == [90] * 10
    assert labels[split.validation].bincount().tolist() == [10] * 10
    training, validation = set(split.training.tolist()), set(split.validation.tolist())
    assert training | validation == set(range(1000)) and not training & validation
    assert torch.equal(split.validation, main.split_train(labels, 0.1, seed=42).validation)
    assert not torch.equal(split.validation, other.validation)


def test_each_seed_of_a_run_has_its_own_split():
    recipe = small_recipe(dataset="shapes", shapes_train=200)
    data = main.load_data(main.Settings(recipe=recipe, shapes_test=20, seeds=2))
    assert list(data.splits) == [42, 43]
    for seed, split in data.splits.items():
        assert torch.equal(
            split.validation, main.split_train(data.train.labels, 0.1, seed).validation
        )


def test_learning_rates_fall_linearly_to_zero(tmp_path, monkeypatch):
    recipe = small_recipe(dataset="shapes", shapes_train=200, epochs=3, batch_size=60)
    rates, real = {"Muon": [], "SGD": []}, main.train_step

    def note(*batch, training, hardware):
        found = real(*batch, training=training, hardware=hardware)
        for optimizer in training.optimizers:
            rates[type(optimizer).__name__].append([
                float(group["lr"]) for group in optimizer.param_groups
            ])
        return found

    monkeypatch.setattr(main, "train_step", note)
    train(BASELINE, recipe, tmp_path)
    shares = np.array([1 - k / 9 for k in range(9)])[:, None]
    np.testing.assert_allclose(rates["Muon"], recipe.muon_rate * shares, rtol=1e-6)
    expected = recipe.learning_rate * shares @ np.ones((1, 2))
    np.testing.assert_allclose(rates["SGD"], expected, rtol=1e-6)


def test_only_weights_of_linear_layers_decay():
    model = small_network(SE)
    muon, sgd = main.make_optimizers(model, small_recipe())
    decayed, plain = sgd.param_groups
    assert decayed["weight_decay"] == small_recipe().weight_decay and plain["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])
    kernels = muon.param_groups[0]["params"]
    assert all(p.ndim == 4 for p in kernels)
    groups = (kernels, decayed["params"], plain["params"])
    assert sum(map(len, groups)) == len(list(model.parameters())) - 1  # the stem is fixed


def test_orthogonalise_brings_singular_values_near_one():
    """To the 0.68 to 1.21 that its docstring names, in the directions of the matrix itself."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(30, 12, generator=generator))
    values = torch.linspace(0.05, 1, 12)
    values = values / values.norm()
    found = main.orthogonalise(5 * u @ values.diag() @ v.mT)  # its scale does not matter
    core = u.mT @ found @ v
    assert (core - core.diagonal().diag()).abs().max() < 1e-4
    assert core.diagonal().min() > 0.67 and core.diagonal().max() < 1.22


def test_muon_steps_along_the_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    gradient, before = torch.randn_like(p), p.detach().clone()
    p.grad = gradient.clone()
    main.Muon([p], lr=0.1, momentum=0.5).step()
    normed = before * 8**0.5 / before.norm()
    step = ((normed - p.detach()) / 0.1).flatten(1)
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    singular = torch.linalg.svdvals(step)
    assert singular.min() > 0.5 and singular.max() < 1.5  # about one in every direction
    assert F.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_early_epochs_see_crops_and_training_moves_all_but_the_stem(monkeypatch, tmp_path):
    recipe = small_recipe(
        dataset="shapes", shapes_train=200, epochs=4, crop_size=20, crop_epochs=0.5, batch_size=90
    )
    sizes = []
    real = main.SmallCNN.features
    monkeypatch.setattr(
        main.SmallCNN,
        "features",
        lambda m, x: sizes.append((m.training, x.shape[-1])) or real(m, x),
    )
    data, one = train(SE, recipe, tmp_path)
    tried_whether_it_draws, *trained_on = [size for training, size in sizes if training]
    assert tried_whether_it_draws == 32 and trained_on == [20] * 4 + [32] * 4
    assert {size for training, size in sizes if not training} == {32}
    fresh = build_network(SE, recipe, classes=10)
    fresh.measure_input(data.train.select(data.splits[42].training).pixels)
    moved = {
        n for n, p in one.model.named_parameters() if not torch.equal(p, fresh.get_parameter(n))
    }
    assert {n for n, _ in one.model.named_parameters()} - moved == {"stem.weight"}


class Dropped(main.SmallCNN):
    """A network of one's own, whose layers draw random numbers in training."""

    def classify(self, features):
        return super().classify(F.dropout(features, 0.3, self.training))


class AlsoDropped(main.SmallCNN):
    def features(self, images):
        return F.dropout2d(super().features(images), 0.2, self.training)


def test_networks_with_dropout_learn_the_same_bits_side_by_side_and_resumed(tmp_path, monkeypatch):
    """Though PyTorch has one generator for all threads, whose state no file holds."""
    networks = [
        dataclasses.replace(BASELINE, build=partial(Dropped, attention=nn.Identity)),
        dataclasses.replace(SE, build=partial(AlsoDropped, attention=nn.Identity)),
    ]
    monkeypatch.setattr(main, "NETWORKS", networks)
    small = "--shapes-train 200 --shapes-test 20 --batch-size 45 --widths 8 8 16 --epochs 3".split()
    data = main.load_data(main.parse_settings(tiny(tmp_path, *small)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def trained_in(folder, at_once):
        settings = main.parse_settings(tiny(tmp_path / folder, *small))
        hardware = Hardware(torch.device("cpu"), "fp32", "", at_once=at_once)
        found = main.train_all(main.training_jobs(settings), data, hardware)
        return [one.model.state_dict() for one in found]

    one_by_one = trained_in("one", 1)
    side_by_side = trained_in("two", 2)
    real = main.train_epoch

    def interrupted(training, step, epoch, hardware):
        if epoch == 1:
            raise KeyboardInterrupt
        return real(training, step, epoch, hardware)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main, "train_epoch", interrupted)
        trained_in("resumed", 2)
    assert list((tmp_path / "resumed").rglob("*_resume.pth"))
    torch.rand(7)  # whatever else draws meanwhile
    resumed = trained_in("resumed", 2)
    torch.set_num_threads(threads)
    for other in (side_by_side, resumed):
        for state, expected in zip(other, one_by_one, strict=True):
            assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert draws_in_training(build_network(networks[0], small_recipe(), 10), SOME_IMAGES)
    assert not draws_in_training(small_network(BASELINE), SOME_IMAGES)


SOME_IMAGES = torch.rand(2, 3, 32, 32)
