"""The solution as a folder that anyone can use without this package: module, weights, ONNX, page, model card, figures.

The folder is made under another name beside its place and put there when it is whole. Nothing goes out that was not
checked: the weights classify as many test images as retraining saw, and the generated module and the ONNX file give the
logits of the trained network on the whole test set. The page needs a browser to be checked; the tests do that.
"""

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from nas_mnist.data.datasets import MNIST, Dataset
from nas_mnist.data.images import Images, load_test, load_train, make_upright
from nas_mnist.data.unpacking import checksums, prepare
from nas_mnist.errors import BudgetError, SolutionError
from nas_mnist.extras import Extra, require
from nas_mnist.files import folder_beside
from nas_mnist.model.network import Network, build, count_parameters
from nas_mnist.solution import demo
from nas_mnist.solution.codegen import generate, weight_names
from nas_mnist.solution.model_card import model_card
from nas_mnist.solution.predict import RECORD, WEIGHTS, onnx_logits, seal
from nas_mnist.stages import ablate
from nas_mnist.stages.ablate import Ablated
from nas_mnist.stages.retrain import Retrained
from nas_mnist.study import studies
from nas_mnist.study.space import Candidate
from nas_mnist.study.storage import Storage
from nas_mnist.task import MAX_PARAMS, TARGET_ACCURACY
from nas_mnist.training.augmentation import augment, normalise
from nas_mnist.training.evaluation import predict
from nas_mnist.views import figures
from nas_mnist.views.ablation import ablation_figure

OPSET = 18
TOLERANCE = 1e-4  # of logits, between PyTorch and ONNX
MAX_OTHERWISE = 5  # test images that another device than the one of the training may judge otherwise, by rounding
N_SAMPLES, N_AUGMENTED_ROWS, N_VARIANTS = 40, 5, 7
N_MISTAKES_SHOWN = 400  # of a network that is as bad as thousands the picture would take minutes
PACKAGES = ("nas-mnist", "torch", "optuna", "onnx", "onnxruntime")
MODEL, ONNX, CARD = "model.py", "model.onnx", "README.md"


@dataclass(frozen=True)
class Source:
    """Where a solution comes from, as the model card tells it."""

    storage: str
    study_name: str
    n_trials: int | None  # trained trials of the search; None without a search
    identity: dict[str, Any] = field(default_factory=dict)  # what the search was asked for; see `study.Identity`
    ablation: tuple[Ablated, ...] = ()  # of the network that is exported; empty if there is none

    @staticmethod
    def find(storage: Storage, study_name: str, candidate: Candidate) -> "Source":
        """What the storage knows of this search, and of this network."""
        opened = storage.open()
        n_trials = studies.count_trained(opened, study_name)
        identity = {} if n_trials is None else studies.recorded_identity(studies.load(opened, study_name))
        ablation = ablate.results_of(opened, study_name, [candidate])
        return Source(str(storage), study_name, n_trials, identity, ablation)


@dataclass(frozen=True)
class Judged:
    """The test set as the exported network sees it, in order."""

    images: Images
    logits: Tensor  # (N, 10)

    @property
    def predictions(self) -> Tensor:
        return self.logits.argmax(1)

    @property
    def wrong(self) -> Tensor:
        """Positions of the misclassified images."""
        return (self.predictions != self.images.labels).nonzero().flatten()

    @property
    def accuracy(self) -> float:
        return (len(self.images) - len(self.wrong)) / len(self.images)


def export(
    retrained: Retrained, source: Source, data_dir: Path, out: Path, *, force: bool = False, c: bool = False
) -> dict[str, Any]:
    """Write the solution into the folder `out`, with `c` as C too, and return what `solution.json` holds.

    Raises `SolutionError` if the folder exists (unless `force` replaces an earlier solution), cannot be written, or if
    a file of it does not do what the network does; `BudgetError` if the network is over the budget; `MissingPackage`
    where the packages that write and run ONNX are not installed.
    """
    require(Extra.export)
    out = out.resolve()  # through a link, so that what is replaced is the folder and not the link
    check_place(out, force)
    _check_budget(retrained)
    prepare(data_dir, retrained.dataset)
    network = build(retrained.candidate.architecture, seed=0)
    network.load_state_dict(retrained.weights)
    judged = _judge(network, load_test(data_dir, retrained.dataset))
    _check_accuracy(retrained, judged)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with folder_beside(out) as temporary:
            temporary.chmod(0o755)
            record = _write(retrained, network, source, judged, data_dir, temporary, c)
            _put_in_place(temporary, out, force)
    except OSError as error:
        reason = error.strerror or error
        raise SolutionError(f"{out} cannot be written ({reason}): make room or name another", "out") from error
    return record


