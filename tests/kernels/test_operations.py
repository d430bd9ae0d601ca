import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms
from torchvision.transforms.v2.functional import InterpolationMode

from nas_mnist.data.datasets import MNIST
from nas_mnist.kernels import operations as kernels
from nas_mnist.model import network
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.training.augmentation import inverse_matrices, normalise

SHAPES = [(16, 16, 24, 24), (7, 12, 9, 5), (3, 1, 28, 28), (2, 64, 3, 2), (9, 20, 1, 1), (1, 5, 4, 7)]
NETWORKS = [
    "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | dropout=0.05",
    "c6 d16 d9 M c16k1- d16s2 d24p1 c10k1- G | act-norm dropout=0.1",
    "c8p1 c8s2p1 M c8k1+b- c7r c10k3- G",
]


def random_map(shape, offset=0.0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    return x.to(memory_format=torch.channels_last).requires_grad_()


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    return norm


def plain(x, norm, mask, norm_first, pool):
    """The same in float64, by PyTorch."""
    y = F.relu(norm(x)) if norm_first else norm(F.relu(x))
    y = y * mask[:, :, None, None] if mask is not None else y
    return F.max_pool2d(y, 2) if pool else y


def assert_same_function(ours, theirs, inputs, exact_inputs):
    y, expected = ours(), theirs()
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=2e-6 * expected.abs().max().item() + 1e-6)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(y, inputs, gradient)
    for actual, exact in zip(gradients, torch.autograd.grad(expected, exact_inputs, gradient.double()), strict=True):
        torch.testing.assert_close(actual, exact.float(), rtol=1e-5, atol=1e-5 * exact.abs().max().item() + 1e-6)


@pytest.mark.parametrize("largest", [32 << 20, 16 << 20])
def test_memory_is_kept_within_the_limits_of_the_c_library_or_not_at_all(monkeypatch, largest):
    """Both thresholds, or neither: one alone ends glibc's own way to adapt them. Older glibc's limit is 32 MiB."""
    options = {}

    def mallopt(option: int, value: int) -> int:
        if option == -3 and value > largest:
            return 0
        options[option] = value
        return 1

    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    kernels.keep_memory()
    assert set(options) == ({-1, -3} if largest == 32 << 20 else set())


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_relu_is_batch_norm_relu_and_dropout(shape, norm_first, dropout):
    check_norm_relu(shape, norm_first, dropout, pool=False)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] > 1])
def test_pool_can_follow_in_the_same_kernel(shape, norm_first):
    check_norm_relu(shape, norm_first, dropout=True, pool=True)


def check_norm_relu(shape, norm_first, dropout, pool):
    x, norm = random_map(shape), random_norm(shape[1])
    exact_x, exact_norm = x.detach().double().requires_grad_(), copy.deepcopy(norm).double()
    mask = torch.empty(shape[:2]).bernoulli_(0.8, generator=torch.Generator().manual_seed(3)) / 0.8 if dropout else None
    assert_same_function(
        lambda: kernels.norm_relu(x, norm, mask, norm_first=norm_first, pool=pool),
        lambda: plain(exact_x, exact_norm, mask, norm_first, pool),
        [x, norm.weight, norm.bias],
        [exact_x, exact_norm.weight, exact_norm.bias],
    )
    for name, buffer in exact_norm.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), buffer.to(norm.get_buffer(name).dtype))


def test_an_offset_of_the_map_does_not_spoil_the_variance():
    x, norm = random_map((32, 8, 10, 10), offset=1000.0), nn.BatchNorm2d(8)
    expected = plain(x.double(), copy.deepcopy(norm).double(), None, norm_first=True, pool=False)
    actual = kernels.norm_relu(x, norm, None, norm_first=True)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-3, atol=1e-3)


def test_norm_of_a_single_value_is_refused_as_pytorch_does():
    with pytest.raises(ValueError, match="more than one value a channel"):
        kernels.norm_relu(random_map((1, 4, 1, 1)), nn.BatchNorm2d(4), None, norm_first=True)


def test_not_a_number_is_passed_on():
    x = random_map((4, 3, 6, 6)).detach()
    x[1, 2, 3, 3] = torch.nan
    assert kernels.norm_relu(x, nn.BatchNorm2d(3), None, norm_first=True)[:, 2].isnan().any()


@pytest.mark.parametrize("shape", [(16, 16, 24, 24), (3, 7, 11, 9), (2, 1, 2, 3), (1, 33, 5, 4)])
def test_max_pool_drops_odd_sides_and_gives_the_first_of_equals_the_gradient(shape):
    x = random_map(shape).detach().round().requires_grad_()  # rounded, so that there are equals
    y, expected = kernels.max_pool(x), F.max_pool2d(x, 2)
    assert torch.equal(y, expected)
    gradient = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, gradient)[0], torch.autograd.grad(expected, x, gradient)[0])


@pytest.mark.parametrize("batch_size", [1, 33, 64])
@pytest.mark.parametrize(
    "in_channels, out_channels, side, kernel, stride, padding",
    [(1, 8, 28, 3, 1, 0), (7, 10, 9, 3, 2, 1), (20, 33, 1, 1, 1, 0), (3, 4, 7, 1, 2, 0), (2, 10, 28, 28, 1, 0)],
)
def test_convolution_is_pytorchs(batch_size, in_channels, out_channels, side, kernel, stride, padding):
    x, weight = random_map((batch_size, in_channels, side, side)), random_weight(out_channels, in_channels, kernel)
    check_convolution(x, weight, torch.linspace(-1, 1, out_channels).requires_grad_(), stride, padding, groups=1)


