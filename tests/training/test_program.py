"""The compiled program is held to plain PyTorch in float64: gradients, statistics, losses, each optimizer."""

import copy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms
from torchvision.transforms.v2.functional import InterpolationMode

from nas_mnist.data.images import Images
from nas_mnist.kernels.instructions import Mode, Op
from nas_mnist.kernels.maps import as_map
from nas_mnist.kernels.norm_relu import MASK
from nas_mnist.kernels.optimizers import renew_bases
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import Dropout, build
from nas_mnist.training.augmentation import Augmentation, inverse_matrices
from nas_mnist.training.evaluation import evaluate, recalibrate
from nas_mnist.training.optimizers import make_optimizer
from nas_mnist.training.plan import _allocate, _Life, plan
from nas_mnist.training.program import Program, can_compile
from nas_mnist.training.recipe import Recipe
from nas_mnist.training.steps import CompiledSteps, PlainSteps

# Every kind of layer of the space and of the ten networks, and what a line can say besides.
LINES = [
    "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1-",
    "c20 d24 d9 M c22k1- d24 c10k1- G",
    "c6 d16 d9 M c16k1- d16s2 d24p1 c10k1- G | act-norm",
    "c4p1 c8s2p1 M c8k1+b- c7r c10k3- G",
    "d5 c6p1 d33p1 M c7k1 M d8p1 d9k5p2 G c10k1-",
    "M c5p2 M d6k1 d4p3 c8k1s2 c10- G",
    "c3r M d4r d6+br c5- M c10k1- G | act-norm",
    "c10k28-",
    "c5 d9 M c7k1- d6s2p1 c8r M c10k1- G | hardswish",
    "c2 G c9k1+b c10k1+b-",
]
BATCHES = [33, 64, 5]
NO_AUGMENTATION = Augmentation(0, 0, 0, 0)
OPTIMIZERS = {"sgd": 2e-4, "adamw": 2e-5, "soap": 2e-5}


pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


