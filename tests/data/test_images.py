import gzip
import hashlib
import http.server
import multiprocessing
import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import raw_files
import torch
import torchvision.datasets

from nas_mnist.data.datasets import DATASETS, MNIST, Normalisation
from nas_mnist.data.folds import CONFIRM_PARTITION, N_FOLDS, fold, n_search_images, search_split
from nas_mnist.data.images import Images, load_test, load_train
from nas_mnist.data.unpacking import _PACKAGED, checksums, measure, prepare
from nas_mnist.errors import DataError


def test_data_is_the_original_mnist(data_dir):
    train, test = load_train(data_dir), load_test(data_dir)
    assert train.pixels.shape == (60_000, 28, 28) and train.pixels.dtype == torch.uint8
    assert len(test) == 10_000
    assert torch.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    white = train.pixels.double() / 255
    assert white.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert white.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert train.normalisation == test.normalisation == measure(train.pixels.numpy()) == Normalisation(0.1307, 0.3081)


def test_split_is_fixed_stratified_and_disjoint(images):
    split = search_split(images)
    assert (len(split.train), len(split.val)) == (50_000, 10_000)
    assert len(set(split.train.indices.tolist()) | set(split.val.indices.tolist())) == 60_000
    exact = torch.bincount(images.labels) / 6
    assert (torch.bincount(images.labels[split.val.indices]) - exact).abs().max() < 1
    assert torch.equal(split.val.indices, search_split(images).val.indices)
    assert split.val.indices[:5].tolist() == FIRST_VALIDATION_IMAGES


FIRST_VALIDATION_IMAGES = [41291, 15399, 26639, 56236, 41756]  # a change of these makes old studies incomparable


def test_folds_of_a_partition_cover_every_image_once(images):
    folds = [fold(images, k, partition=CONFIRM_PARTITION).val.indices for k in range(N_FOLDS)]
    assert torch.cat(folds).sort().values.equal(torch.arange(60_000))
    assert not torch.equal(folds[0], search_split(images).val.indices)


def test_fewer_training_images_are_stratified_and_leave_validation_alone(images):
    split = search_split(images, 1000)
    assert len(split.train) == 1000 and len(split.val) == 10_000
    share = torch.bincount(images.labels[split.train.indices]) / 1000
    assert (share - torch.bincount(images.labels) / 60_000).abs().max() < 0.002
    for wrong in (1, 50_001):
        with pytest.raises(DataError, match="2 to 50,000"):
            search_split(images, wrong)


def test_batches_show_every_image_once_with_a_smaller_last_batch(images):
    part = images.part(torch.arange(100, 110))
    batches = list(part.batches(4))
    assert [len(pixels) for pixels, _ in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), images.pixels[100:110])
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels[100:110])


def test_shuffled_names_every_position_once(images):
    part = images.part(torch.arange(100, 110))
    positions = list(part.shuffled(4, torch.Generator().manual_seed(0)))
    assert [len(p) for p in positions] == [4, 4, 2]
    together = torch.cat(positions)
    assert sorted(together.tolist()) == list(range(10)) != together.tolist()


def test_images_are_mapped_not_copied(data_dir, images):
    maps = Path("/proc/self/maps").read_text()
    assert str(data_dir / "mnist" / "train_images.npy") in maps


def test_many_processes_may_unpack_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(partial(_prepare, tmp_path), range(3))
        pool.close()
        pool.join()  # ended by a signal, a process whose coverage is measured may hang
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mnist", "mnist.lock"]
    assert len(load_test(tmp_path)) == 10_000


def _prepare(folder, _):
    prepare(folder)


@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy", "test_upright.npy", "md5"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_damaged_file_is_named_with_what_to_do(data_dir, tmp_path, name, damage):
    folder = tmp_path / "mnist"
    shutil.copytree(data_dir / "mnist", folder)
    content = (folder / name).read_bytes()
    if damage == "remove":
        (folder / name).unlink()
    else:
        half = len(content) // 2
        changed = content[:half] + (bytes([content[half] ^ 0x20]) + content[half + 1 :] if damage == "flip" else b"")
        (folder / name).write_bytes(changed)
    with pytest.raises(DataError, match=r"damaged.*delete that folder and run again") as error:
        prepare(tmp_path)
    assert "\n" not in str(error.value)


