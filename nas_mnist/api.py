"""The stages as functions of Python: keyword arguments, and defaults that work in a notebook.

Each is what the command of the same name does, on the same database: a study that was begun here goes on there. What
they tell while they run is printed, a line for each finished trial; `on_event` takes it instead. In a script, call them
below `if __name__ == "__main__":`, for worker processes import the script again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from nas_mnist.data.datasets import DATASETS, MNIST, Dataset
from nas_mnist.data.folds import Split, search_split
from nas_mnist.data.images import load_test, load_train
from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.errors import DataError
from nas_mnist.model import zoo
from nas_mnist.model.architecture import Architecture, Limits
from nas_mnist.model.network import Network
from nas_mnist.solution import export as exporting
from nas_mnist.solution import predict
from nas_mnist.solution.predict import Solution
from nas_mnist.stages import ablate as ablating
from nas_mnist.stages import confirm as confirming
from nas_mnist.stages import retrain as retraining
from nas_mnist.stages import search as searching
from nas_mnist.stages.ablate import Ablated, AblateSettings
from nas_mnist.stages.confirm import Confirmed, ConfirmSettings
from nas_mnist.stages.retrain import Chosen, Retrained, RetrainSettings
from nas_mnist.stages.search import SearchSettings, Summary
from nas_mnist.stages.trial import Sampler
from nas_mnist.study import studies
from nas_mnist.study.space import RECIPE, Candidate, reference_recipe
from nas_mnist.study.storage import Storage
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS
from nas_mnist.training import evaluation, loop
from nas_mnist.training.loop import EpochResult
from nas_mnist.training.recipe import Optimizer, Recipe
from nas_mnist.views.progress import RunDisplay, SearchDisplay
from nas_mnist.views.publisher import publishing
from nas_mnist.workers.events import OnWorkerEvent
from nas_mnist.workers.local import plan_workers

STORAGE = "studies/nas_mnist.db"  # as the commands have it, below the folder one stands in


def train(
    network: Network,
    recipe: Recipe | None = None,
    *,
    train_images: int | None = None,
    seed: int = 0,
    dataset: str = MNIST.name,
    data_dir: Path | str | None = None,
) -> Iterator[EpochResult]:
    """Train a network in place as a trial of the search is: yields losses and accuracies after each epoch.

    It trains on the search's training images, or on `train_images` of them, on the device the network is on, and
    validates on the held-out fold; without a recipe as a warm start does. Raises `TrainingDiverged`.
    """
    split = _search_split(network, dataset, data_dir, train_images)
    recipe = recipe or reference_recipe(size=network.architecture.n_parameters)
    return loop.train(network, recipe, split.train, split.val, seed=seed)


def evaluate(
    network: Network | Solution, *, dataset: str = MNIST.name, data_dir: Path | str | None = None
) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the fraction classified right.

    A network that may still be changed is asked about the held-out fold of the search; a solution that is finished,
    about the test set of its dataset.
    """
    if isinstance(network, Network):
        return evaluation.evaluate(network, _search_split(network, dataset, data_dir).val)
    folder = _folder(data_dir)
    prepare(folder, network.dataset)
    images = replace(load_test(folder, network.dataset), normalisation=network.normalisation)
    return evaluation.evaluate(network.network, images)


def search(
    n_trials: int = 100,
    *,
    max_params: int = MAX_PARAMS,
    max_macs: int | None = None,
    max_ram: int | None = None,
    epochs: int = MAX_EPOCHS,
    train_images: int | None = None,
    optimizer: Optimizer = RECIPE.optimizer,
    sampler: Sampler = "evolution",
    seed: int = 0,
    prune: bool = True,
    warm_start: bool = True,
    keep_weights: int = 5,
    dataset: str = MNIST.name,
    study_name: str | None = None,
    storage: str = STORAGE,
    data_dir: Path | str | None = None,
    workers: int | None = None,
    devices: Sequence[str] | None = None,
    on_event: OnWorkerEvent | None = None,
) -> Summary:
    """Search until the study has `n_trials` trained trials, those of earlier calls counted in.

    A network has fewer than `max_params` parameters, at most `max_macs` multiply-adds for an image, and at most
    `max_ram` bytes of maps alive at once in int8. Interrupted, it keeps what was finished; the same call goes on.
    Raises `NasMnistError` for what cannot be done.
    """
    settings = SearchSettings(
        storage=Storage.parse(storage),
        study_name=study_name or _dataset(dataset).study,
        n_trials=n_trials,
        max_params=max_params,
        limits=Limits(max_macs, max_ram),
        epochs=epochs,
        train_images=train_images,
        data_dir=_folder(data_dir),
        dataset=_dataset(dataset),
        optimizer=optimizer,
        sampler=sampler,
        seed=seed,
        prune=prune,
        warm_start=warm_start,
        keep_weights=keep_weights,
    )
    planned = plan_workers(workers, devices)
    sink = _sink(on_event, lambda: SearchDisplay(_console(), settings, planned, quiet=False, verbose=False))
    with publishing(settings, sink) as show:
        return searching.search(settings, planned, show)


def confirm(
    *,
    top: int = 8,
    n_folds: int = 6,
    n_seeds: int = 1,
    train_images: int | None = None,
    study_name: str = MNIST.study,
    storage: str = STORAGE,
    data_dir: Path | str | None = None,
    workers: int | None = None,
    devices: Sequence[str] | None = None,
    on_event: OnWorkerEvent | None = None,
) -> list[Confirmed]:
    """Train the best of a search again on fresh folds and seeds, and rank them by their mean accuracy there."""
    opened = Storage.parse(storage)
    settings = ConfirmSettings(
        storage=opened,
        study_name=study_name,
        top=top,
        n_folds=n_folds,
        n_seeds=n_seeds,
        train_images=train_images,
        data_dir=_folder(data_dir),
        dataset=studies.dataset_of(opened, study_name),
    )
    planned = plan_workers(workers, devices)
    with _sink(on_event, lambda: RunDisplay(_console())) as sink:
        return confirming.confirm(settings, planned, sink)