def _write(
    retrained: Retrained, network: Network, source: Source, judged: Judged, data_dir: Path, folder: Path, c: bool
) -> dict[str, Any]:
    train_images = load_train(data_dir, retrained.dataset)
    model = _write_model(retrained, judged, folder)
    _write_onnx(model, judged, folder / ONNX)
    _write_figures(retrained, source, judged, train_images, folder / "figures")
    record = _record(retrained, source, judged, checksums(data_dir, retrained.dataset))
    record |= _write_embedded(retrained, network, train_images, judged, folder, c)
    (folder / CARD).write_text(model_card(retrained, record, source.ablation), encoding="utf-8")
    page = demo.page(network, record, retrained.dataset, judged.images, judged.predictions)
    (folder / demo.PAGE).write_text(page, encoding="utf-8")
    record["sha256"] = {p.relative_to(folder).as_posix(): _sha256(p) for p in _files(folder)}
    record = seal(record)
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def check_place(out: Path, force: bool) -> None:
    """Raise `SolutionError` if a solution must not be put at `out`."""
    try:
        there = out.exists()
    except OSError as error:
        raise SolutionError(f"{out} cannot be written ({error.strerror}): name another", "out") from error
    if not there:
        return
    if not force:
        raise SolutionError(
            f"{out} exists and is not overwritten: name another folder, or allow to replace it", "out", "force"
        )
    try:
        written = {RECORD, *json.loads((out / RECORD).read_bytes())["sha256"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise SolutionError(
            f"{out} is no exported solution, and only such a folder is replaced: name another", "out"
        ) from None
    files = (path.relative_to(out).as_posix() for path in _files(out) if "__pycache__" not in path.parts)
    foreign = sorted(set(files) - written)
    if foreign:
        raise SolutionError(
            f"{out} holds {foreign[0]}, which was not exported and would be lost: move it, or name another folder",
            "out",
        )


def _check_accuracy(retrained: Retrained, judged: Judged) -> None:
    seen = retrained.runs[0].accuracy
    if abs(judged.accuracy - seen) * len(judged.images) > MAX_OTHERWISE + 0.5:
        raise SolutionError(
            f"the weights must classify as retraining saw it, {seen:.2%} of the test set; they reach "
            f"{judged.accuracy:.2%}: retrain it again in another study",
            "study_name",
        )


def _check_budget(retrained: Retrained) -> None:
    n_parameters = count_parameters(retrained.candidate.architecture)
    if n_parameters >= MAX_PARAMS:
        raise BudgetError(
            f"the network has {n_parameters:,} parameters; the limit is {MAX_PARAMS - 1:,}: choose another"
        )


def _put_in_place(temporary: Path, out: Path, force: bool) -> None:
    """Rename the whole folder to `out`; with `force` an earlier one changes places with it, and is removed after."""
    if not (force and out.exists()):
        temporary.rename(out)
    elif not _exchange(temporary, out):
        aside = temporary.with_name(f"{temporary.name}-old")
        out.rename(aside)
        try:
            temporary.rename(out)
        except BaseException:
            aside.rename(out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that whoever is killed leaves one or the other; False where that is not known.

    See renameat2(2); Python has no function for it.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _judge(network: Network, test_images: Images) -> Judged:
    return Judged(test_images, torch.cat([logits for logits, _ in predict(network, test_images)]))


def _write_model(retrained: Retrained, judged: Judged, folder: Path) -> nn.Module:
    """Write module and weights, and return the module's own model, which gives the network's logits."""
    architecture = retrained.candidate.architecture
    names = weight_names(architecture)
    weights = {names[name]: tensor.contiguous() for name, tensor in retrained.weights.items()}
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights))  # save_file would make it private to its owner
    size, accuracy = f"{architecture.n_parameters:,}", f"{judged.accuracy:.2%}"
    dataset = retrained.dataset
    headline = f"A network of {size} parameters for {dataset.title}: {accuracy} of the test set."
    source = generate(architecture, headline, dataset, judged.images.normalisation)
    (folder / MODEL).write_text(source, encoding="utf-8")
    model: nn.Module = _import(folder / MODEL).load()
    with torch.no_grad():
        _check_logits(MODEL, torch.cat([model(x) for x in _batches(judged.images)]), judged)
    return model


def _write_embedded(
    retrained: Retrained, network: Network, train_images: Images, judged: Judged, folder: Path, c: bool
) -> dict[str, Any]:
    """The int8 network and, if asked for, the C: what `solution.json` holds of them."""
    from nas_mnist.solution import embedded  # what it needs is an extra

    int8 = embedded.write_int8(network, train_images, judged.images, folder)
    accuracy = Judged(judged.images, int8.logits).accuracy
    record: dict[str, Any] = {
        "int8": {"test_accuracy": accuracy, "n_calibration_images": embedded.N_CALIBRATION_IMAGES}
    }
    if c:
        headline = (
            f"A network of {retrained.candidate.architecture.n_parameters:,} parameters for {retrained.dataset.title}: "
            f"{accuracy:.2%} of the test set in int8, {judged.accuracy:.2%} in float32."
        )
        record["c"] = embedded.write_c(int8, headline, judged.images, folder)
    return record


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported_model", path)
    assert spec is not None and spec.loader is not None  # which every file has that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
    return module


def _batches(images: Images) -> Iterator[Tensor]:
    return (normalise(pixels, images.normalisation) for pixels, _ in images.batches(1000))


def _check_logits(name: str, logits: Tensor, judged: Judged) -> None:
    difference = (logits - judged.logits).abs().max().item()
    if not difference <= TOLERANCE:  # two that are closer than that may change places: it is a tie
        raise SolutionError(
            f"{name} must give the network's logits within {TOLERANCE:g}; they differ by {difference:.2g}"
        )


def _write_onnx(model: nn.Module, judged: Judged, path: Path) -> None:
    """Write the ONNX file, and run it in onnxruntime over the whole test set."""
    from nas_mnist.solution.tracing import to_onnx  # what it needs is an extra

    content = to_onnx(model, ("images", "logits"), OPSET).SerializeToString()
    path.write_bytes(content)
    _check_logits(ONNX, onnx_logits(content, judged.images), judged)


def _write_figures(retrained: Retrained, source: Source, judged: Judged, train_images: Images, folder: Path) -> None:
    folder.mkdir()
    labels, wrong = judged.images.labels, judged.wrong
    classes, pixels = retrained.dataset.classes, judged.images.pixels
    shown = demo.spread_evenly(wrong, N_MISTAKES_SHOWN)
    which = "all" if len(shown) == len(wrong) else f"{len(shown)} of the"
    title = f"{which} {len(wrong)} misclassified test images: true → predicted"
    samples = torch.arange(N_SAMPLES) * (len(train_images) // N_SAMPLES)
    drawn: dict[str, Figure] = {
        "curves": figures.curves([r.epochs for r in retrained.runs], "test", _target(retrained.dataset)),
        "confusion": figures.confusion(labels, judged.predictions, classes),
        "misclassified": figures.mistakes(pixels, labels, judged.predictions, shown, classes, title),
        "samples": figures.gallery(
            train_images.pixels[samples], [classes[i] for i in train_images.labels[samples]], "training images"
        ),
        "augmented": _augmented(retrained, train_images),
    }
    if source.ablation:
        drawn["ablation"] = ablation_figure(source.ablation)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=150)


def _target(dataset: Dataset) -> float | None:
    """The task's, which is MNIST's."""
    return TARGET_ACCURACY if dataset == MNIST else None


def _augmented(retrained: Retrained, train_images: Images) -> Figure:
    originals = train_images.pixels[: 2 * N_AUGMENTED_ROWS : 2]
    pixels = make_upright(originals) if retrained.candidate.architecture.deskewed else originals
    generator = torch.Generator().manual_seed(0)
    augmentation = retrained.candidate.recipe.augmentation
    like = train_images.normalisation
    variants = [augment(pixels, augmentation, like, generator)[:, 0] * like.std + like.mean for _ in range(N_VARIANTS)]
    return figures.augmented(originals, variants)


def _record(retrained: Retrained, source: Source, judged: Judged, data_md5: dict[str, str]) -> dict[str, Any]:
    """What `solution.json` holds: accuracies as fractions, times in seconds."""
    verdict = retrained.verdict
    return {
        **retrained.candidate.to_dict(),
        "n_parameters": verdict.n_parameters,
        "n_macs": retrained.candidate.architecture.n_macs,
        "receptive_field": retrained.candidate.architecture.receptive_field,
        "task_fulfilled": verdict.fulfilled,
        "test_accuracy": judged.accuracy,
        "n_train_images": retrained.n_train_images,
        "exported_seed": retrained.runs[0].seed,
        "diverged_seeds": list(retrained.diverged),
        "mean_test_accuracy": retrained.mean,
        "standard_deviation": retrained.standard_deviation,
        "runs": [asdict(run) for run in retrained.runs],
        "search": {
            "storage": source.storage,
            "study_name": source.study_name,
            "n_trials": source.n_trials,
            "identity": source.identity,
            "trial": retrained.trial,
            "score": retrained.search_score,
        },
        "confirmation": retrained.confirmation,
        **({"ablation": [row.to_dict() for row in source.ablation]} if source.ablation else {}),
        "onnx": {"opset": OPSET, "input": "images", "output": "logits"},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": retrained.runs[0].device,
        "git_commit": _git_commit(),
        "dataset": retrained.dataset.name,
        "normalisation": asdict(judged.images.normalisation),
        "classes": list(retrained.dataset.classes),
        "data_md5": data_md5,
    }


def _git_commit() -> str | None:
    """The commit of this package's source, with `-dirty` behind it if that was changed; None if it is no checkout."""
    source = Path(__file__)
    tracked = ["ls-files", "--error-unmatch", source.name]  # the package may lie in another project's environment
    commit = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    try:
        for arguments in (tracked, commit):
            command = ["git", "-C", str(source.parent), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
