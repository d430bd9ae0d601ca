import numpy as np
import onnxruntime
import pytest
import torch

from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.model.zoo import ZOO
from nas_mnist.solution.folding import FoldedConvolution, fold
from nas_mnist.solution.quantise import float_graph

ODD = [
    "d4p1+b M d6s2r c8k1- c10k1- G | act-norm",
    "c8k5 M c8 G c16k1 c10k1-",
    "d3 G d10k1+b | act-norm",
    "c4p1 c6p2 M c5k1p1 G c10k1r | act-norm",
    "c3 M c10k13 | act-norm",
    "c4p1+b d6p1 M c8s2r c8k1- c10k1- G | hardswish",
    "d3 M d5 G c8k1 c10k1r | hardswish",
    "c4 M d6 G c10k1- | deskew",
]


def shaken(line: str, seed: int = 0):
    """A network whose norms are not the identity; some factors are negative."""
    network = build(parse(line), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif ".norm." in name and tensor.is_floating_point():
            tensor.normal_(0.3, 0.7, generator=generator)
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize("line", [*(system.notation for system in ZOO.values()), *ODD])
def test_folded_network_is_the_network(line):
    network = shaken(line)
    session = onnxruntime.InferenceSession(float_graph(fold(network)).SerializeToString())
    x = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    logits = session.run(None, {"images": x.numpy()})[0]
    np.testing.assert_allclose(logits, network(x).numpy(), rtol=1e-4, atol=1e-4)


def names(line):
    return [step.name for step in fold(shaken(line)) if isinstance(step, FoldedConvolution)]


def test_norm_behind_the_activation_goes_into_the_next_convolution_unless_that_is_padded():
    assert names("c4 c6 G c10k1- | act-norm") == ["conv1", "conv2", "conv3"]
    assert names("c4 c6p1 G c10k1- | act-norm") == ["conv1", "norm1", "conv2", "conv3"]
    assert names("c4 G c10k1 | act-norm") == ["conv1", "conv2", "norm2"]


def test_norm_with_a_negative_factor_stays_before_a_max_pool():
    network = shaken("c4 M c6 G c10k1- | act-norm")
    network[0][1].norm.weight.data.copy_(torch.tensor([1.0, 1.0, -1.0, 1.0]))
    assert [getattr(step, "name", "pool") for step in fold(network)][:3] == ["conv1", "norm1", "pool"]
    network[0][1].norm.weight.data.abs_()
    assert [getattr(step, "name", "pool") for step in fold(network)][:3] == ["conv1", "pool", "conv2"]


@pytest.mark.parametrize("order", ["", " | act-norm"])
def test_size_of_a_channel_before_its_norm_is_none_of_the_folded_network(order):
    network, rescaled = shaken("c4 d6 G c10k1-" + order), shaken("c4 d6 G c10k1-" + order)
    state = rescaled.state_dict()
    for name in ("0.0", "1.0", "1.2"):  # what follows each is its norm
        norm = f"{name[:2]}{int(name[2]) + 1}.norm"
        sizes = 10 ** torch.linspace(0, 3, len(state[f"{name}.weight"]))  # up, so that the norm's epsilon is nothing
        state[f"{name}.weight"] *= sizes[:, None, None, None]
        state[f"{norm}.running_mean"] *= sizes
        state[f"{norm}.running_var"] *= sizes**2
    for ours, theirs in zip(fold(network), fold(rescaled), strict=True):
        if isinstance(ours, FoldedConvolution):
            np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-4)
            np.testing.assert_allclose(ours.bias, theirs.bias, rtol=1e-3, atol=1e-4)
