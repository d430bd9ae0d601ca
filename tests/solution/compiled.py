"""The C of a network, compiled on this machine and run over images, against PyTorch and onnxruntime."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from nas_mnist.data.images import Images
from nas_mnist.model.network import Network, build
from nas_mnist.solution import c_code
from nas_mnist.solution.folding import fold
from nas_mnist.solution.predict import onnx_logits
from nas_mnist.solution.quantise import behind_deskewing, quantise, read
from nas_mnist.study import space
from nas_mnist.training.augmentation import normalise, seen_by
from nas_mnist.training.evaluation import predict

COMPILERS = ("gcc", "clang")
STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FAST = ("-O2",)
TOLERANCE = 1e-4  # of float logits
LOGITS = Path(__file__).with_name("logits.c")


def require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: install it from your distribution's packages")


def compile_c(folder: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    binary = folder.parent / f"{folder.name}-{compiler}"
    command = [compiler, *STRICT, *flags, f"-I{folder}", folder / "model.c", LOGITS, "-o", binary]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return binary


def run(binary: Path, mode: str, images: Images) -> np.ndarray:
    """The logits (N, 10) of `model_int8` or `model_float`."""
    done = subprocess.run([binary, mode], input=images.pixels.numpy().tobytes(), capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32).reshape(-1, 10)


@torch.no_grad()
def check(
    network: Network, calibration: Images, images: Images, folder: Path, compilers=COMPILERS, flags=SANITIZED
) -> None:
    """int8 logits are onnxruntime's to the last bit, float ones PyTorch's within 1e-4, whoever compiles."""
    steps, like = fold(network), images.normalisation
    model = quantise(steps, normalise(seen_by(network, calibration).pixels, like).numpy())
    deskewed = network.architecture.deskewed
    c_code.write(folder, steps, read(model, steps), "A network.", like, deskewed=deskewed)
    int8 = onnx_logits((behind_deskewing(model, like) if deskewed else model).SerializeToString(), images).numpy()
    floats = np.concatenate([logits for logits, _ in predict(network, images)])
    for compiler in compilers:
        binary = compile_c(folder, compiler, flags)
        np.testing.assert_array_equal(run(binary, "int8", images), int8)
        np.testing.assert_allclose(run(binary, "float", images), floats, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def settled(architecture, images: Images, seed: int = 0) -> Network:
    """An untrained network whose norms have seen images, and some of whose factors are negative."""
    network = build(architecture, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith(("norm.weight", "norm.bias")):
            tensor.normal_(0.5, 0.5, generator=generator)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(_see)
    network.eval()(normalise(images.pixels, images.normalisation))
    for module in network.modules():
        module._forward_pre_hooks.clear()
    return network


def _see(norm: torch.nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
    norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
    norm.running_var.copy_(inputs[0].var((0, 2, 3)).clamp(min=0.01))  # of less, float32 keeps too few digits


def architectures() -> st.SearchStrategy:
    """Networks of the search space, within the budget."""
    drawn = st.fixed_dictionaries({name: _values(d) for name, d in space.distributions().items()})
    return drawn.map(lambda parameters: space.to_candidate(parameters, max_params=8000, epochs=15).architecture)


def _values(distribution: BaseDistribution) -> st.SearchStrategy:
    if isinstance(distribution, CategoricalDistribution):
        return st.sampled_from(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return st.integers(distribution.low, distribution.high)
    return st.floats(distribution.low, distribution.high)
