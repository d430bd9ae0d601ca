import subprocess
import sys

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.training.optimizers import AdamW, Soap, make_optimizer, one_cycle, renew_bases
from nas_mnist.training.recipe import Recipe

SGD = Recipe(weight_decay=0.01, momentum=0.8)
ADAMW = Recipe(optimizer="adamw", weight_decay=0.01)
CLASSES = {
    SGD: lambda parameters: torch.optim.SGD(parameters, 1.0, momentum=0.8, weight_decay=0.01, nesterov=True),
    ADAMW: lambda parameters: torch.optim.AdamW(parameters, 1.0, weight_decay=0.01),
}


@pytest.mark.parametrize("recipe", CLASSES)
def test_steps_are_those_of_the_class_in_torch_to_the_last_bit(recipe):
    ours, theirs = (build(parse("c4 M c6 G c10k1-"), seed=0) for _ in range(2))
    optimizer, reference = make_optimizer(ours, recipe), CLASSES[recipe](theirs.parameters())
    generator = torch.Generator().manual_seed(0)
    for rate in (0.1, 0.03, 0.2):
        reference.param_groups[0]["lr"] = rate
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step(rate)
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def travelled(optimizer_class, gradients):
    """Where weights (4, 3, 1, 1) come to along these gradients, after 200 steps that do not move them."""
    weights = torch.nn.Parameter(torch.zeros(4, 3, 1, 1))
    optimizer = optimizer_class([weights], 0.0)
    for i, gradient in enumerate(gradients):
        weights.grad = gradient.view(weights.shape)
        optimizer.prepare()
        optimizer.step(0.01 if i >= 200 else 0.0)
    return weights.detach().flatten(1)


def test_steps_of_soap_turn_with_the_gradients():
    """Those of Adam do not: they are along the axes."""
    generator = torch.Generator().manual_seed(2)
    rows, columns = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (4, 3))
    gradients = torch.randn(230, 4, 3, generator=generator) * torch.tensor([[1.0], [2], [4], [8]])
    turned = rows @ gradients @ columns
    for optimizer_class, turns in ((Soap, True), (AdamW, False)):
        expected = rows @ travelled(optimizer_class, gradients) @ columns
        assert torch.allclose(travelled(optimizer_class, turned), expected, atol=1e-3) == turns


def test_soap_finds_its_bases_in_float64(monkeypatch):
    """In float32, LAPACK found NaN for the factor of a layer with dead channels; for which depends on its build."""
    dtypes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda factor: dtypes.append(factor.dtype) or eigh(factor))
    travelled(Soap, torch.ones(3, 4, 3))
    assert dtypes == [torch.float64] * 2


def test_soap_turns_the_moments_with_the_bases():
    """Into those of the same gradients along the new directions."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.nn.Parameter(torch.zeros(4, 3, 1, 1))
    matrix = Soap([weights], 0.0)._matrices[0]
    matrix.square.copy_(torch.rand(4, 3, generator=generator) ** 4)
    for factor in matrix.factors:
        root = torch.randn(factor.shape, generator=generator)
        factor.copy_(root @ root.T)
    gradients = torch.randn(20_000, 4, 3, generator=generator) * matrix.square.sqrt()
    before = [basis.clone() for basis in matrix.bases]
    mean = matrix.mean.copy_(torch.randn(4, 3, generator=generator)).clone()
    renew_bases(matrix.mean, matrix.square, matrix.factors, matrix.bases)
    left, right = matrix.bases
    turned = (left.T @ gradients @ right).square().mean(0)
    torch.testing.assert_close(matrix.square, turned, rtol=0.1, atol=0)
    same = before[0] @ mean @ before[1].T
    torch.testing.assert_close(left @ matrix.mean @ right.T, same)


def test_soap_treats_vectors_as_adamw_does():
    vectors = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    for vector, optimizer in zip(vectors, (Soap([vectors[0]], 0.1), AdamW([vectors[1]], 0.1)), strict=True):
        for i in range(3):
            vector.grad = torch.arange(5.0) - i
            optimizer.prepare()
            optimizer.step(0.1)
    assert torch.equal(*vectors)


def test_soap_is_that_of_pytorch_optimizer_between_two_renewals():
    """An independent implementation, whose first step finds the bases and moves nothing: ours begins anew there.

    Without weight decay, which it takes after the step and not before.
    """
    theirs_class = pytest.importorskip("pytorch_optimizer", reason="not installed: pip install '.[dev]'").SOAP
    generator = torch.Generator().manual_seed(4)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 25).view(5, 5)) for _ in range(2))
    optimizer = Soap([ours], 0.0)
    reference = theirs_class([theirs], lr=0.01, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=20)
    gradients = torch.randn(19, 5, 5, generator=generator)  # square: of full rank, or the bases would be of rounding
    for i, gradient in enumerate(gradients):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.prepare()
        optimizer.step(0.01 if i else 0.0)
        reference.step()
        if i == 0:
            matrix = optimizer._matrices[0]
            for state in (matrix.mean, matrix.square, optimizer._n_steps):
                state.zero_()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_zero_grad_leaves_no_gradient():
    network = build(parse("c4 G c10k1-"), seed=0)
    network(torch.randn(2, 1, 28, 28)).sum().backward()
    make_optimizer(network, SGD).zero_grad()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("n_steps", [2, 3, 7, 15, 1000])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.2, 0.5])
def test_rates_are_those_of_onecyclelr(n_steps, warmup_fraction):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.3)
    start = max(warmup_fraction, 2 / (n_steps + 1))
    schedule = OneCycleLR(optimizer, 0.3, total_steps=n_steps + 1, pct_start=start, cycle_momentum=False)
    expected = []
    for _ in range(n_steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert one_cycle(0.3, n_steps, warmup_fraction) == pytest.approx(expected, rel=1e-9)


def test_training_does_not_import_the_compiler():
    code = """
import sys, torch
from nas_mnist.data import images as data
from nas_mnist.model import network
from nas_mnist.training import loop as training
from nas_mnist.training.recipe import Recipe
from nas_mnist.model.architecture import parse
from nas_mnist.data.datasets import MNIST
pixels = torch.zeros(20, 28, 28, dtype=torch.uint8)
images = data.Images(pixels, torch.arange(20) % 10, torch.arange(20), MNIST.normalisation)
built = network.build(parse("c2 G c10k1-"), seed=0)
list(training.train(built, Recipe(epochs=1, batch_size=10), images, images, seed=0))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
