"""MNIST and its siblings of the same format: what is known of each before a file of it is read."""

from dataclasses import dataclass

_DIGITS = tuple("0123456789")
_IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of all pixels of the training images, as fractions of white."""

    mean: float
    std: float


@dataclass(frozen=True)
class Dataset:
    """Grey images of 28×28 pixels in ten classes, and where they come from.

    A picture that is to be classified is prepared as the images were: what it shows fits a square of `box` pixels, and
    its centre of mass, or else that of the box, is put in the middle.
    """

    name: str  # in commands, studies and folders
    title: str
    loader: str  # torchvision's class; its files lie in <data_dir>/<loader>/raw
    source: str
    classes: tuple[str, ...] = _DIGITS
    files: tuple[str, ...] = _IDX  # images and labels to train, images and labels to test; perhaps with .gz behind
    n_train_images: int = 60_000
    n_test_images: int = 10_000
    normalisation: Normalisation | None = None  # None: measured when the files are unpacked
    box: int = 28
    by_mass: bool = False
    split: str | None = None  # that torchvision's class is asked for
    transposed: bool = False  # rows and columns, in the files
    slanted: bool = False  # writing that leans one way or the other: what a search proposes is given it upright

    @property
    def study(self) -> str:
        """What a search on it is called if nobody names it."""
        return f"nas-{self.name}"


CUSTOMARY = Normalisation(0.1307, 0.3081)  # the field's figures for MNIST
MNIST = Dataset(
    "mnist",
    "MNIST",
    "MNIST",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    normalisation=CUSTOMARY,
    box=20,
    by_mass=True,
    slanted=True,
)
_SIBLINGS = (
    Dataset(
        "fashion-mnist",
        "Fashion-MNIST",
        "FashionMNIST",
        "https://github.com/zalandoresearch/fashion-mnist",
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
    Dataset(
        "kmnist",
        "Kuzushiji-MNIST",
        "KMNIST",
        "http://codh.rois.ac.jp/kmnist/",
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
    Dataset(
        "qmnist",
        "QMNIST",
        "QMNIST",
        "https://github.com/facebookresearch/qmnist",
        files=tuple(f"qmnist-{p}-{k}" for p in ("train", "test") for k in ("images-idx3-ubyte", "labels-idx2-int")),
        n_test_images=60_000,  # the whole reconstructed test set; its first 10,000 are those of MNIST
        box=20,
        by_mass=True,
        slanted=True,
    ),
    Dataset(
        "emnist-digits",
        "EMNIST digits",
        "EMNIST",
        "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
        files=tuple(
            f"emnist-digits-{part}-{kind}-ubyte"
            for part in ("train", "test")
            for kind in ("images-idx3", "labels-idx1")
        ),
        n_train_images=240_000,
        n_test_images=40_000,
        box=24,
        split="digits",
        transposed=True,
        slanted=True,
    ),
)
DATASETS = {dataset.name: dataset for dataset in (MNIST, *_SIBLINGS)}
