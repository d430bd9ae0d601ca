import re
import subprocess
import sys

import pytest
import torch

from nas_mnist.data.datasets import MNIST
from nas_mnist.data.deskew import deskew
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import Dropout, build
from nas_mnist.model.zoo import ZOO
from nas_mnist.solution.codegen import generate, weight_names
from nas_mnist.training.augmentation import normalise

ODD = ["d4p1+b M d6s2r c8k1- c10k1- G", "c8k5 M c8 G c16k1 c10k1- | dropout=0.1 elementwise", "d3 G d10k1+b | act-norm"]
ODD += ["c4r d6 M c10k1- G | dropout=0.1 hardswish", "c4 M d6 G c10k1- | deskew"]


def load(source):
    namespace = {"__name__": "model", "__file__": "model.py"}
    exec(compile(source, "model.py", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("line", [*(system.notation for system in ZOO.values()), *ODD])
def test_generated_module_is_the_network(line):
    architecture = parse(line)
    network = build(architecture, seed=1)
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.1)
    names = weight_names(architecture)
    model = load(generate(architecture, "A model."))["Model"]().eval()
    model.load_state_dict({names[name]: tensor for name, tensor in network.state_dict().items()})
    pixels = torch.randint(256, (5, 28, 28), generator=generator)
    seen = deskew(pixels) if architecture.deskewed else pixels
    ours, theirs = (normalise(p, MNIST.normalisation) for p in (seen, pixels))
    torch.testing.assert_close(model(theirs), network.eval()(ours), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == architecture.n_parameters


def test_source_states_shapes_and_parameters():
    source = generate(parse("c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | dropout=0.05"), "A model.")
    lines = [" ".join(line.split()) for line in source.splitlines()]
    assert "self.conv2 = nn.Conv2d(8, 16, 3, bias=False) # 1,152 parameters" in lines
    assert "x = F.relu(self.norm2(self.conv2(x))) # (B, 16, 24, 24)" in lines
    assert lines.count("x = F.dropout2d(x, 0.05, self.training)") == 7
    assert "x = F.hardswish(self.norm1(self.conv1(x)))" in generate(parse("c8 G c10k1- | hardswish"), "A model.")
    assert all(len(line) <= 120 and line == line.rstrip() for line in source.splitlines())


@pytest.mark.parametrize("line", [*(system.notation for system in ZOO.values()), *ODD])
def test_dropout_stands_where_the_network_has_it(line):
    architecture = parse(line)
    rates = [module.rate for module in build(architecture, seed=0).modules() if isinstance(module, Dropout)]
    drawn = re.findall(r"F\.dropout(2d)?\(x, (\S+), self\.training\)", generate(architecture, "A model."))
    assert [float(rate) for _, rate in drawn] == [rate for rate in rates if rate]
    assert {kind for kind, _ in drawn} <= {"" if architecture.elementwise_dropout else "2d"}


def test_source_is_formatted_as_the_project_is(tmp_path, pytestconfig):
    for i, line in enumerate([*(system.notation for system in ZOO.values()), *ODD]):
        (tmp_path / f"model_{i}.py").write_text(generate(parse(line), "A model."), encoding="utf-8")
    settings = ["--config", str(pytestconfig.rootpath / "pyproject.toml"), "--no-cache", str(tmp_path)]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *settings], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
