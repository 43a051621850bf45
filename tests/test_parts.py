"""The parts of main.py, each against an independent reference."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from conftest import tiny
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import main


def evaluation(model=None, logits=None, labels=None, classes="ab"):
    """An evaluation of given logits, or none to speak of."""
    content = {"history": [{"seconds": 1.0}], "device": "", "precision": "fp32", "versions": {}}
    trained = main.Trained("baseline", 42, model or main.build("baseline", small_settings(), 2), content)
    return main.evaluate(
        trained, torch.eye(2) if logits is None else logits, torch.arange(2) if labels is None else labels, classes
    )


def small_settings(**changes):
    return main.Settings(**{"stem": 4, "widths": (16, 16, 32), "reduction": 4, **changes})


# Settings


def test_help_lists_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main.parse_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for field in main.dataclasses.fields(main.Settings):
        assert f"--{field.name.replace('_', '-')}" in text
        assert f"{field.metadata['help']} (default: {field.default})" in text


def test_command_line_becomes_settings():
    settings = main.parse_settings(["--dataset", "shapes", "--widths", "8", "9", "--learning-rate", "0.5"])
    assert (settings.widths, settings.learning_rate, settings.epochs) == ((8, 9), 0.5, 15)
    assert str(settings.output) == "output/shapes"
    assert str(main.parse_settings([]).output) == "output"


@pytest.mark.parametrize("bad", [["--epochs", "0"], ["--device", "tpu"], ["--seed", "-1"], ["--batch-size", "x"]])
def test_impossible_settings_are_usage_errors(bad, capsys):
    with pytest.raises(SystemExit) as ended:
        main.parse_settings(bad)
    assert ended.value.code == 2
    assert bad[0] in capsys.readouterr().err


def test_precision_follows_the_hardware(monkeypatch):
    settings = main.Settings(device="cpu")
    for amx, expected in ((True, "bf16"), (False, "fp32")):  # AVX512-BF16 alone is slower than fp32
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert main.choose_hardware(settings).precision == expected
    assert main.choose_hardware(main.Settings(device="cpu", precision="bf16")).precision == "bf16"


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
    ours = main.crop_and_flip(pixels, index, offsets, flip, size)
    for image, i, (top, left), mirrored in zip(ours, index, offsets.tolist(), flip, strict=True):
        padded = TF.pad(pixels[i].permute(2, 0, 1), 4, padding_mode="reflect")
        expected = TF.crop(padded, top + 4, left + 4, size, size)
        expected = TF.hflip(expected) if mirrored else expected
        assert torch.equal(image.permute(2, 0, 1), expected)


def test_epochs_are_planned_by_seed_and_epoch_alone():
    settings = small_settings()
    first, again, other = (main.plan_epoch(epoch, 1000, settings) for epoch in (12, 12, 13))
    assert first[0] == again[0] and all(torch.equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))
    assert not torch.equal(first[1], other[1])
    size, order, offsets, flips = first
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert size == 32 and offsets.min() == -settings.crop_padding and offsets.max() == settings.crop_padding
    assert 400 < flips.sum() < 600
    assert torch.equal(flips, ~other[3])  # both sides of each image in two epochs
    size, _, offsets, _ = main.plan_epoch(0, 1000, settings)
    assert size == settings.crop_size and offsets.min() == 0 and offsets.max() == 32 - size  # crops stay inside
    sizes = [main.plan_epoch(epoch, 10, settings)[0] for epoch in range(settings.epochs)]
    assert sizes == [24] * 12 + [32] * 3
    assert main.plan_epoch(0, 10, small_settings(epochs=1))[0] == 32  # an only epoch sees whole images


def test_split_is_stratified_disjoint_and_seeded():
    pixels = torch.arange(1000, dtype=torch.int32).view(-1, 1, 1, 1).expand(-1, 32, 32, 3)  # each image is its number
    images = main.Images(pixels, torch.arange(1000) % 10)
    data = main.Dataset("made", tuple("abcdefghij"), ("a",), images, images)
    train, validation = (data.train.select(index) for index in main.split_train(data.train.labels, small_settings()))
    assert train.labels.bincount().tolist() == [90] * 10 and validation.labels.bincount().tolist() == [10] * 10
    numbers = [set(part.pixels[:, 0, 0, 0].tolist()) for part in (train, validation)]
    assert numbers[0] | numbers[1] == set(range(1000)) and not numbers[0] & numbers[1]
    assert numbers[1] == set(main.split_train(data.train.labels, small_settings())[1].tolist())
    assert numbers[1] != set(main.split_train(data.train.labels, small_settings(seed=43))[1].tolist())


def test_shapes_are_drawn_from_their_seed_with_true_masks():
    images, again, other = main.draw_shapes(200, 5), main.draw_shapes(200, 5), main.draw_shapes(200, 6)
    assert torch.equal(images.pixels, again.pixels) and not torch.equal(images.pixels, other.pixels)
    assert images.labels.bincount().tolist() == [20] * 10
    area = images.masks.float().mean((1, 2))
    assert area.min() > 0.01 and area.max() < 0.6
    for pixels, mask in zip(images.pixels.float(), images.masks, strict=True):  # inside has one colour, outside another
        inside, outside = pixels[mask].median(0).values, pixels[~mask].median(0).values
        assert (inside - outside).abs().max() > 50
    assert len(set(main.SHAPES.values())) == len(main.SHAPES) == 10


# Models


def test_networks_differ_by_the_blocks_alone():
    settings = small_settings()
    baseline, attention = (main.build(n, settings, classes=10) for n in ("baseline", "se_attention"))
    ours, theirs = baseline.state_dict(), attention.state_dict()
    extra = set(theirs) - set(ours)
    assert not set(ours) - set(theirs) and all(name.startswith("attention.") for name in extra) and extra
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for block in attention.attention:  # gates held at one: the same function
        torch.nn.init.zeros_(block.expand.weight)
        torch.nn.init.constant_(block.expand.bias, 100.0)
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(baseline.eval()(x), attention.eval()(x))


def test_se_block_is_the_papers():
    block = main.SEBlock(channels=12, reduction=4)
    x = torch.randn(5, 12, 7, 6)
    w1, b1, w2, b2 = (p.detach().numpy().astype(np.float64) for p in block.parameters())
    z = x.numpy().mean((2, 3))
    s = 1 / (1 + np.exp(-(np.maximum(z @ w1.T + b1, 0) @ w2.T + b2)))
    np.testing.assert_allclose(block(x).detach().numpy(), x.numpy() * s[:, :, None, None], atol=1e-6)


@pytest.mark.parametrize("network", sorted(main.NETWORKS))
def test_gradients_lie_channels_last_wherever_activations_do(network):
    model, laid = main.build(network, small_settings(), classes=10).train(), []

    def look(module, inputs, output):
        output.register_hook(lambda gradient: laid.append(gradient.is_contiguous(memory_format=torch.channels_last)))

    for stage in model.stages:
        for module in stage:
            module.register_forward_hook(look)
    model(torch.rand(3, 3, 24, 24).to(memory_format=torch.channels_last)).square().sum().backward()
    assert len(laid) == 21 and all(laid)


def test_costs_are_counted():
    model = main.build("se_attention", small_settings(), classes=10)
    convolutions = [(3, 8, 32), (8, 16, 32), (16, 16, 16), (16, 16, 16), (16, 16, 8), (16, 32, 8), (32, 32, 4)]
    linear = [(16, 4), (4, 16)] * 2 + [(32, 8), (8, 32), (32, 10)]
    multiply_adds = sum(9 * i * o * s * s for i, o, s in convolutions) + sum(i * o for i, o in linear)
    parameters = sum(9 * i * o + 2 * o for i, o, _ in convolutions[1:]) + sum(i * o + o for i, o in linear)
    parameters += 9 * 3 * 8  # the stem has no batch norm
    found = main.describe([evaluation(model)], {"overall": (0.0, 0.0, 0.0)})
    assert (found["parameters"], found["multiply_adds"]) == (parameters, multiply_adds)


def test_a_network_normalises_by_its_buffers():
    model = main.build("baseline", small_settings(), classes=10).eval()
    x = torch.rand(2, 3, 32, 32)
    plain = model((x - 0.5) / 0.25)
    model.mean.fill_(0.5)
    model.std.fill_(0.25)
    assert torch.allclose(model(x), plain, atol=1e-5)


# Training


def test_learning_rates_fall_linearly_to_zero(tmp_path, monkeypatch):
    settings = small_settings(dataset="shapes", shapes_train=200, epochs=3, batch_size=60, output_dir=tmp_path)
    rates, real = [], main.Muon.step
    monkeypatch.setattr(main.Muon, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or real(self))
    main.train("baseline", main.load_data(settings), settings, main.choose_hardware(settings), tmp_path / "a.pth")
    assert rates == pytest.approx([settings.muon_rate * (1 - k / 9) for k in range(9)])


def test_only_weights_decay():
    model = main.build("se_attention", small_settings(), classes=10)
    muon, sgd = main.make_optimizers(model, small_settings())
    decayed, plain = sgd.param_groups
    assert decayed["weight_decay"] == small_settings().weight_decay and plain["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])
    kernels = muon.param_groups[0]["params"]
    assert all(p.ndim == 4 for p in kernels)
    groups = (kernels, decayed["params"], plain["params"])
    assert sum(map(len, groups)) == len(list(model.parameters())) - 1  # the stem is fixed


def test_muon_steps_along_the_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    gradient, before = torch.randn_like(p), p.detach().clone()
    p.grad = gradient.clone()
    main.Muon([p], {"lr": 0.1, "momentum": 0.5}).step()
    normed = before * 8**0.5 / before.norm()
    step = ((normed - p.detach()) / 0.1).flatten(1)
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    singular = torch.linalg.svdvals(step)
    assert singular.min() > 0.5 and singular.max() < 1.5  # about one in every direction
    assert F.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_the_stem_whitens_patches():
    pixels = main.draw_shapes(300, 0).pixels
    model = main.build("baseline", small_settings(stem=4, whitening_epsilon=0.0), classes=10)
    model.fit_input(pixels, small_settings(stem=4, whitening_epsilon=0.0))
    x = model.normalise(main.to_input(pixels))
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    answers = F.conv2d(x, model.stem.weight, stride=3)[:, :, :10, :10].permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(answers[:4].cov(), torch.eye(4), atol=2e-3)
    assert torch.equal(answers[4:], -answers[:4])
    smooth = model.stem.weight[0].std((1, 2)) / model.stem.weight[0].abs().mean()
    assert smooth.max() < 0.2  # the strongest component of images is the mean of a patch


def test_convolutions_start_as_copies():
    layer = main.Convolution(4, 6)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(layer(x)[:, :4], x) and layer.weight[4:].std() > 0.01


@pytest.mark.parametrize(
    ("count", "width", "n"), [(20, 3, 20), (20, 4, 5), (12, 6, 4), (10, 8, 10), (7, 3, 7), (23, 4, 1), (4, 12, 0)]
)
def test_joined_rows_change_neither_answers_nor_gradients(monkeypatch, count, width, n):
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
    for a, b in zip(*(torch.autograd.grad(y, (x, layer.weight), upstream) for y in (joined, usual)), strict=True):
        assert (a - b).norm() < 0.005 * b.norm()


def test_early_epochs_see_crops_and_training_moves_all_but_the_stem(monkeypatch, tmp_path):
    settings = small_settings(
        dataset="shapes", shapes_train=200, epochs=4, crop_size=20, crop_epochs=0.5, batch_size=90
    )
    data = main.load_data(settings)
    sizes = []
    real = main.BaselineCNN.features
    monkeypatch.setattr(
        main.BaselineCNN, "features", lambda m, x: sizes.append((m.training, x.shape[-1])) or real(m, x)
    )
    main.train("se_attention", data, settings, main.choose_hardware(settings), tmp_path / "a.pth")
    model = main.load_trained(tmp_path / "a.pth", "se_attention", 10, settings, "auto").model
    assert [size for training, size in sizes if training] == [20] * 4 + [32] * 4
    assert {size for training, size in sizes if not training} == {32}
    fresh = main.build("se_attention", settings, classes=10)
    fresh.fit_input(data.train.select(main.split_train(data.train.labels, settings)[0]).pixels, settings)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, fresh.get_parameter(n))}
    assert {n for n, _ in model.named_parameters()} - moved == {"stem.weight"}


# Evaluation and explanation


def test_evaluation_counts():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    called = torch.tensor([0, 0, 0, 1, 1, 1, 0, 2])
    found = evaluation(None, torch.eye(3)[called], labels, ("a", "b", "c"))
    assert found.accuracy == 75 and found.class_accuracy == {"a": 75, "b": 100, "c": 50}
    assert found.confusion.tolist() == [[3, 1, 0], [0, 2, 0], [1, 0, 1]]
    perfect = evaluation(None, torch.eye(3)[labels], labels, ("a", "b", "c"))
    runs, settings = {"baseline": [found], "se_attention": [perfect]}, main.Settings(resamples=100)
    intervals = {n: main.accuracy_intervals(of_seeds, settings) for n, of_seeds in runs.items()}
    compared = main.compare(runs["se_attention"], runs["baseline"], labels, ("a", "b", "c"), settings)
    rows = main.results_table(intervals, {"se_attention": compared})
    assert rows[0] == ["Class", "Baseline", "SE-Attention", "Change", "Interval", "p (Holm)"]
    assert rows[1][:4] == ["a", "75.00", "100.00", "+25.00"]
    assert rows[-1][:4] == ["Overall", "75.00", "100.00", "+25.00"]


def test_failures_are_the_most_confident_and_the_lonely_ones():
    labels = torch.zeros(4, dtype=torch.long)
    first = evaluation(None, torch.tensor([[0.0, 2.0], [0.0, 5.0], [1.0, 0.0], [1.0, 0.0]]), labels)
    other = main.build("se_attention", small_settings(), 2)
    second = evaluation(other, torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), labels)
    groups = list(main.find_failures([first, second], labels, count=5).values())
    assert [index.tolist() for index, _ in groups] == [[1, 0], [0, 2], [1], [2]]
    assert [shown[0] for _, shown in groups] == [first, second] * 2 and groups[2][1] == [first, second]


def test_a_perfect_network_has_no_failures_to_show(trained, tmp_path):
    _, _, data, models = trained
    runs = [evaluation(m, torch.eye(10)[data.test.labels], data.test.labels, data.classes) for m in models.values()]
    groups = main.find_failures(runs, data.test.labels, count=3)
    blocks = {title: main.explain(index, shown, data) for title, (index, shown) in groups.items()}
    assert len(blocks) == 4 and all(block == [] for block in blocks.values())
    main.draw_pictures(blocks, tmp_path / "none.png")
    assert (tmp_path / "none.png").exists()


def test_a_perfect_network_is_drawn(tmp_path):
    rounded = {"overall": (100.0, 99.0, 100.0 - 1e-9), "a": (100.0, 98.0, 100.0 - 1e-9)}  # Wilson's bound, rounded
    main.draw_accuracy(dict.fromkeys(main.NETWORKS, rounded), tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").exists()


@pytest.mark.parametrize("network", main.NETWORKS)
def test_grad_cam_is_the_reference_packages(trained, network):
    _, _, data, models = trained
    model, pixels = models[network], data.test.pixels[:40]
    classes = data.test.labels[:40].roll(1)  # not always the class that it sees
    ours = main.grad_cam(model, pixels, classes).numpy()
    with GradCAM(model=model, target_layers=[model.attention[-1]]) as reference:
        theirs = reference(main.to_input(pixels), [ClassifierOutputTarget(c) for c in classes.tolist()])
    assert np.abs(ours - theirs).max() < 1e-4
    assert (ours.max((1, 2)) > 0.99).mean() > 0.7  # not a comparison of empty maps


@pytest.mark.parametrize("network", main.NETWORKS)
def test_grad_cam_points_at_the_object(trained, network):
    """The hottest pixel, and the share of the heat, lie in the mask far above chance, which is the mask's area."""
    _, hardware, data, models = trained
    logits = main.predict(models[network], data.test.pixels, hardware)
    right = logits.argmax(1) == data.test.labels
    assert right.float().mean() > 0.9
    images = data.test.select(right)
    heat = main.grad_cam(models[network], images.pixels, images.labels).flatten(1)
    mask = images.masks.flatten(1)
    chance = mask.float().mean()
    hits = mask[torch.arange(len(heat)), heat.argmax(1)].float().mean()
    share = ((heat * mask).sum(1) / heat.sum(1).clamp_min(1e-7)).mean()
    assert hits > chance + 0.3 and share > 1.4 * chance