@pytest.mark.parametrize("batch_size", [2, 128, 150])
@pytest.mark.parametrize("side, kernel, stride, padding", [(26, 3, 1, 0), (11, 3, 2, 1), (9, 5, 1, 2), (6, 3, 1, 2)])
def test_depthwise_convolution_is_pytorchs(batch_size, side, kernel, stride, padding):
    check_convolution(random_map((batch_size, 12, side, side)), random_weight(12, 1, kernel), None, stride, padding, 12)


def random_weight(*shape: int) -> torch.Tensor:
    weight = torch.randn((*shape, shape[-1]), generator=torch.Generator().manual_seed(7))
    return weight.to(memory_format=torch.channels_last).requires_grad_()


def check_convolution(x, weight, bias, stride, padding, groups):
    inputs = [x, weight] if bias is None else [x, weight, bias]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    assert_same_function(
        lambda: kernels.convolve(x, weight, bias, stride=stride, padding=padding),
        lambda: F.conv2d(*exact, stride=stride, padding=padding, groups=groups),
        inputs,
        exact,
    )


def test_a_map_in_any_layout_gives_the_same():
    x, weight = random_map((40, 6, 8, 8)).detach(), random_weight(5, 6, 3).detach()
    planes = kernels.max_pool(F.interpolate(x, scale_factor=2))  # x again, the batch innermost
    assert planes.stride(0) == 1 and torch.equal(planes, x)
    results = [kernels.convolve(t, weight, None, stride=1, padding=0) for t in (planes, x, x.contiguous())]
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_lies_in_the_padding_of_the_batch_reaches_no_gradient():
    x, weight = random_map((5, 3, 6, 6)), random_weight(4, 3, 3)
    norm = random_norm(4)
    with torch.no_grad():
        norm.bias.fill_(1)  # so that an image of zeros would leave its mark
    mask = torch.ones(5, 4)

    def gradients(n_images: int) -> list[torch.Tensor]:
        y = kernels.convolve(x[:n_images], weight, torch.ones(4), stride=1, padding=0)
        y = kernels.convolve(kernels.norm_relu(y, norm, mask[:n_images], norm_first=True), weight[:, :, :1, :1].repeat(
            1, 2, 1, 1)[:, :4], torch.ones(4), stride=1, padding=0)  # fmt: skip
        return torch.autograd.grad(y.square().sum(), [weight, norm.weight, norm.bias])

    twice = torch.cat((x, x)).detach()
    single = gradients(5)
    x, mask = twice, torch.ones(10, 4)
    for one, two in zip(single, gradients(10), strict=True):
        torch.testing.assert_close(2 * one, two, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(28, 28), (9, 14)])
@pytest.mark.parametrize(
    "angle, translate, scale, shear",
    [(0, (0, 0), 1, 0), (30, (0, 0), 1, 0), (-12, (3, -2), 0.9, 8), (200, (11, 20), 1.3, -25), (5, (40, 0), 1, 0)],
)
def test_affine_is_torchvisions(size, angle, translate, scale, shear):
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    radians = torch.tensor([angle, shear]).deg2rad().expand(3, 2)
    matrices = inverse_matrices(
        angle=radians[:, 0],
        translate_x=torch.full((3,), translate[0]),
        translate_y=torch.full((3,), translate[1]),
        scale=torch.full((3,), float(scale)),
        shear=radians[:, 1],
    )
    expected = transforms.affine(
        pixels[:, None] / 255, angle, list(translate), scale, [shear, 0.0], InterpolationMode.BILINEAR
    )
    actual = kernels.affine(pixels, matrices, 0.1307, 0.3081)
    torch.testing.assert_close(actual, (expected - 0.1307) / 0.3081, rtol=0, atol=2e-4)


@pytest.mark.parametrize("line", NETWORKS)
def test_first_twenty_losses_are_those_of_plain_pytorch_in_float64(line, images, monkeypatch):
    fast = first_losses(line, images)
    assert first_losses(line, images) == fast  # the same input gives the same output, bit for bit
    monkeypatch.setattr(network, "_has_kernels", lambda module, x: False)
    assert fast == pytest.approx(first_losses(line, images, torch.float64), rel=1e-4)


def test_first_twenty_losses_are_those_of_plain_pytorch_in_float32(images, monkeypatch):
    fast = first_losses(NETWORKS[0], images)
    monkeypatch.setattr(network, "_has_kernels", lambda module, x: False)
    assert first_losses(NETWORKS[0], images) == pytest.approx(fast, rel=1e-4)


def first_losses(line: str, images, dtype=torch.float32) -> list[float]:
    """The learning rate is low: at 0.1 rounding alone parts PyTorch in float32 from float64 by 1 % in 20 steps."""
    net = build(parse(line), seed=0).train().to(dtype)
    net.draw_from(torch.Generator().manual_seed(6))
    optimizer = torch.optim.SGD(net.parameters(), 2e-5, momentum=0.9, nesterov=True)
    losses = []
    for pixels, labels in images.part(torch.arange(19 * 128 + 17)).batches(128):
        loss = F.cross_entropy(net(normalise(pixels, MNIST.normalisation).to(dtype)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_fast_path_is_for_training_in_float32_alone():
    net, x = build(parse("c4 M G c10k1-"), seed=0), torch.randn(2, 1, 28, 28)
    for kernel in ("NormRelu", "_Convolution"):
        assert kernel in graph(net.train()(x))
        assert kernel not in graph(net.eval()(x))
    assert "NormRelu" not in graph(net.train().double()(x.double()))


def graph(y: torch.Tensor) -> str:
    names, nodes = [], [y.grad_fn]
    for node in nodes:
        names.append(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return " ".join(names)
