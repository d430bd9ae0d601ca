"""The reference systems are what was published, and where that is wrong, what is right."""

import pytest
import torch
from torch.nn import functional as F

from nas_mnist.errors import ArchitectureError
from nas_mnist.model.architecture import Architecture, Conv, GlobalPool, MaxPool, parse
from nas_mnist.model.network import Network, build, count_parameters
from nas_mnist.model.zoo import ZOO, ReferenceSystem, find, resolve

SYSTEMS = [pytest.param(system, id=name) for name, system in ZOO.items()]
COLUMNS = [
    pytest.param(system, column, id=f"{name}-{column}")
    for name, system in ZOO.items()
    for column in ("channels", "side", "jump", "receptive_field")
    if getattr(system.published, column)
]
OUTLINED = [pytest.param(s, id=n) for n, s in ZOO.items() if s.published_receptive_field]


def test_zoo_has_the_ten_systems():
    assert list(ZOO) == [
        "era1a7",
        "eva-drilldown",
        "step-by-step",
        *(f"lite-m{i}" for i in (1, 2, 3, 4)),
        *(f"eva6s4-{size}" for size in ("medium", "small", "ultrasmall")),
    ]


@pytest.mark.parametrize("system", SYSTEMS)
def test_parameter_count_is_the_published_one(system: ReferenceSystem):
    assert system.architecture.n_parameters == system.n_parameters
    assert count_parameters(system.architecture) == system.n_parameters


@pytest.mark.parametrize("system", SYSTEMS)
def test_line_is_written_as_the_notation_writes_it(system: ReferenceSystem):
    assert str(parse(system.notation)) == system.notation


@pytest.mark.parametrize("system, column", COLUMNS)
def test_published_columns_are_what_the_arithmetic_gives(system: ReferenceSystem, column: str):
    published = getattr(system.published, column)
    computed = [getattr(shape, column) for shape in system.architecture.shapes]
    assert len(published) == len(computed)
    wrong = [i for i, (p, c) in enumerate(zip(published, computed, strict=True)) if p is not None and p != c]
    # eva-drilldown: from the 1×1 after the pool on, and the two last layers stand before the global pool.
    known = {"side": [8, 9], "receptive_field": [3, 4, 5, 6, 8, 9]} if system.name == "eva-drilldown" else {}
    assert wrong == known.get(column, [])


@pytest.mark.parametrize("system", SYSTEMS)
def test_stated_receptive_fields_are_what_the_arithmetic_gives(system: ReferenceSystem):
    assert [shape.receptive_field for shape in system.architecture.shapes] == list(system.receptive_fields)


@pytest.mark.parametrize("system", SYSTEMS)
def test_receptive_field_is_the_span_of_pixels_that_change_one_output(system: ReferenceSystem):
    spans = [measured_span(system.architecture, n_layers) for n_layers in range(1, len(system.receptive_fields) + 1)]
    assert spans == list(system.receptive_fields)


def measured_span(architecture: Architecture, n_layers: int) -> int:
    """Pixels in a row that have a gradient from one output, on an image with room enough for any of these networks."""
    image = torch.zeros(1, 1, 129, 129, requires_grad=True)
    x = image
    for layer, shape in zip(architecture.layers[:n_layers], architecture.shapes, strict=False):
        if isinstance(layer, Conv):
            x = F.conv2d(x, torch.ones(1, 1, layer.kernel, layer.kernel), stride=layer.stride, padding=layer.padding)
        elif isinstance(layer, MaxPool):
            x = F.avg_pool2d(x, 2)  # the same window, with a gradient everywhere in it
        else:
            assert isinstance(layer, GlobalPool)
            x = F.avg_pool2d(x, shape.in_side, stride=1)
    middle = x.shape[-1] // 2
    x[0, 0, middle, middle].backward()
    return int((image.grad[0, 0].sum(0) != 0).sum())


@pytest.mark.parametrize("system", OUTLINED)
def test_outlined_receptive_field_ends_at_the_last_3x3_convolution(system: ReferenceSystem):
    kernels = [(s.layer, s.receptive_field) for s in system.architecture.shapes]
    at_last_conv = [field for layer, field in kernels if isinstance(layer, Conv) and layer.kernel == 3][-1]
    assert system.published_receptive_field == at_last_conv
    assert system.architecture.receptive_field > at_last_conv


@pytest.mark.parametrize("system", SYSTEMS)
def test_built_layers_give_the_shapes_of_the_table(system: ReferenceSystem):
    network = build(system.architecture, seed=0).eval()
    x = torch.zeros(2, 1, 28, 28)
    for child, shape in zip(network, system.architecture.shapes, strict=True):
        x = child(x)
        assert x.shape == (2, shape.channels, shape.side, shape.side)
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_published_multiply_adds_of_era1a7_count_the_norms_parameters():
    """torchinfo, which printed 102.21 M for a batch of 128, counts a norm's parameters as its multiply-adds."""
    architecture = ZOO["era1a7"].architecture
    with torch.device("meta"):
        norms = [m for m in Network(architecture).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    norm_parameters = sum(p.numel() for norm in norms for p in norm.parameters())
    assert (architecture.n_macs, norm_parameters) == (798_072, 448)
    assert f"{128 * (architecture.n_macs + norm_parameters) / 1e6:.2f}" == "102.21"


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_figures_are_possible(system: ReferenceSystem):
    assert 0.98 < system.published_accuracy <= system.best_accuracy < 1
    assert system.epochs in (15, 19)


def test_source_is_named_as_its_authors_do_and_with_its_repository():
    assert ZOO["era1a7"].source == "TSAI ERA V1 A7, github.com/woncoh1/era1a7"
    assert not any(system.source.endswith(".txt") for system in ZOO.values())


def test_resolve_takes_a_name_or_a_line():
    assert resolve("lite-m1") is ZOO["lite-m1"].architecture
    assert resolve("c8 G c10k1-") == parse("c8 G c10k1-")


def test_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ArchitectureError, match="no reference system 'era1a8': choose one of era1a7, eva-drilldown"):
        find("era1a8")
    with pytest.raises(ArchitectureError, match=r"'era1a8' is no reference system .*era1a7.* and no line: `era1a8` at"):
        resolve("era1a8")


def test_broken_line_is_refused_with_the_position_alone():
    with pytest.raises(ArchitectureError, match=r"^`x9` at position 4 is no layer"):
        resolve("c8 x9 G")