@pytest.fixture(autouse=True)
def own_loops_of_pytorch():
    """oneDNN frees what is not its own after the gradient of a strided 1×1 convolution, on a CPU with AVX2 alone."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def recipe(batch_size: int, optimizer: str = "sgd", **others) -> Recipe:
    return Recipe(batch_size=batch_size, optimizer=optimizer, augmentation=NO_AUGMENTATION, **others)


def near(actual, expected, tolerance: float = 1e-4) -> None:
    """As far apart as `tolerance` times the largest of all values."""
    expected = torch.as_tensor(expected).double()
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.as_tensor(actual).double(), expected, rtol=0, atol=tolerance * scale + 1e-7)


def assert_gradients_are_those_of(exact, program, tolerance: float = 1e-4, single=None) -> None:
    """As `near`; what is zero but for rounding, as a bias before a norm, may be off as it is in PyTorch in float32."""
    largest = max(parameter.grad.abs().max().item() for parameter in exact.parameters())
    for name, parameter in exact.named_parameters():
        gradient = parameter.grad
        actual = torch.from_numpy(program.array(name, gradient=True)).double()
        rounding = (single.get_parameter(name).grad - gradient).abs().max().item() if single else 0.0
        allowed = max(tolerance * gradient.abs().max().item(), 10 * rounding) + 1e-5 * largest
        assert (actual - gradient).abs().max().item() <= allowed, name


def pair(line: str, seed: int = 0):
    """A network in float32, and the same in float64; norms with parameters that are not those of the start."""
    net = build(parse(line), seed=seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net, copy.deepcopy(net).double()


class Masks:
    """Hands a plain network the masks that the program has drawn, in the order of the layers."""

    def __init__(self, network, program):
        rows = [row for row, f in zip(program.plan.activations, followings(program), strict=False) if f.drops]
        modules = [m for m in network.modules() if isinstance(m, Dropout) and m.rate > 0]
        assert len(rows) == len(modules)
        for module, row in zip(modules, rows, strict=True):
            module.mask = lambda x, row=row: self.mask(program, row, x)

    @staticmethod
    def mask(program, row, x):
        c, start, n = row[5], row[6], program.plan.n_padded
        rows = program._arena[start : start + 4 * c * n].reshape(4, c, n)
        return torch.from_numpy(rows[MASK].T.copy())[: len(x), :, None, None].to(x.dtype)


def followings(program):
    found = {i.following.layer: i.following for i in program.plan.instructions if i.following}
    return [found[layer] for layer in sorted(found)]


@pytest.mark.parametrize("dropout", ["", "dropout=0.2"])
@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("line", LINES)
def test_gradients_and_statistics_are_those_of_pytorch(line, batch_size, dropout, images):
    if dropout:
        line += f" {dropout}" if "|" in line else f" | {dropout}"
    net, exact = pair(line)
    single = copy.deepcopy(net)
    program = Program(net, Mode.TRAIN, batch_size, recipe(batch_size, label_smoothing=0.1))
    positions = torch.arange(batch_size) * 7
    results = program.run(images, positions, [0.0], seed=3)
    pixels, labels = images.select(positions)
    for network in (single, exact):
        if dropout:
            Masks(network, program)
        x = plain_images(pixels, images).to(next(network.parameters()).dtype)
        logits = network.train()(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
    assert results.losses[0] / batch_size == pytest.approx(loss.item(), rel=1e-5)
    assert results.n_correct[0] == (logits.argmax(1) == labels).sum()
    assert_gradients_are_those_of(exact, program, single=single)
    for name, buffer in exact.named_buffers():
        near(net.get_buffer(name), buffer)


def plain_images(pixels, images):
    return (pixels[:, None].double() / 255 - images.normalisation.mean) / images.normalisation.std


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("line", [*LINES[:5], LINES[-2]])
def test_first_twenty_losses_are_those_of_plain_pytorch(line, optimizer, images):
    """Batches of 64 and a last one of 17. Rounding parts PyTorch in float32 from float64 too."""
    followed = recipe(64, optimizer, weight_decay=0.1 if optimizer != "sgd" else 5e-4)
    fast, plain, exact = (
        losses_of(kind(build(parse(line), seed=0).to(dtype), followed, images, torch.Generator()), optimizer)
        for kind, dtype in ((CompiledSteps, torch.float32), (PlainSteps, torch.float32), (PlainSteps, torch.float64))
    )
    allowed = np.maximum(1e-4 * exact, 3 * np.abs(plain - exact).max())
    assert (np.abs(fast - exact) <= allowed).all()


def losses_of(steps, optimizer: str) -> np.ndarray:
    rates = np.linspace(1, 2, 20) * OPTIMIZERS[optimizer]
    batches = zip((torch.arange(19 * 64 + 17) * 40).split(64), rates, strict=True)
    return np.array([steps.run(batch, [float(rate)])[0] / len(batch) for batch, rate in batches])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_step_is_that_of_the_optimizer_in_pytorch(optimizer, images):
    """Along the same gradients and bases, at a usual rate, over two renewals of SOAP's bases."""
    net = build(parse("c6 d9 M c5+b d12p1 G c10k1+b- | act-norm"), seed=0)
    start, other = build(net.architecture, seed=0), build(net.architecture, seed=0).double()
    followed = recipe(32, optimizer, weight_decay=0.02, momentum=0.8)
    program, reference = Program(net, Mode.TRAIN, 32, followed), make_optimizer(other, followed)
    for i, rate in enumerate(np.geomspace(1e-3, 2e-2, 24)):
        program.run(images, torch.arange(32) * 5 + i * 160, [float(rate)])
        for name, parameter in other.named_parameters():
            parameter.grad = torch.from_numpy(program.array(name, gradient=True).copy()).double()
        if optimizer == "soap" and i % 20 == 1:
            take_bases(reference, program)
        reference.step(float(rate))
    for name, parameter in other.named_parameters():
        way = (parameter - start.get_parameter(name)).abs().max().item()
        assert (net.get_parameter(name) - parameter).abs().max().item() <= 2e-3 * way, name


