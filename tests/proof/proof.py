"""The C against PyTorch and onnxruntime, whole: `make proof`, some ten minutes on two cores; `--images N` for fewer.

All test images for the canonical solution and the ten reference systems, as fast as the compilers make it; under both
compilers' sanitizers, fewer images of them and 50 random networks of the search space.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "solution"))

import compiled  # noqa: E402

from nas_mnist.data.images import load_test, load_train  # noqa: E402
from nas_mnist.data.unpacking import default_data_dir, prepare  # noqa: E402
from nas_mnist.model.zoo import ZOO  # noqa: E402
from nas_mnist.solution.predict import load  # noqa: E402

N_RANDOM = 50


def few(images, n):
    return replace(images, pixels=images.pixels[:n], labels=images.labels[:n], indices=torch.arange(n))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=10_000, help="of the test set (default: %(default)s)")
    arguments = parser.parse_args()
    data_dir = default_data_dir()
    prepare(data_dir)
    train, test = few(load_train(data_dir), 200), few(load_test(data_dir), arguments.images)
    networks = {"canonical": load(ROOT / "studies" / "canonical" / "solution").network}
    networks |= {name: compiled.settled(system.architecture, train) for name, system in ZOO.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, network in networks.items():
            start = time.perf_counter()
            compiled.check(network, train, test, Path(folder) / name, flags=compiled.FAST)
            compiled.check(network, train, few(test, 50), Path(folder) / f"{name}-sanitized")
            print(f"{name}: {len(test):,} images, {time.perf_counter() - start:.0f} s", flush=True)
        _random(train, few(test, 20), Path(folder))
    print(f"{len(networks) + N_RANDOM} passed, 0 failed")
    return 0


def _random(train, test, folder: Path) -> None:
    count = 0

    @settings(max_examples=N_RANDOM, deadline=None, database=None)
    @given(architecture=compiled.architectures(), seed=st.integers(0, 1000))
    def check(architecture, seed):
        nonlocal count
        count += 1
        compiled.check(compiled.settled(architecture, train, seed), train, test, folder / f"random{count}")
        print(f"random {count}: {architecture}", flush=True)

    check()


if __name__ == "__main__":
    sys.exit(main())
