"""The parts of main.py, each against an independent reference."""

import dataclasses
import re
import threading
import time
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from conftest import tiny
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import main

BASELINE, SE = main.NETWORKS[:2]
KEYS = [network.key for network in main.NETWORKS]


def small_recipe(**changes):
    return main.Recipe(**{"stem": 4, "widths": (16, 16, 32), "reduction": 4, **changes})


def small_network(network, **changes):
    return main.build_network(network, small_recipe(**changes), classes=10)


def job_for(network, recipe, folder):
    return main.TrainingJob(network, recipe, folder / "model.pth")


def train(network, recipe, folder):
    """Data, and the network trained on it."""
    settings = main.Settings(recipe=recipe)
    data = main.load_data(settings)
    (one,) = main.train_all(
        [job_for(network, recipe, folder)], data, main.prepare_machine(settings)
    )
    return data, one


def evaluation(logits, labels, network=BASELINE, model=None):
    """An evaluation of given logits."""
    trained = main.TrainedNetwork(network, 42, model, None)
    outputs = main.Outputs(features=logits, logits=logits)
    return main.evaluate(trained, outputs, labels, main.HeldOut(outputs, labels))


# Settings


def flag(name):
    return name.replace("_", "-")


def options(settings_class=main.Settings):
    """Name, help and default of every option, with all that its annotation says."""
    hints = typing.get_type_hints(settings_class, include_extras=True)
    for field in dataclasses.fields(settings_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options(hints[field.name])
        else:
            yield field.name, field.default, hints[field.name]


def test_help_lists_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main.parse_settings(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert ended.value.code == 0
    for name, default, _ in options():
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default or "''"
        shown = default if default in (False, None) else shown
        mentions = [text[found.start() :] for found in re.finditer(f"--{flag(name)} ", text)]
        assert any(f"(default: {shown})" in mention[:250] for mention in mentions), name


def test_every_number_has_a_range_and_every_default_lies_in_it():
    """So that a new option without one is noticed."""
    for name, default, hint in options():
        numbers = default if isinstance(default, tuple) else (default,)
        if numbers and type(numbers[0]) in (int, float):
            (allowed,) = [part for part in hint.__metadata__ if isinstance(part, main.Between)]
            assert all(allowed.least <= number <= allowed.most for number in numbers), name


def test_command_line_becomes_settings():
    settings = main.parse_settings([
        "--dataset",
        "shapes",
        "--widths",
        "8",
        "9",
        "--learning-rate",
        "0.5",
        "--retrain",
    ])
    recipe = settings.recipe
    assert (recipe.widths, recipe.learning_rate, recipe.epochs, settings.retrain) == (
        (8, 9),
        0.5,
        15,
        True,
    )
    assert str(settings.output()) == str(main.Path("output", "shapes"))
    assert str(main.parse_settings([]).output()) == "output"


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--dataset shapes --seeds 3 --stress quick",
        "--widths 8 9 --learning-rate 0.5 --retrain --attack-images 30",
        "--epsilons 0.5 2.0 --precision fp32 --sure-levels 50.0 60.0",
    ],
)
def test_settings_become_the_command_line(options):
    given = options.split()
    where = ["--data-dir", "there", "--output-dir", "here", "--mirror", "http://x"]
    command = main.command_line(main.parse_settings([*given, *where])).split()
    assert command[:2] == ["python", "main.py"] and sorted(command[2:]) == sorted(given)
    assert main.parse_settings(command[2:]) == main.parse_settings(given)


def test_images_are_not_joined_where_that_does_not_pay(monkeypatch):
    monkeypatch.setattr(main, "has_amx", lambda: False)
    monkeypatch.setattr(main.Convolution, "forward_side_by_side", None)  # calling it would fail
    with torch.autocast("cpu", torch.bfloat16):
        assert main.Convolution(8, 16)(torch.randn(4, 8, 4, 4)).shape == (4, 16, 4, 4)