def take_bases(soap, program) -> None:
    """Those that the program has found: where a factor has no full rank, they depend on rounding."""
    for matrix, factors in zip(soap._matrices, program.plan.factors, strict=True):
        turns = []
        for place, basis in zip((factors.rows, factors.columns), matrix.bases, strict=True):
            found = torch.from_numpy(place.of(program._arena)[1].copy()).double()
            near(found.T @ found, torch.eye(len(found)))
            turns.append(found.T @ basis)
            basis.copy_(found)
        matrix.mean.copy_(turns[0] @ matrix.mean @ turns[1].T)
        matrix.square.copy_(turns[0].square() @ matrix.square @ turns[1].square().T)


def test_bases_are_the_eigenvectors_of_the_factors(images):
    program = Program(build(parse("c6 d9 M c10k1- G"), seed=0), Mode.TRAIN, 32, recipe(32, "soap"))
    program.run(images, torch.arange(32 * 10) * 3, [1e-3] * 10)
    for factors in program.plan.factors:
        moments, rows, columns = (p.of(program._arena) for p in (factors.moments, factors.rows, factors.columns))
        renew_bases(*moments, rows[0], columns[0], rows[1], columns[1], np.empty_like(moments[0]))
        for place in (factors.rows, factors.columns):
            factor, basis = torch.from_numpy(place.of(program._arena)).double()
            turned = basis.T @ factor @ basis
            near(turned, torch.diag(turned.diagonal()), 1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_call_is_many_steps(optimizer, images):
    """Also across the renewals of SOAP's bases, bit for bit."""
    line, positions = "c4 d6 M c10k1- G | dropout=0.1", torch.arange(45 * 16) * 11
    nets = [build(parse(line), seed=0) for _ in range(2)]
    rates = [1e-3] * 45
    together = CompiledSteps(nets[0], recipe(16, optimizer), images, torch.Generator().manual_seed(1))
    together.run(positions, rates)
    apart = CompiledSteps(nets[1], recipe(16, optimizer), images, torch.Generator().manual_seed(1))
    for first in (0, 1, 20, 30):
        last = {0: 1, 1: 20, 20: 30, 30: 45}[first]
        apart.run(positions[first * 16 : last * 16], rates[first:last])
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("n_images", [1, 130])
def test_evaluation_is_that_of_pytorch(line, n_images, images):
    net, exact = pair(line)
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.add_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(1)))
            exact.get_buffer(name).copy_(buffer)
    few = images.part(torch.arange(n_images) * 13)
    loss, accuracy = evaluate(net, few)
    pixels, labels = few.select(torch.arange(n_images))
    logits = exact.eval()(plain_images(pixels, images))
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_evaluation_changes_nothing_and_recalibration_only_the_statistics(images):
    net = build(parse(LINES[2]), seed=0)
    before = copy.deepcopy(net.state_dict())
    few = images.part(torch.arange(300) * 13)
    evaluate(net, few)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    recalibrate(net, few)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {name for name in before if "running" in name or "num_batches" in name}


