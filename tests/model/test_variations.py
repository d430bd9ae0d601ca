import pytest

from nas_mnist.errors import ArchitectureError
from nas_mnist.model.architecture import MAX_CHANNELS, parse
from nas_mnist.model.ladders import LADDERS
from nas_mnist.model.network import count_parameters
from nas_mnist.model.variations import filled, variations, without_norms
from nas_mnist.model.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_variations_are_other_networks_of_the_same_size(name):
    architecture = ZOO[name].architecture
    found = dict(variations(architecture))
    assert len(found) >= 5 and "all widths the same" in found
    for varied in found.values():
        assert varied.layers != architecture.layers
        assert 0.97 * architecture.n_parameters <= count_parameters(varied) <= architecture.n_parameters
        assert (varied.norm_first, varied.dropout) == (architecture.norm_first, architecture.dropout)


def test_what_is_varied():
    found = dict(variations(parse("c16 d16 d32 M c16k1- d16 d24 d32 c10k1- G | act-norm")))
    assert list(found) == [
        "block 1 plain",
        "block 2 plain",
        "no 1×1 convolution at pool 1",
        "block 1 one deeper",
        "block 1 one shallower",
        "block 2 one deeper",
        "block 2 one shallower",
        "all widths the same",
    ]
    kinds = [str(layer)[0] for layer in found["block 2 plain"].layers]
    assert "".join(kinds) == "cddMccccc" + "G"
    assert len(found["block 1 one shallower"].layers) == 9


def test_convolution_is_put_behind_a_pool_that_has_none_beside_it():
    found = dict(variations(parse("c8 c16 M c16 G c10k1-")))
    assert str(found["a 1×1 convolution behind pool 1"].layers[3]).endswith("k1")


@pytest.mark.parametrize("line", ["c10k28-", "G c10k1-"])
def test_network_of_one_layer_has_nothing_to_vary(line):
    assert dict(variations(parse(line))) == {}


def test_deeper_where_the_map_is_too_small_is_left_out():
    assert "block 1 one deeper" not in dict(variations(parse("c8k15 c8k13 c10k2-")))


def test_widths_fill_the_limit():
    wide = filled(parse("c8 c16 M c16 G c10k1-"), 7999)
    assert 0.97 * 7999 <= wide.n_parameters <= 7999
    assert filled(parse("c8 M c16 G c10k1-"), 10**9).layers[2].channels == MAX_CHANNELS
    with pytest.raises(ArchitectureError, match="more than 10 parameters at its narrowest"):
        filled(parse("c8 c16 M c16 G c10k1-"), 10)


def test_norms_become_biases():
    architecture = parse("c8 c16r M d16 G c10k1-")
    assert str(without_norms(architecture)) == "c8+br c16r M d16+br G c10k1-"


def test_ladders_have_the_published_sizes_and_end_at_their_network():
    counts = {name: [rung.architecture.n_parameters for rung in rungs] for name, rungs in LADDERS.items()}
    assert counts == {
        "eva-drilldown": [4572, 5088, 5088, 6124, 6124, 6720],
        "step-by-step": [5384, 7496, 7496],
    }
    for name, rungs in LADDERS.items():
        assert rungs[-1].architecture.layers == ZOO[name].architecture.layers
        assert rungs[-1].published == ZOO[name].best_accuracy