@pytest.fixture
def figures(tiny_run, monkeypatch):
    """What would be written, by file name, in the style that a run has set."""
    kept = {}
    monkeypatch.setattr(main, "write_figure", lambda path, figure, vector=True: kept.update({path.stem: figure}))
    return kept


@pytest.mark.parametrize("count", [0, 1, 4])
def test_headings_of_pictures_stay_in_their_half(figures, tmp_path, count):
    picture = (np.zeros((32, 32, 3), np.uint8), "true class:\nautomobile", "black")
    titles = ("SE-Attention: most confident mistakes", "Only SE-Attention is wrong", "a", "b")
    main.draw_pictures({title: [[picture] * count] * min(2, count) for title in titles}, tmp_path / "failures.png")
    figures["failures"].draw_without_rendering()
    for k, part in enumerate(figures["failures"].subfigs):
        box = part._suptitle.get_window_extent()
        assert part.bbox.x0 <= box.x0 and box.x1 <= part.bbox.x1
        scales = [axes for axes in part.axes if axes.get_ylabel()]
        assert len(scales) == (count > 0 and k % 2 == 1)  # at the right of each row, and none without heatmaps


def test_numbers_in_matrices_do_not_touch(figures, tiny_run, tmp_path):
    rows = pd.read_json(tiny_run / "results" / "robustness.json")
    rows.loc[rows.figure == "robustness", "y"] = 100.0  # the widest number
    main.draw_stress(rows, tmp_path)
    figures["robustness"].draw_without_rendering()
    for axes in figures["robustness"].axes[:2]:
        boxes = [text.get_window_extent() for text in axes.texts[:5]]
        assert len(boxes) == 5 and all(a.x1 + 1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_overlay_is_rgb_upright_and_lets_the_picture_show():
    image, heat = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.float32)
    image[..., 0] = 255  # red
    heat[:8] = 1.0  # hot at the top
    picture = main.overlay(image, heat, size=64).astype(int)
    assert picture.shape == (64, 64, 3)
    assert picture[-5, :, 0].min() > picture[-5, :, 2].max()  # still red where it is cold
    hot, cold = main.HEAT_COLOURS(1.0), main.HEAT_COLOURS(0.0)
    assert np.allclose(picture[2, 30], 0.55 * image[0, 0] + 0.45 * 255 * np.array(hot[:3]), atol=2)
    assert np.allclose(picture[60, 30], 0.55 * image[0, 0] + 0.45 * 255 * np.array(cold[:3]), atol=2)


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
    assert data.train.pixels.shape == (50000, 32, 32, 3) and data.test.pixels.shape == (10000, 32, 32, 3)
    assert data.classes[0] == "airplane" and data.classes[9] == "truck"
    assert data.train.labels.bincount().tolist() == [5000] * 10
    train, validation = (data.train.select(index) for index in main.split_train(data.train.labels, main.Settings()))
    assert (len(train.labels), len(validation.labels)) == (45000, 5000)
    mean = train.pixels.double().mean((0, 1, 2)) / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.double), atol=2e-3)


def test_damaged_cifar10_is_not_unpickled(cifar10_dir, tmp_path, monkeypatch):
    source = main.Path(cifar10_dir) / "cifar-10-batches-py"
    (tmp_path / source.name).mkdir()
    for file in source.iterdir():
        target = tmp_path / source.name / file.name
        if file.name == "data_batch_3":
            target.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
        else:
            target.symlink_to(file)
    monkeypatch.setattr(main, "CIFAR10_MIRRORS", ("http://127.0.0.1:1/nobody-here",))
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tmp_path / "out", "--dataset", "cifar10", "--data-dir", str(tmp_path)))
    assert "could not be downloaded" in str(ended.value) and not (tmp_path / "pwned").exists()
