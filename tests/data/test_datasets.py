import os

import pytest
import torchvision.datasets

from nas_mnist.data.datasets import DATASETS, MNIST


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_files_and_classes_are_those_that_torchvision_knows(dataset, tmp_path):
    loader = getattr(torchvision.datasets, dataset.loader)
    if dataset.name == "emnist-digits":
        assert tuple(loader.classes_split_dict["digits"]) == dataset.classes
        assert loader.url == dataset.source
        return
    resources = loader.resources
    if dataset.name == "qmnist":
        resources = resources["train"] + resources["test"]
    assert tuple(os.path.basename(url).removesuffix(".gz") for url, _ in resources) == dataset.files
    assert tuple(name.split(" - ")[0] for name in loader.classes) == dataset.classes


def test_mnist_is_what_studies_were_made_with():
    assert (MNIST.name, MNIST.study) == ("mnist", "nas-mnist")
    assert (MNIST.normalisation.mean, MNIST.normalisation.std) == (0.1307, 0.3081)
    assert list(DATASETS) == ["mnist", "fashion-mnist", "kmnist", "qmnist", "emnist-digits"]
