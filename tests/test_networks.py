"""The networks: what they share, what attention adds, their stem, and convolutions abreast."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import BASELINE, SE, small_network, small_recipe

import main
from lab.data import shapes
from lab.data.images import to_input
from lab.machine import abreast
from lab.measure.models import Gated, build_network


def test_images_are_not_joined_where_that_does_not_pay(monkeypatch):
    monkeypatch.setattr(main, "has_amx", lambda: False)
    monkeypatch.setattr(abreast, "convolve", None)  # calling it would fail
    with torch.autocast("cpu", torch.bfloat16):
        assert main.Convolution(8, 16)(torch.randn(4, 8, 4, 4)).shape == (4, 16, 4, 4)


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


ALL = {network.key: network for network in [*main.NETWORKS, *main.CONTROLS]}


def test_eca_is_a_convolution_over_neighbouring_channels():
    """Of widths 64, 192 and 256 its kernels are 3, 5 and 5 wide, by the paper's equation 12."""
    sizes = [main.ECABlock(c, small_recipe()).mix.kernel_size[0] for c in (64, 128, 192, 256, 512)]
    assert sizes == [3, 5, 5, 5, 5]
    block = main.ECABlock(12, small_recipe())
    x = torch.randn(5, 12, 7, 6)
    kernel = block.mix.weight.detach().numpy()[0, 0]
    padded = np.pad(x.numpy().mean((2, 3)), ((0, 0), (1, 1)))
    mixed = sum(kernel[k] * padded[:, k : k + 12] for k in range(3))
    expected = x.numpy() / (1 + np.exp(-mixed))[:, :, None, None]
    np.testing.assert_allclose(block(x).detach().numpy(), expected, atol=1e-6)


def test_static_gates_learn_and_see_no_image():
    block = main.StaticGates(3, small_recipe())
    torch.nn.init.constant_(block.logits, 1.0)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    gates = block(x) / x
    assert torch.allclose(gates, torch.tensor(1.0).sigmoid().expand_as(gates))
    block(x).sum().backward()
    assert block.logits.grad.abs().min() > 0
    assert not isinstance(block, Gated)  # there is no answer to the image to be studied


@pytest.mark.parametrize("recipe", [main.Recipe(), small_recipe()])
def test_the_wide_network_has_the_parameters_of_se_blocks(recipe):
    """At least, and no whole channel in each stage more."""

    def parameters(key, **changes):
        model = build_network(ALL[key], dataclasses.replace(recipe, **changes), classes=10)
        return main.count_parameters(model)

    baseline = parameters("baseline")
    wanted = parameters("se_attention") - baseline
    added = parameters("wide") - baseline
    one_more = parameters("baseline", widths=tuple(width + 1 for width in recipe.widths)) - baseline
    assert wanted <= added < wanted + one_more
    if recipe == main.Recipe():
        assert (wanted, added) == (27200, 28687)  # 65, 194 and 258 channels


def test_the_wide_network_is_drawn_from_its_seed_alone():
    first, second = small_network(ALL["wide"]), small_network(ALL["wide"])
    torch.manual_seed(small_recipe().seed)
    alone = main.SmallCNN(first.recipe, 10, torch.nn.Identity)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, alone.state_dict()[name])


def test_a_block_in_the_last_stage_alone():
    model = small_network(ALL["se_last"])
    kinds = [type(block) for block in model.attention]
    assert kinds == [torch.nn.Identity, torch.nn.Identity, main.SEBlock]


def test_blocks_of_other_reduction():
    """Beside the option, which all networks of a run share: the same weights where they agree."""
    for key, reduction in [("se_4", 4), ("se_16", 16)]:
        named = small_network(ALL[key], reduction=8).state_dict()
        asked = small_network(ALL["se_attention"], reduction=reduction).state_dict()
        for name, value in asked.items():
            assert torch.equal(value, named[name])


@pytest.mark.parametrize(
    ("head", "pool"),
    [
        ("mean", lambda x: x.mean((2, 3))),
        ("max", lambda x: x.amax((2, 3))),
        ("both", lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2),
    ],
)
def test_heads(head, pool):
    model = small_network(BASELINE, head=head)
    features = torch.randn(3, 32, 4, 4)
    assert torch.allclose(model.classify(features), model.classifier(pool(features)), atol=1e-6)


@pytest.mark.parametrize("network", ALL.values(), ids=ALL)
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


def test_a_network_normalises_by_its_buffers():
    model = small_network(BASELINE).eval()
    x = torch.rand(2, 3, 32, 32)
    plain = model((x - 0.5) / 0.25)
    model.mean.fill_(0.5)
    model.std.fill_(0.25)
    assert torch.allclose(model(x), plain, atol=1e-5)


def test_the_stem_whitens_patches():
    pixels = shapes.draw(300, 0).pixels
    recipe = small_recipe(stem=4, whitening_epsilon=0.0)
    model = build_network(BASELINE, recipe, classes=10)
    model.measure_input(pixels)
    x = model.normalise(to_input(pixels))
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