def test_elements_are_dropped_at_the_rate_and_the_same_in_the_gradient(images):
    net = build(parse("c8p1 M c10k1- G | dropout=0.3 elementwise"), seed=0)
    program = Program(net, Mode.TRAIN, 64, recipe(64))
    whole = program.plan
    at = next(i for i, instruction in enumerate(whole.instructions) if instruction.op == Op.DROP_ELEMENTS)
    program.plan = replace(whole, table=whole.table[: at + 1])  # what comes later takes the maps' room
    program.run(images, torch.arange(64), [0.0], seed=5)
    x, y = (as_map(program._arena[start:], 8, 28, 28, 64).copy() for start in whole.table[at, 2:4])
    program.plan, program.n_steps = whole, 0
    program.run(images, torch.arange(64), [0.0], seed=5)
    kept = y[x > 0] > 0
    assert kept.mean() == pytest.approx(0.7, abs=0.01)
    np.testing.assert_allclose(y[x > 0][kept], x[x > 0][kept] / 0.7, rtol=1e-6)

    exact = build(parse("c8p1 M c10k1- G"), seed=0).double().train()
    mask = torch.from_numpy(y / np.where(x > 0, x, 1)).permute(3, 0, 1, 2).double()
    pixels, labels = images.select(torch.arange(64))
    maps = exact[0](plain_images(pixels, images)) * mask
    F.cross_entropy(exact[3](exact[2](exact[1](maps))).flatten(1), labels).backward()
    assert_gradients_are_those_of(exact, program)


def test_masks_depend_on_the_seed_the_step_and_the_layer_and_keep_their_share(images):
    def masks(seed, n_steps):
        program = Program(build(parse("c40 c40 G c10k1- | dropout=0.25"), seed=0), Mode.TRAIN, 64, recipe(64))
        program.run(images, torch.arange(64 * n_steps), [0.0] * n_steps, seed=seed)
        rows = [program._arena[r[6] : r[6] + 40 * 64].copy() for r in program.plan.activations[:2]]
        return rows

    first, second = masks(1, 1)
    assert np.unique(first).tolist() == pytest.approx([0, 4 / 3]) and (first > 0).mean() == pytest.approx(
        0.75, abs=0.03
    )
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, masks(2, 1)[0]) and not np.array_equal(first, masks(1, 2)[0])
    assert np.array_equal(first, masks(1, 1)[0])


@pytest.mark.parametrize(
    "angle, translate, scale, shear",
    [(0, (0, 0), 1, 0), (30, (0, 0), 1, 0), (-12, (3, -2), 0.9, 8), (200, (11, 20), 1.3, -25), (5, (40, 0), 1, 0)],
)
def test_images_are_transformed_as_torchvision_does(angle, translate, scale, shear, images):
    net = build(parse("c10k28-"), seed=0)
    program = Program(net, Mode.EVALUATE, 3)
    radians = torch.tensor([angle, shear]).deg2rad().expand(3, 2)
    matrices = inverse_matrices(
        angle=radians[:, 0],
        translate_x=torch.full((3,), translate[0]),
        translate_y=torch.full((3,), translate[1]),
        scale=torch.full((3,), float(scale)),
        shear=radians[:, 1],
    )
    pixels = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    own = Images(pixels, torch.arange(3), torch.arange(3), images.normalisation)
    program.run(own, torch.arange(3), [0.0], matrices=matrices)
    expected = transforms.affine(
        pixels[:, None] / 255, angle, list(translate), scale, [shear, 0.0], InterpolationMode.BILINEAR
    )
    start = program.plan.table[0][3]
    actual = program._arena[start : start + 28 * 28 * program.plan.n_padded].reshape(28, 28, -1)[..., :3]
    expected = (expected[:, 0] - images.normalisation.mean) / images.normalisation.std
    torch.testing.assert_close(torch.from_numpy(actual).permute(2, 0, 1), expected, rtol=0, atol=2e-4)


def test_an_offset_of_the_map_does_not_spoil_the_variance(images):
    """A bias of 1000 before a norm changes nothing but the running mean."""
    net, exact = pair("c6+b c10k1- G")
    for network in (net, exact):
        network[0][0].bias.data.fill_(1000.0)
    program = Program(net, Mode.TRAIN, 64, recipe(64))
    positions = torch.arange(64)
    program.run(images, positions, [0.0])
    pixels, labels = images.select(positions)
    F.cross_entropy(exact.train()(plain_images(pixels, images)), labels).backward()
    near(net[0][1].norm.running_var, exact[0][1].norm.running_var, 1e-3)
    near(program.array("1.0.weight", gradient=True), exact[1][0].weight.grad, 1e-3)


