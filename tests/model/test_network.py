import math

import pytest
import torch
from torch import nn

from nas_mnist.model.architecture import parse
from nas_mnist.model.network import Dropout, build, count_parameters

LINES = [
    "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | dropout=0.05",
    "c16 d16 d32 M c16k1- d16 d24 d32 c10k1- G | act-norm",
    "c8p1 c8s2p1 M c8k1+b- c16 c10k5r",
    "d10+b G c10k1+b- | elementwise dropout=0.1",
]


@pytest.mark.parametrize("line", LINES)
def test_network_has_the_parameters_the_line_promises(line):
    architecture = parse(line)
    assert count_parameters(architecture) == architecture.n_parameters
    assert sum(p.numel() for p in build(architecture, seed=0).parameters()) == architecture.n_parameters


@pytest.mark.parametrize("line", LINES)
def test_every_child_makes_the_shape_the_table_says(line):
    architecture = parse(line)
    x = torch.randn(2, 1, 28, 28)
    network = build(architecture, seed=0).eval()
    for child, shape in zip(network, architecture.shapes, strict=True):
        x = child(x)
        assert x.shape == (2, shape.channels, shape.side, shape.side)
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_a_seed_decides_the_weights():
    architecture = parse(LINES[0])
    first, same, other = (build(architecture, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["0.0.weight"], other["0.0.weight"])


def test_building_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build(parse(LINES[0]), seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_order_of_norm_and_activation():
    x = torch.randn(8, 1, 28, 28)
    norm_last = build(parse("c4 G c10k1- | act-norm"), seed=0)[0](x)
    norm_first = build(parse("c4 G c10k1-"), seed=0)[0](x)
    assert norm_last.min() < 0 and norm_last.mean().abs() < 1e-5
    assert norm_first.min() == 0


def test_hard_swish_stands_where_the_relu_does():
    x = torch.randn(8, 1, 28, 28)
    plain, hard = (build(parse(f"c4 d6 M c4r G c10k1-{end}"), seed=0).eval() for end in ("", " | hardswish"))
    convolved = hard[0][0](x) / math.sqrt(1 + 1e-5)  # norms that have not seen anything
    torch.testing.assert_close(hard[0](x), convolved * (convolved + 3).clamp(0, 6) / 6, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain[0](x), convolved.relu(), rtol=1e-5, atol=1e-6)
    assert hard[1](hard[0](x)).min() < 0 and "norm → hard-swish" in str(hard)


def test_bare_and_activation_only_convolutions():
    network = build(parse("c4- c4r G c10k1-"), seed=0)
    assert len(network[0]) == 1 and isinstance(network[0][0], nn.Conv2d)
    assert network[1](torch.randn(2, 4, 26, 26)).min() == 0
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_dropout_follows_every_convolution_but_bare_ones_and_the_last():
    network = build(parse("c4 d4 M c4k1- c4 c10k10 | dropout=0.1"), seed=0)
    rates = [[m.rate for m in child.modules() if isinstance(m, Dropout)] for child in network]
    assert rates == [[0.1], [0.0, 0.1], [], [], [0.1], [0.0]]


@pytest.mark.parametrize("elementwise", [False, True])
def test_dropout_keeps_the_stated_share_and_the_mean(elementwise):
    dropout = Dropout(0.25, elementwise)
    dropout.generator = torch.Generator().manual_seed(0)
    out = dropout(torch.ones(500, 40, 3, 3))
    per_channel = out.flatten(2)
    whole = (per_channel == per_channel[:, :, :1]).all(2)
    assert whole.all() != elementwise
    assert (out > 0).float().mean().item() == pytest.approx(0.75, abs=0.015)
    assert out.max().item() == pytest.approx(1 / 0.75)
    assert torch.equal(dropout.eval()(out), out)
