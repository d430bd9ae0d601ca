import gzip
import multiprocessing
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from nas_mnist import data
from nas_mnist.datasets import Normalisation
from nas_mnist.errors import DataError


def test_data_is_the_original_mnist(data_dir):
    train, test = data.load_train(data_dir), data.load_test(data_dir)
    assert train.pixels.shape == (60_000, 28, 28) and train.pixels.dtype == torch.uint8
    assert len(test) == 10_000
    assert torch.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    white = train.pixels.double() / 255
    assert white.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert white.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert (
        train.normalisation == test.normalisation == data.measure(train.pixels.numpy()) == Normalisation(0.1307, 0.3081)
    )


def test_split_is_fixed_stratified_and_disjoint(images):
    split = data.search_split(images)
    assert (len(split.train), len(split.val)) == (50_000, 10_000)
    assert len(set(split.train.indices.tolist()) | set(split.val.indices.tolist())) == 60_000
    exact = torch.bincount(images.labels) / 6
    assert (torch.bincount(images.labels[split.val.indices]) - exact).abs().max() < 1
    assert torch.equal(split.val.indices, data.search_split(images).val.indices)
    assert split.val.indices[:5].tolist() == FIRST_VALIDATION_IMAGES


FIRST_VALIDATION_IMAGES = [41291, 15399, 26639, 56236, 41756]  # a change of these makes old studies incomparable


def test_folds_of_a_partition_cover_every_image_once(images):
    folds = [data.fold(images, k, partition=data.CONFIRM_PARTITION).val.indices for k in range(data.N_FOLDS)]
    assert torch.cat(folds).sort().values.equal(torch.arange(60_000))
    assert not torch.equal(folds[0], data.search_split(images).val.indices)


def test_fewer_training_images_are_stratified_and_leave_validation_alone(images):
    split = data.search_split(images, 1000)
    assert len(split.train) == 1000 and len(split.val) == 10_000
    share = torch.bincount(images.labels[split.train.indices]) / 1000
    assert (share - torch.bincount(images.labels) / 60_000).abs().max() < 0.002
    for wrong in (1, 50_001):
        with pytest.raises(DataError, match="2 to 50,000"):
            data.search_split(images, wrong)


def test_batches_show_every_image_once_with_a_smaller_last_batch(images):
    part = images.part(torch.arange(100, 110))
    batches = list(part.batches(4, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    shuffled = torch.cat([labels for _, labels in batches])
    assert shuffled.sort().values.equal(images.labels[100:110].sort().values)
    assert torch.equal(next(part.batches(10))[1], images.labels[100:110])


def test_images_are_mapped_not_copied(data_dir, images):
    maps = Path("/proc/self/maps").read_text()
    assert str(data_dir / "mnist" / "train_images.npy") in maps


def test_many_processes_may_unpack_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(partial(_prepare, tmp_path), range(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mnist", "mnist.lock"]
    assert len(data.load_test(tmp_path)) == 10_000


def _prepare(folder, _):
    data.prepare(folder)


@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy", "md5"])
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
        data.prepare(tmp_path)
    assert "\n" not in str(error.value)


def test_files_the_user_put_there_are_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in (data._PACKAGED).glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    data.prepare(tmp_path)
    assert len(data.load_train(tmp_path)) == 60_000


def test_damaged_original_file_is_refused_and_nothing_is_left(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in (data._PACKAGED).glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes())[:-100])
    with pytest.raises(DataError, match="four original ones"):
        data.prepare(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["MNIST", "mnist.lock"]


def test_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data-dir"):
        data.prepare(tmp_path / "file" / "below")