@pytest.mark.parametrize(("seconds", "expected"), [(1, "fp32"), (0.8, "fp32"), (0.75, "bf16")])
def test_precision_is_chosen_by_measuring(monkeypatch, seconds, expected):
    """bfloat16 takes these seconds where float32 takes one; the first try takes longer."""
    tries = []

    def measured(dtype):
        tries.append(dtype)
        first = 5 if len(tries) <= 2 else 0
        return first + (seconds if dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(main, "seconds_of_convolution", measured)
    assert main.prepare_machine(main.Settings(device="cpu")).precision == expected
    for asked in ("fp32", "bf16"):
        settings = main.Settings(device="cpu", precision=asked)
        assert main.prepare_machine(settings).precision == asked


def test_a_processor_of_any_kind_is_measured():
    assert all(main.seconds_of_convolution(t) > 0 for t in (torch.float32, torch.bfloat16))
    start = time.perf_counter()
    assert 0.01 < main.bfloat16_speedup() < 100
    assert time.perf_counter() - start < 20


# Side by side


@pytest.fixture
def two_at_once():
    """Hardware that does two things at once, whose threads are given back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield main.Hardware(torch.device("cpu"), "fp32", "", at_once=2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_work_side_by_side_shares_the_cores_and_keeps_its_order(two_at_once):
    together = threading.Barrier(2, timeout=30)

    def work(item):
        together.wait()  # would break if one came after the other
        return item, torch.get_num_threads()

    assert main.side_by_side(work, [3, 1, 2, 0], two_at_once) == [(k, 1) for k in (3, 1, 2, 0)]


@pytest.mark.parametrize("order", [[True, False], [False, True]])
@pytest.mark.parametrize("error", [main.UserError("no"), ZeroDivisionError(), KeyboardInterrupt()])
def test_work_ends_when_other_work_fails(two_at_once, order, error):
    ended = []

    def work(fails):
        if fails:
            time.sleep(0.2)
            raise error
        try:
            for _ in range(300):
                two_at_once.go_on()
                time.sleep(0.1)
        except main.UnwantedError:
            ended.append(True)
            raise

    start = time.monotonic()
    with pytest.raises(type(error)):
        main.side_by_side(work, order, two_at_once)
    assert ended == [True] and time.monotonic() - start < 5
    assert main.side_by_side(str, [1, 2], two_at_once) == ["1", "2"]  # it can work again


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_networks_side_by_side_learn_the_same_bits(tmp_path, precision):
    settings = main.parse_settings(tiny(tmp_path))
    data = main.load_data(settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    states = []
    for at_once in (1, 2):
        settings = main.parse_settings(tiny(tmp_path / str(at_once)))
        hardware = main.Hardware(torch.device("cpu"), precision, "", at_once=at_once)
        trained = main.train_all(main.training_jobs(settings), data, hardware)
        states.append([one.model.state_dict() for one in trained])
    torch.set_num_threads(threads)
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


# Data


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
    data = main.load_data(
        main.Settings(recipe=small_recipe(dataset="shapes", shapes_train=200), seeds=2)
    )
    assert list(data.splits) == [42, 43]
    for seed, split in data.splits.items():
        assert torch.equal(
            split.validation, main.split_train(data.train.labels, 0.1, seed).validation
        )


def test_shapes_are_drawn_from_their_seed_with_true_masks():
    images, again, other = (
        main.draw_shapes(200, 5),
        main.draw_shapes(200, 5),
        main.draw_shapes(200, 6),
    )
    assert torch.equal(images.pixels, again.pixels) and not torch.equal(images.pixels, other.pixels)
    assert images.labels.bincount().tolist() == [20] * 10
    area = images.masks.float().mean((1, 2))
    assert area.min() > 0.01 and area.max() < 0.6
    for pixels, mask in zip(
        images.pixels.float(), images.masks, strict=True
    ):  # inside has one colour, outside another
        inside, outside = pixels[mask].median(0).values, pixels[~mask].median(0).values
        assert (inside - outside).abs().max() > 50
    assert len(set(main.SHAPES.values())) == len(main.SHAPES) == 10


# Networks


def test_networks_differ_by_the_blocks_alone():
    baseline, attention = small_network(BASELINE), small_network(SE)
    ours, theirs = baseline.state_dict(), attention.state_dict()
    extra = set(theirs) - set(ours)
    assert (
        not set(ours) - set(theirs)
        and all(name.startswith("attention.") for name in extra)
        and extra
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for block in attention.attention:  # gates held at one: the same function
        torch.nn.init.zeros_(block.expand.weight)
        torch.nn.init.constant_(block.expand.bias, 100.0)
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(baseline.eval()(x), attention.eval()(x))


def test_se_block_is_the_papers():
    block = main.SEBlock(12, small_recipe(reduction=4))
    x = torch.randn(5, 12, 7, 6)
    w1, b1, w2, b2 = (p.detach().numpy().astype(np.float64) for p in block.parameters())
    z = x.numpy().mean((2, 3))
    s = 1 / (1 + np.exp(-(np.maximum(z @ w1.T + b1, 0) @ w2.T + b2)))
    np.testing.assert_allclose(
        block(x).detach().numpy(), x.numpy() * s[:, :, None, None], atol=1e-6
    )
    assert w1.shape == (3, 12)


@pytest.mark.parametrize("network", main.NETWORKS, ids=KEYS)
def test_gradients_lie_channels_last_wherever_activations_do(network):
    model, laid = small_network(network).train(), []

    def look(module, inputs, output):
        output.register_hook(
            lambda gradient: laid.append(gradient.is_contiguous(memory_format=torch.channels_last))
        )

    for stage in model.stages:
        for module in stage:
            module.register_forward_hook(look)
    model(torch.rand(3, 3, 24, 24).to(memory_format=torch.channels_last)).square().sum().backward()
    assert len(laid) == 21 and all(laid)


def test_costs_are_counted():
    convolutions = [
        (3, 8, 32),
        (8, 16, 32),
        (16, 16, 16),
        (16, 16, 16),
        (16, 16, 8),
        (16, 32, 8),
        (32, 32, 4),
    ]
    linear = [(16, 4), (4, 16)] * 2 + [(32, 8), (8, 32), (32, 10)]
    multiply_adds = sum(9 * i * o * s * s for i, o, s in convolutions) + sum(
        i * o for i, o in linear
    )
    parameters = sum(9 * i * o + 2 * o for i, o, _ in convolutions[1:]) + sum(
        i * o + o for i, o in linear
    )
    parameters += 9 * 3 * 8  # the stem has no batch norm
    layers = main.layer_costs(small_network(SE))
    assert sum(layer.parameters for layer in layers) == parameters
    assert sum(layer.multiply_adds for layer in layers) == multiply_adds
    assert [layer.name for layer in layers][:3] == ["stem", "stage 1", "attention 1"]
    assert "attention 1" not in [layer.name for layer in main.layer_costs(small_network(BASELINE))]


def test_a_network_normalises_by_its_buffers():
    model = small_network(BASELINE).eval()
    x = torch.rand(2, 3, 32, 32)
    plain = model((x - 0.5) / 0.25)
    model.mean.fill_(0.5)
    model.std.fill_(0.25)
    assert torch.allclose(model(x), plain, atol=1e-5)


def test_the_stem_whitens_patches():
    pixels = main.draw_shapes(300, 0).pixels
    recipe = small_recipe(stem=4, whitening_epsilon=0.0)
    model = main.build_network(BASELINE, recipe, classes=10)
    model.measure_input(pixels, recipe)
    x = model.normalise(main.to_input(pixels))
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    answers = (
        F.conv2d(x, model.stem.weight, stride=3)[:, :, :10, :10].permute(1, 0, 2, 3).flatten(1)
    )
    assert torch.allclose(answers[:4].cov(), torch.eye(4), atol=2e-3)
    assert torch.equal(answers[4:], -answers[:4])
    smooth = model.stem.weight[0].std((1, 2)) / model.stem.weight[0].abs().mean()
    assert smooth.max() < 0.2  # the strongest component of images is the mean of a patch


def test_convolutions_start_as_copies():
    layer = main.Convolution(4, 6)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(layer(x)[:, :4], x) and layer.weight[4:].std() > 0.01


@pytest.mark.parametrize(
    ("count", "width", "n"),
    [(20, 3, 20), (20, 4, 5), (12, 6, 4), (10, 8, 10), (7, 3, 7), (23, 4, 1), (4, 12, 0)],
)
def test_images_side_by_side_change_neither_answers_nor_gradients(monkeypatch, count, width, n):
    """`n` images abreast; 0 stands for the usual convolution. As on a processor with AMX."""
    monkeypatch.setattr(main, "has_amx", lambda: True)
    layer = main.Convolution(8, 16)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(count, 8, width, width).to(memory_format=torch.channels_last).requires_grad_()
    seen = []
    real = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *more: seen.append(tuple(x.shape)) or real(x, *more))
    with torch.autocast("cpu", torch.bfloat16):
        joined, usual = layer(x), real(x, layer.weight, padding=1)
        assert torch.equal(layer.eval()(x), usual)
    assert seen[0] == ((count // n, 8, width, n * (width + 1)) if n else x.shape)
    assert seen[1] == x.shape  # evaluation joins nothing
    assert joined.shape == usual.shape and torch.equal(joined, usual)
    upstream = torch.randn_like(joined)
    found = torch.autograd.grad(joined, (x, layer.weight), upstream)
    inputs = [part.detach().bfloat16().double().requires_grad_() for part in (x, layer.weight)]
    exact = torch.autograd.grad(real(*inputs, padding=1), inputs, upstream.double())
    for gradient, reference in zip(found, exact, strict=True):
        assert (gradient - reference).norm() < 0.01 * reference.norm()  # bfloat16 has 8 bits


# Training


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
    assert [size for training, size in sizes if training] == [20] * 4 + [32] * 4
    assert {size for training, size in sizes if not training} == {32}
    fresh = main.build_network(SE, recipe, classes=10)
    fresh.measure_input(data.train.select(data.splits[42].training).pixels, recipe)
    moved = {
        n for n, p in one.model.named_parameters() if not torch.equal(p, fresh.get_parameter(n))
    }
    assert {n for n, _ in one.model.named_parameters()} - moved == {"stem.weight"}


# Evaluation and explanation


def test_evaluation_counts():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    called = torch.tensor([0, 0, 0, 1, 1, 1, 0, 2])
    found = evaluation(torch.eye(3)[called], labels)
    assert found.accuracy == 75 and found.class_accuracy.tolist() == [75, 100, 50]
    assert found.confusion.tolist() == [[3, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert found.correct.tolist() == [True, True, True, False, True, True, False, True]
    perfect = evaluation(torch.eye(3)[labels], labels)
    settings = main.Settings(statistics=main.StatisticsSettings(resamples=100))
    compared = main.compare(SE, [perfect], [found], labels, 3, settings)
    assert compared.overall.difference.interval.value == 25
    assert [group.difference.interval.value for group in compared.by_class] == [25, 0, 50]


@pytest.mark.parametrize("network", KEYS)
def test_grad_cam_is_the_reference_packages(trained, network):
    _, _, data, networks = trained
    model, pixels = networks[network].model, data.test.pixels[:40]
    classes = data.test.labels[:40].roll(1)  # not always the class that it sees
    ours = main.grad_cam(model, pixels, classes).numpy()
    with GradCAM(model=model, target_layers=[model.attention[-1]]) as reference:
        theirs = reference(
            main.to_input(pixels), [ClassifierOutputTarget(c) for c in classes.tolist()]
        )
    assert np.abs(ours - theirs).max() < 1e-4
    assert (ours.max((1, 2)) > 0.99).mean() > 0.7  # not a comparison of empty maps


@pytest.mark.parametrize("network", KEYS)
def test_grad_cam_points_at_the_object(trained, network):
    """The hottest pixel, and the share of the heat, lie in the mask far above chance: its area."""
    _, hardware, data, networks = trained
    model = networks[network].model
    logits = main.logits_of(model, data.test.pixels, hardware)
    right = logits.argmax(1) == data.test.labels
    assert right.float().mean() > 0.9
    images = data.test.select(right)
    heat = main.grad_cam(model, images.pixels, images.labels).flatten(1)
    mask = images.masks.flatten(1)
    chance = mask.float().mean()
    hits = mask[torch.arange(len(heat)), heat.argmax(1)].float().mean()
    share = ((heat * mask).sum(1) / heat.sum(1).clamp_min(1e-7)).mean()
    assert hits > chance + 0.3 and share > 1.4 * chance


def test_overlay_is_rgb_upright_and_lets_the_picture_show():
    image, heat = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.float32)
    image[..., 0] = 255  # red
    heat[:8] = 1.0  # hot at the top
    picture = main.overlay(image, heat, size=64).astype(int)
    assert picture.shape == (64, 64, 3)
    assert picture[-5, :, 0].min() > picture[-5, :, 2].max()  # still red where it is cold
    hot, cold = main.HEAT_COLOURS(1.0), main.HEAT_COLOURS(0.0)
    assert np.allclose(picture[2, 30], 0.55 * image[0, 0] + 0.45 * 255 * np.array(hot[:3]), atol=2)
    assert np.allclose(
        picture[60, 30], 0.55 * image[0, 0] + 0.45 * 255 * np.array(cold[:3]), atol=2
    )


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    main.write_file(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(main.os, "fsync", fail)
    with pytest.raises(OSError):
        main.write_file(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_real_cifar10_is_read_right(cifar10_dir):
    data = main.load_data(main.Settings(data_dir=main.Path(cifar10_dir)))
    assert data.train.pixels.shape == (50000, 32, 32, 3) and data.test.pixels.shape == (
        10000,
        32,
        32,
        3,
    )
    assert data.classes[0] == "airplane" and data.classes[9] == "truck"
    assert data.train.labels.bincount().tolist() == [5000] * 10
    split = data.splits[42]
    assert (len(split.training), len(split.validation)) == (45000, 5000)
    mean = data.train.select(split.training).pixels.double().mean((0, 1, 2)) / 255
    assert torch.allclose(
        mean, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.double), atol=2e-3
    )


def test_damaged_cifar10_is_not_unpickled(cifar10_dir, tmp_path, monkeypatch):
    source = main.Path(cifar10_dir) / "cifar-10-batches-py"
    (tmp_path / source.name).mkdir()
    for file in source.iterdir():
        target = tmp_path / source.name / file.name
        if file.name == "data_batch_3":
            target.write_bytes(
                b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR."
            )
        else:
            target.symlink_to(file)
    monkeypatch.setattr(main, "CIFAR10_MIRRORS", ("http://127.0.0.1:1/nobody-here",))
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tmp_path / "out", "--dataset", "cifar10", "--data-dir", str(tmp_path)))
    assert "could not be downloaded" in str(ended.value) and not (tmp_path / "pwned").exists()
