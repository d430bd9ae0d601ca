import pytest

from nas_mnist.errors import ArchitectureError
from nas_mnist.model.architecture import Architecture, Conv, GlobalPool, MaxPool, parse


def test_line_names_every_property_of_a_convolution():
    architecture = parse("c8k5s2p1+b d4 M c6r c10k1- G | act-norm dropout=0.05 elementwise")
    assert architecture == Architecture(
        (
            Conv(8, kernel=5, stride=2, padding=1, bias=True),
            Conv(4, separable=True),
            MaxPool(),
            Conv(6, norm=False),
            Conv(10, kernel=1, norm=False, activation=False),
            GlobalPool(),
        ),
        norm_first=False,
        dropout=0.05,
        elementwise_dropout=True,
    )


@pytest.mark.parametrize(
    "line",
    [
        "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1-",
        "c8p1+b- d16s2r M c10k1- G | act-norm",
        "c10k28- | dropout=1e-05",
        "c10k28+br | elementwise",
        "c8 M c8r G c10k1- | dropout=0.05 elementwise hardswish deskew",
        "c8 G c10k1- | act-norm deskew",
    ],
)
def test_line_round_trips(line):
    assert str(parse(line)) == line
    assert parse(str(parse(line))) == parse(line)


def test_spaces_do_not_matter():
    assert parse("  c10k28-   |  act-norm ") == parse("c10k28- | act-norm")


@pytest.mark.parametrize(
    ("line", "token", "position"),
    [
        ("c8 x16 G c10k1-", "x16", 4),
        ("c8 c16 m c10k1-", "m", 8),
        ("c8k G c10k1-", "c8k", 1),
        ("c8p1k3 G c10k1-", "c8p1k3", 1),
        ("c8 c0 G c10k1-", "c0", 4),
        ("c8 c99999 G c10k1-", "c99999", 4),
        ("c8s0 G c10k1-", "c8s0", 1),
        ("c٨ G c10k1-", "c٨", 1),
        ("c8-r G c10k1-", "c8-r", 1),
        ("c10k28- | drop=0.1", "drop=0.1", 11),
        ("c10k28- | dropout=nan", "dropout=nan", 11),
        ("c10k28- | a | act-norm", "a", 11),
    ],
)
def test_error_names_the_token_and_its_position(line, token, position):
    with pytest.raises(ArchitectureError) as error:
        parse(line)
    assert f"`{token}` at position {position}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "at least one layer"),
        ("c8 M M M M c8 G c10k1-", "layer 6 `c8` shrinks the 1×1 map below 1×1"),
        ("c8 c16", "ends with 16 on 24×24"),
        ("c8 G c9k1-", "ends with 9 on 1×1"),
        ("c10k28- | dropout=1", "below 1, not 1"),
        ("c8 G c10k1- | act-norm hardswish", "act-norm is for ReLU: hardswish stands behind the norm, leave out one"),
    ],
)
def test_network_that_cannot_exist_is_refused_with_the_reason(line, reason):
    with pytest.raises(ArchitectureError, match=reason):
        parse(line)


def test_norm_without_activation_is_refused():
    with pytest.raises(ArchitectureError, match="needs an activation"):
        Conv(8, norm=True, activation=False)


def test_shapes_follow_the_receptive_field_arithmetic():
    shapes = parse("c8k5s2p1 M c8p1 G c10k1-").shapes
    assert [s.side for s in shapes] == [13, 6, 6, 1, 1]
    assert [s.jump for s in shapes] == [2, 4, 4, 4, 4]
    assert [s.receptive_field for s in shapes] == [5, 7, 15, 35, 35]
    assert [(s.kernel, s.stride, s.padding) for s in shapes] == [(5, 2, 1), (2, 2, 0), (3, 1, 1), (6, 1, 0), (1, 1, 0)]


def test_parameters_and_multiply_adds_of_each_kind_of_layer():
    plain, separable, biased, *_ = parse("c4 d6 c5k1+b- G c10k1-").shapes
    assert (plain.n_parameters, plain.n_macs) == (4 * 9 + 2 * 4, 4 * 9 * 26**2)
    assert (separable.n_parameters, separable.n_macs) == (4 * 9 + 2 * 4 + 4 * 6 + 2 * 6, (4 * 9 + 4 * 6) * 24**2)
    assert (biased.n_parameters, biased.n_macs) == (6 * 5 + 5, 6 * 5 * 24**2)
    assert (plain.n_activations, separable.n_activations) == (4 * 26**2, (4 + 6) * 24**2)
    assert biased.n_activations == 5 * 24**2