def test_the_first_of_equals_gets_the_pools_gradient(images):
    """On a black background all are equal: the whole image is one shade here."""
    net, exact = pair("c4 M c6 M c10k1- G")
    pixels = torch.full((8, 28, 28), 3, dtype=torch.uint8)
    pixels[:, 10:14, 9:12] = 200
    own = Images(pixels, torch.arange(8), torch.arange(8), images.normalisation)
    program = Program(net, Mode.TRAIN, 8, recipe(8))
    program.run(own, torch.arange(8), [0.0])
    F.cross_entropy(exact.train()(plain_images(pixels, own)), own.labels).backward()
    assert_gradients_are_those_of(exact, program, 1e-3)


def test_not_a_number_reaches_the_loss(images):
    net = build(parse(LINES[0]), seed=0)
    with torch.no_grad():
        net[1][0].weight[0, 0, 0, 0] = torch.nan
    results = Program(net, Mode.TRAIN, 64, recipe(64)).run(images, torch.arange(64), [0.0])
    assert np.isnan(results.losses).all()


def test_only_float32_on_a_cpu_is_compiled():
    net = build(parse("c4 G c10k1-"), seed=0)
    assert can_compile(net)
    assert not can_compile(net.double())
    assert not can_compile(build(parse("c4 G c10k1-"), seed=0, device="meta"))


def test_no_two_arrays_of_a_plan_overlap():
    made = plan(parse(LINES[4]), 64, Mode.TRAIN, "soap")
    taken = np.zeros(made.size, np.int64)
    for place in made.places.values():
        place.of(taken)[...] += 1
    for factors in made.factors:
        for place in (factors.moments, factors.rows, factors.columns):
            place.of(taken)[...] += 1
    assert taken.max() == 1 and len(made.factors) == 11


def test_a_plan_takes_milliseconds_and_compiles_nothing():
    """The second network is trained by the machine code of the first."""
    code = """
import torch
from nas_mnist.data.datasets import MNIST
from nas_mnist.data.images import Images
from nas_mnist.kernels.interpreter import run
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.training.recipe import Recipe
from nas_mnist.training.steps import CompiledSteps
images = Images(torch.zeros(8, 28, 28, dtype=torch.uint8), torch.arange(8), torch.arange(8), MNIST.normalisation)
for line, optimizer in (("c4 M G c10k1-", "sgd"), ("d8 d6 M c10k1- G | dropout=0.1 act-norm", "soap")):
    steps = CompiledSteps(build(parse(line), seed=0), Recipe(optimizer=optimizer), images, torch.Generator())
    steps.run(torch.arange(8), [0.1])
    print(len(run.signatures))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["1", "1"]


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=25))
def test_maps_that_are_needed_at_the_same_time_have_places_of_their_own(drawn):
    lives = {number: _Life(size, min(a, b), max(a, b)) for number, (size, a, b) in enumerate(drawn)}
    offsets, end = _allocate(lives)
    for number, life in lives.items():
        assert 0 <= offsets[number] <= end - life.size
        for other, its in lives.items():
            at_once = number != other and life.first <= its.last and its.first <= life.last
            apart = offsets[number] + life.size <= offsets[other] or offsets[other] + its.size <= offsets[number]
            assert apart or not at_once


def test_what_a_depthwise_convolution_reads_is_made_plane_by_plane_and_kept_nowhere():
    made = plan(parse("c8 d8 M d8 c10k1- G"), 64, Mode.TRAIN, "soap")
    read = [
        row[2]
        for instruction, row in zip(made.instructions, made.table, strict=True)
        if instruction.op in (Op.CONVOLVE, Op.WEIGHT_GRADIENT) and instruction.filter.depthwise
    ]
    assert len(read) == 4 and min(read) >= made.planes
    assert made.size < 0.75 * sum(i.y.channels * i.y.side**2 * 64 for i in made.instructions if i.y)