def test_data_of_an_earlier_version_is_added_to(data_dir, tmp_path):
    folder = tmp_path / "mnist"
    shutil.copytree(data_dir / "mnist", folder)
    lines = (folder / "md5").read_text().splitlines()
    (folder / "md5").write_text("".join(f"{line}\n" for line in lines if "upright" not in line))
    (folder / "train_upright.npy").unlink()
    (folder / "test_upright.npy").write_bytes(b"was killed in the middle of it")
    prepare(tmp_path)
    assert (folder / "md5").read_text().splitlines() == lines
    assert len(load_train(tmp_path).deskewed().pixels) == 60_000


@pytest.mark.parametrize("content", [None, b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_damaged_folder_of_an_earlier_version_is_named_too(data_dir, tmp_path, content):
    folder = tmp_path / "mnist"
    shutil.copytree(data_dir / "mnist", folder)
    lines = (folder / "md5").read_text().splitlines()
    (folder / "md5").write_text("".join(f"{line}\n" for line in lines if "upright" not in line))
    for name in ("train_upright.npy", "test_upright.npy", "test_images.npy"):
        (folder / name).unlink()
    if content is not None:
        (folder / "test_images.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"damaged \(test_images.npy\): delete that folder and run again"):
        prepare(tmp_path)
    assert not (folder / "train_upright.npy").exists()


def test_files_the_user_put_there_are_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in (_PACKAGED).glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    prepare(tmp_path)
    assert len(load_train(tmp_path)) == 60_000


def test_damaged_original_file_is_refused_and_nothing_is_left(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in (_PACKAGED).glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes())[:-100])
    with pytest.raises(DataError, match="four original ones"):
        prepare(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["MNIST", "mnist.lock"]


def test_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="name another") as error:
        prepare(tmp_path / "file" / "below")
    assert error.value.settings == ("data_dir",)


SIBLINGS = [replace(d, n_train_images=600, n_test_images=300) for d in DATASETS.values() if d != MNIST]
each_sibling = pytest.mark.parametrize("dataset", SIBLINGS, ids=lambda d: d.name)


@each_sibling
@pytest.mark.parametrize("packed", [True, False])
def test_files_of_a_sibling_are_read_upright_and_left_as_they_are(dataset, packed, tmp_path):
    arrays = raw_files.make(dataset)
    raw = raw_files.write(dataset, tmp_path, arrays, packed=packed)
    before = {path.name: path.read_bytes() for path in raw.iterdir()}
    prepare(tmp_path, dataset)
    assert raw_files.as_written(arrays, load_train(tmp_path, dataset), 0)
    assert raw_files.as_written(arrays, load_test(tmp_path, dataset), 1)
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([dataset.loader, dataset.name, f"{dataset.name}.lock"])


@each_sibling
def test_normalisation_of_a_sibling_is_that_of_its_training_images(dataset, tmp_path):
    arrays = raw_files.make(dataset)
    raw_files.write(dataset, tmp_path, arrays)
    prepare(tmp_path, dataset)
    found = load_test(tmp_path, dataset).normalisation
    white = arrays[0] / 255
    assert found == load_train(tmp_path, dataset).normalisation
    assert (found.mean, found.std) == (round(white.mean(), 4), round(white.std(), 4))
    assert "normalisation.json" in checksums(tmp_path, dataset)


def test_parts_of_images_keep_the_normalisation():
    images = Images(torch.zeros(9, 28, 28), torch.zeros(9), torch.arange(9), Normalisation(0.5, 0.25))
    assert images.part(torch.arange(3)).to(torch.device("cpu")).normalisation == Normalisation(0.5, 0.25)


@pytest.mark.parametrize("name", ["normalisation.json", "train_labels.npy"])
def test_damaged_sibling_is_named(name, tmp_path):
    raw_files.write(SIBLINGS[0], tmp_path, raw_files.make(SIBLINGS[0]))
    prepare(tmp_path, SIBLINGS[0])
    (tmp_path / "fashion-mnist" / name).write_bytes(b"{}")
    with pytest.raises(DataError, match=rf"Fashion-MNIST in .* is damaged \({name}\): delete that folder"):
        prepare(tmp_path, SIBLINGS[0])


@pytest.fixture
def no_network(monkeypatch):
    """Mirrors at a port where nobody listens."""
    nowhere = "http://127.0.0.1:9/"
    for name in ("MNIST", "FashionMNIST", "KMNIST"):
        monkeypatch.setattr(getattr(torchvision.datasets, name), "mirrors", [nowhere])
    monkeypatch.setattr(torchvision.datasets.EMNIST, "url", f"{nowhere}gzip.zip")
    moved = {
        part: [(url.replace("https://raw.githubusercontent.com/", nowhere), md5) for url, md5 in resources]
        for part, resources in torchvision.datasets.QMNIST.resources.items()
    }
    monkeypatch.setattr(torchvision.datasets.QMNIST, "resources", moved)


@each_sibling
def test_missing_download_is_one_line_that_says_which_files_to_put_where(dataset, tmp_path, no_network, capsys):
    with pytest.raises(DataError, match="could not be downloaded") as error:
        prepare(tmp_path, dataset)
    line = str(error.value)
    assert "\n" not in line and "refused" in line and dataset.title in line and dataset.source in line
    assert str(tmp_path / dataset.loader / "raw") in line
    assert all(f"{name}.gz" in line for name in dataset.files)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{dataset.name}.lock"]
    assert capsys.readouterr() == ("", "")


@each_sibling
def test_advice_on_a_missing_download_is_enough(dataset, tmp_path, no_network):
    with pytest.raises(DataError):
        prepare(tmp_path, dataset)
    raw_files.write(dataset, tmp_path, raw_files.make(dataset), packed=True)
    prepare(tmp_path, dataset)
    assert len(load_train(tmp_path, dataset)) == 600


def cut(raw, name):
    (raw / name).write_bytes((raw / name).read_bytes()[:-100])


def pack_and_cut(raw, name):
    (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes())[:-100])
    (raw / name).unlink()


def label_eleven(raw, name):
    (raw / name).write_bytes((raw / name).read_bytes()[:-1] + b"\x0b")


def other_number(raw, name):
    (raw / name).write_bytes(raw_files.idx(np.zeros(601, dtype=np.uint8)))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda raw, name: (raw / name).unlink(), "Fashion-MNIST is not whole in .*: put .*-ubyte.gz"),
        (cut, "must be the four original ones; reading them failed"),
        (pack_and_cut, "must be the four original ones; reading them failed"),
        (label_eleven, "labels from 0 to 11, not 0 to 9"),
        (other_number, "600 images and 601 labels, not 600"),
        (lambda raw, name: (raw / name).write_bytes(b""), "must be the four original ones; reading them failed"),
    ],
)
def test_files_that_are_not_the_original_ones_are_refused_and_nothing_is_left(damage, line, tmp_path, no_network):
    raw = raw_files.write(SIBLINGS[0], tmp_path, raw_files.make(SIBLINGS[0]))
    damage(raw, "train-labels-idx1-ubyte")
    with pytest.raises(DataError, match=line) as error:
        prepare(tmp_path, SIBLINGS[0])
    assert "\n" not in str(error.value) and str(raw) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["FashionMNIST", "fashion-mnist.lock"]


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A server that has KMNIST, and torchvision told where it is and what its checksums are; what was asked of it."""
    dataset, asked = SIBLINGS[1], []
    raw = raw_files.write(dataset, tmp_path / "mirror", raw_files.make(dataset), packed=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=raw))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = [f"{name}.gz" for name in dataset.files]
    md5s = [hashlib.md5((raw / name).read_bytes(), usedforsecurity=False).hexdigest() for name in names]
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", list(zip(names, md5s, strict=True)))
    yield raw, asked
    server.shutdown()
    server.server_close()


def test_what_is_not_there_is_downloaded_once(mirror, tmp_path):
    raw, asked = mirror
    for _ in range(2):
        prepare(tmp_path / "d", SIBLINGS[1])
    assert raw_files.as_written(raw_files.make(SIBLINGS[1]), load_test(tmp_path / "d", SIBLINGS[1]), 1)
    assert set(asked) == {f"/{path.name}" for path in raw.iterdir()}
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["kmnist", "kmnist.lock"]


def test_download_of_another_file_is_refused(mirror, tmp_path):
    raw, _ = mirror
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match=r"could not be downloaded \(File not found or corrupted"):
        prepare(tmp_path / "d", SIBLINGS[1])


@pytest.mark.parametrize(("name", "n"), [("mnist", 50_000), ("qmnist", 50_000), ("emnist-digits", 200_000)])
def test_search_has_all_but_one_fold_to_train_on(name, n):
    assert n_search_images(DATASETS[name]) == n


def test_number_of_search_images_is_that_of_the_split():
    for n in (59, 60, 61):
        dataset = replace(MNIST, n_train_images=n)
        images = Images(torch.zeros(n, 28, 28), torch.arange(n) % 10, torch.arange(n), MNIST.normalisation)
        assert len(search_split(images).train) == n_search_images(dataset)
