"""What the machine is to us, and the exit code of `doctor`."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from nas_mnist.cli import main as cli
from nas_mnist.kernels.vectors import LANES
from nas_mnist.training import self_check
from nas_mnist.training.self_check import CHECKS, Comparison
from nas_mnist.workers import doctor, machine

GIB = 2**30


def comparison(difference):
    return Comparison("c10k28-", "sgd", difference, 3.0)


@pytest.fixture
def checks(monkeypatch):
    """The differences that are found, by device."""
    found = {"cpu": 1e-6}
    monkeypatch.setattr(self_check, "compare_all", lambda device: [comparison(found[str(device)])])
    return found


@pytest.fixture
def gpu(monkeypatch, checks):
    properties = SimpleNamespace(name="GPU A", total_memory=80 * GIB, uuid="7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    checks["cuda:0"] = 1e-6
    return checks


def test_it_tells_the_cores_memory_and_vectors_that_workers_get(data_dir, monkeypatch):
    monkeypatch.setattr(machine, "_group_limits", lambda: iter([2 * GIB]))
    found = doctor.look(data_dir)
    assert found.cores == machine.n_cores() <= found.cores_there
    assert found.memory_limit == 2 * GIB < found.memory_bytes and found.free_bytes < 2 * GIB
    assert found.kernel_vector_bits == 32 * LANES
    assert found.datasets["mnist"] and not found.datasets["kmnist"]


def test_caches_are_read_and_those_of_instructions_left_out(tmp_path):
    for i, (level, kind, size) in enumerate([(1, "Data", "32K"), (1, "Instruction", "32K"), (2, "Unified", "512K")]):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("level", str(level)), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    assert machine.cache_sizes(tmp_path) == {"L1": "32K", "L2": "512K"}
    assert machine.cache_sizes(tmp_path / "nowhere") == {}


def test_doctor_trains_for_real_and_says_same(data_dir, capsys):
    code = cli.main(["doctor", "--data-dir", str(data_dir)])
    out = capsys.readouterr().out
    assert code == 0 and out.count("same\n") + len(re.findall(r"same +\n", out)) == len(CHECKS), out
    assert "GPUs" in out and f"{32 * LANES} bits in our kernels" in out and "the fast steps are right here" in out


def test_a_device_that_differs_is_exit_code_1(gpu, data_dir, capsys):
    gpu["cuda:0"] = 0.25
    assert cli.main(["doctor", "--data-dir", str(data_dir)]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out and "2.5e-01" in out and "wrong on cuda:0" in out and "GPU A, 86 GB" in out


def test_json_has_every_comparison_and_no_number_that_json_lacks(gpu, data_dir, capsys):
    gpu["cuda:0"] = float("nan")
    assert cli.main(["doctor", "--json", "--data-dir", str(data_dir)]) == 1
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert [(c["device"], c["difference"], c["agrees"]) for c in told["checks"]] == [
        ("cpu", 1e-6, True),
        ("cuda:0", None, False),
    ]
    assert told["machine"]["gpus"][0]["name"] == "GPU A"


def test_a_gpu_that_doctor_found_to_differ_is_not_trusted_by_a_search(gpu, data_dir):
    gpu["cuda:0"] = 0.25
    list(doctor.check())
    gpu["cuda:0"] = 1e-6  # would be found now, if a search looked again
    assert not self_check.is_trusted(torch.device("cuda:0"))
    list(doctor.check())
    assert self_check.is_trusted(torch.device("cuda:0"))
