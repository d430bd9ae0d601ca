"""The C against PyTorch and onnxruntime, whole: `make proof`, over an hour on a core; `--images N` for fewer.

Under both compilers' sanitizers, on all test images: the canonical solution, the ten reference systems, and 50 random
networks of the search space. A part by name, to go on: `proof.py lite-m4 random`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

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
RANDOM = "random"
PARTS = ("canonical", *ZOO, RANDOM)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--images", type=int, default=10_000, help="of the test set (default: %(default)s)")
    arguments = parser.parse_args()
    parts = arguments.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {min(unknown)}: choose of {', '.join(PARTS)}")
    data_dir = default_data_dir()
    prepare(data_dir)
    train, test = load_train(data_dir).first(200), load_test(data_dir).first(arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            start = time.perf_counter()
            if part == RANDOM:
                _random(train, test, Path(folder))
            else:
                compiled.check(_network(part, train), train, test, Path(folder) / part)
            print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(parts) + (N_RANDOM - 1) * (RANDOM in parts)} passed, 0 failed")
    return 0


def _network(name: str, train):
    if name == "canonical":
        return load(ROOT / "studies" / "canonical" / "solution").network
    return compiled.settled(ZOO[name].architecture, train)


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