def retrain(
    *,
    trial: int | None = None,
    architecture: Architecture | str | None = None,
    recipe: Recipe | None = None,
    n_seeds: int = 5,
    train_images: int | None = None,
    study_name: str = MNIST.study,
    storage: str = STORAGE,
    data_dir: Path | str | None = None,
    workers: int | None = None,
    devices: Sequence[str] | None = None,
    on_event: OnWorkerEvent | None = None,
) -> Retrained:
    """Train the confirmed winner on all training images, with `n_seeds` seeds; here it meets the test set.

    Instead of the winner: a trial of the search, or an architecture (a line of the notation or the name of a reference
    system will do), with this recipe or that of a warm start. `.verdict` says whether the task is fulfilled.
    """
    opened = Storage.parse(storage)
    settings = RetrainSettings(
        storage=opened,
        chosen=_chosen(opened, study_name, trial, architecture, recipe),
        study_name=study_name,
        n_seeds=n_seeds,
        train_images=train_images,
        data_dir=_folder(data_dir),
        dataset=studies.dataset_of(opened, study_name),
    )
    planned = plan_workers(workers, devices)
    with _sink(on_event, lambda: RunDisplay(_console())) as sink:
        return retraining.retrain(settings, planned, sink)


def ablate(
    architecture: Architecture | str | None = None,
    *,
    trial: int | None = None,
    recipe: Recipe | None = None,
    n_folds: int = 6,
    n_seeds: int = 1,
    train_images: int | None = None,
    study_name: str = MNIST.study,
    storage: str = STORAGE,
    data_dir: Path | str | None = None,
    workers: int | None = None,
    devices: Sequence[str] | None = None,
    on_event: OnWorkerEvent | None = None,
) -> tuple[Ablated, ...]:
    """Why a network is good: one change of it at a time, each trained beside it on the same folds and seeds.

    The network is a trial of the search, with its own recipe, or an architecture (a line or a name will do), with this
    recipe or that of a warm start. The first row is the network as it is; `.difference` of the others is to that.
    """
    opened = Storage.parse(storage)
    candidate = _chosen(opened, study_name, trial, architecture, recipe).candidate
    settings = AblateSettings(
        storage=opened,
        rows=ablating.changes(candidate),
        study_name=study_name,
        n_folds=n_folds,
        n_seeds=n_seeds,
        train_images=train_images,
        data_dir=_folder(data_dir),
        dataset=studies.dataset_of(opened, study_name),
    )
    planned = plan_workers(workers, devices)
    with _sink(on_event, lambda: RunDisplay(_console())) as sink:
        return ablating.ablate(settings, planned, sink)


def export(
    out: Path | str = "solution",
    *,
    trial: int | None = None,
    c: bool = False,
    force: bool = False,
    study_name: str = MNIST.study,
    storage: str = STORAGE,
    data_dir: Path | str | None = None,
) -> dict[str, Any]:
    """Write what was retrained last (or this trial) as a folder that anyone can use; what its `solution.json` holds.

    With `c` also as C for microcontrollers, measured on two of them where their compiler and emulator are
    installed. `force` replaces an earlier solution in that folder. `load_solution` is the way back.
    """
    opened = Storage.parse(storage)
    chosen = None if trial is None else retraining.choose(opened, study_name, trial)
    retrained = retraining.load(opened, study_name, chosen)
    source = exporting.Source.find(opened, study_name, retrained.candidate)
    return exporting.export(retrained, source, _folder(data_dir), Path(out), force=force, c=c)


def load_solution(folder: Path | str = "solution") -> Solution:
    """An exported folder, ready to use: `.predict(path)` says what a picture shows, `evaluate` judges it.

    Raises `SolutionError` if a file is missing, damaged, or not the one that was exported.
    """
    return predict.load(Path(folder))


def _search_split(
    network: Network, dataset: str, data_dir: Path | str | None, train_images: int | None = None
) -> Split:
    """The split that the search sees, on the device of the network."""
    folder, device = _folder(data_dir), next(network.parameters()).device
    prepare(folder, _dataset(dataset))
    split = search_split(load_train(folder, _dataset(dataset)), train_images)
    return Split(split.train.to(device), split.val.to(device))


def _chosen(
    storage: Storage, study_name: str, trial: int | None, architecture: Architecture | str | None, recipe: Recipe | None
) -> Chosen:
    if architecture is None:
        if recipe is not None:
            raise ValueError("a trial is trained with its own recipe: leave it out, or give an architecture")
        return retraining.choose(storage, study_name, trial)
    if trial is not None:
        raise ValueError("one network is trained: give a trial or an architecture")
    resolved = zoo.resolve(architecture) if isinstance(architecture, str) else architecture
    return Chosen(Candidate(resolved, recipe or reference_recipe(size=resolved.n_parameters)))


def _dataset(name: str) -> Dataset:
    if name not in DATASETS:
        raise DataError(f"there is no dataset {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def _folder(data_dir: Path | str | None) -> Path:
    return default_data_dir() if data_dir is None else Path(data_dir)


def _console() -> Console:
    """Plain lines wherever it is: a notebook calls itself a terminal, and would keep every frame of a live display."""
    return Console(force_jupyter=False, force_terminal=False, width=120)


def _sink(
    on_event: OnWorkerEvent | None, display: Callable[[], AbstractContextManager[OnWorkerEvent]]
) -> AbstractContextManager[OnWorkerEvent]:
    return display() if on_event is None else nullcontext(on_event)
