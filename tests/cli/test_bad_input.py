"""Bad input in bulk: whatever is given, one clear line comes back, never a traceback, and no file is changed."""

import argparse
import contextlib
import io
import json
import os
import shutil
import sqlite3
import struct
import zlib
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution
from PIL import Image

from nas_mnist.cli import main as cli
from nas_mnist.errors import ArchitectureError, NasMnistError, StudyError, shown
from nas_mnist.model.architecture import Activation, Architecture, Conv, GlobalPool, MaxPool, parse
from nas_mnist.model.network import count_parameters
from nas_mnist.solution import predict, preprocess
from nas_mnist.stages import planned, search
from nas_mnist.study import space, studies
from nas_mnist.study.storage import Storage
from nas_mnist.training import lr_finder

bulk = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
few = settings(bulk, max_examples=40)

# --- the notation ----------------------------------------------------------------------------------------------------

ends = st.sampled_from([{}, {"norm": False}, {"norm": False, "activation": False}])
convs = st.builds(
    lambda end, **given: Conv(**given, **end),
    ends,
    channels=st.integers(1, 1024),
    kernel=st.integers(1, 28),
    stride=st.integers(1, 3),
    padding=st.integers(0, 27),
    separable=st.booleans(),
    bias=st.booleans(),
)
bodies = st.lists(convs | st.builds(MaxPool), max_size=8)
heads = st.builds(lambda end: (GlobalPool(), Conv(10, kernel=1, **end)), ends)
dropouts = st.floats(0, 1, exclude_max=True)
soup = st.lists(
    st.sampled_from([*"cdkspMG+br-| =0123456789.e", "99999", "dropout", "act-norm", "hardswish", "\u0661", "\n"])
)


@bulk
@given(bodies, heads, st.booleans(), dropouts, st.booleans(), st.sampled_from(get_args(Activation)))
def test_line_is_the_network_and_the_network_the_line(body, head, norm_first, dropout, elementwise, activation):
    try:
        architecture = Architecture((*body, *head), norm_first, dropout, elementwise, activation)
    except ArchitectureError as error:
        assume("below 1×1" not in str(error) and "act-norm is for ReLU" not in str(error))
        raise
    assert parse(str(architecture)) == architecture


@bulk
@given(st.text() | soup.map("".join))
def test_any_text_is_a_network_or_one_clear_line(text):
    try:
        assert parse(str(parse(text))) == parse(text)
    except ArchitectureError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "c999999999 G c10k1-",
        "c1" + "0" * 4000 + " G c10k1-",
        "c8k999999p999999 G c10k1-",
        "c1k1 " * 1000 + "G c10k1-",
        "c1k1 " * 100 + "G c10k1-",
        "c10k28- |" + " act-norm" * 1_000_000,
        "c10k28- | dropout=" + "9" * 4000,
        "c10k28- | dropout=1e999",
        "M " * 1_000_000,
    ],
    ids=range(9),
)
def test_hostile_numbers_and_lengths_are_refused_at_once(text):
    with pytest.raises(ArchitectureError) as error:
        parse(text)
    assert len(str(error.value)) < 6000


# --- the space -------------------------------------------------------------------------------------------------------


def _values(distribution):
    if isinstance(distribution, CategoricalDistribution):
        return st.sampled_from(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return st.integers(distribution.low, distribution.high)
    return st.floats(distribution.low, distribution.high)


parameters = st.fixed_dictionaries({name: _values(d) for name, d in space.distributions().items()})


@bulk
@given(parameters, st.integers(1, 8000))
def test_every_draw_can_be_built_within_any_budget_that_its_structure_can_meet(drawn, max_params):
    narrowest = space.to_candidate(drawn, max_params=1, epochs=15).architecture.n_parameters
    candidate = space.to_candidate(drawn, max_params=max_params, epochs=15)
    n_parameters = count_parameters(candidate.architecture)
    assert n_parameters == candidate.architecture.n_parameters >= space.smallest_count()
    assert n_parameters < max_params or n_parameters == narrowest >= max_params
    assert narrowest < 8000


@bulk
@given(parameters, st.integers(1, 8000))
def test_a_candidate_is_read_back_as_it_was_drawn_or_refused(drawn, max_params):
    budget = max(max_params, 8000)
    recipe = space.to_candidate(drawn, max_params=budget, epochs=15).recipe
    candidate = space.Candidate(space.to_candidate(drawn, max_params=max_params, epochs=15).architecture, recipe)
    with contextlib.suppress(ArchitectureError):  # rounded to few channels, widths may lie beyond what the law allows
        assert space.to_candidate(space.to_parameters(candidate, budget), max_params=budget, epochs=15) == candidate


@few
@given(bodies, heads)
def test_any_network_is_a_point_of_the_space_or_refused(body, head):
    with contextlib.suppress(ArchitectureError):
        candidate = space.Candidate(Architecture((*body, *head)), space.Recipe())
        drawn = space.to_parameters(candidate)
        n_parameters = candidate.architecture.n_parameters
        assert space.to_candidate(drawn, max_params=n_parameters + 1, epochs=15) == candidate


# --- pictures --------------------------------------------------------------------------------------------------------

MODES = {"PNG": "RGBA", "JPEG": "RGB", "GIF": "P", "BMP": "RGB", "TIFF": "LA", "WEBP": "RGB", "PPM": "L"}


def _picture(kind):
    image = Image.new("L", (40, 30), 255)
    image.paste(0, (10, 5, 14, 25))
    file = io.BytesIO()
    image.convert(MODES[kind]).save(file, kind)
    return file.getvalue()


PICTURES = {kind: _picture(kind) for kind in MODES}


@st.composite
def damaged(draw, kinds=tuple(PICTURES)):
    """A picture with some bytes changed, cut out or added."""
    content = bytearray(PICTURES[draw(st.sampled_from(kinds))])
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content)))
        end = at + draw(st.integers(0, 4) | st.integers(0, len(content)))
        content[at:end] = draw(st.binary(max_size=8))
    return bytes(content)


@pytest.fixture(scope="module")
def network(solution):
    return predict.load(solution)


def _check(prediction):
    if prediction.error is None:
        assert 0 <= prediction.class_index <= 9 and 0 < prediction.confidence <= 1
    else:
        assert len(prediction.error.splitlines()) == 1


@bulk
@given(damaged() | st.binary())
def test_damaged_picture_is_a_digit_or_one_clear_line(network, tmp_path, content):
    path = tmp_path / "picture"
    path.write_bytes(content)
    for prediction in predict.predict(network, [str(path)]):
        _check(prediction)
    assert path.read_bytes() == content


@bulk
@given(damaged(kinds=("PNG",)) | st.binary().map(lambda content: b"\x89PNG\r\n\x1a\n" + content))
def test_reader_without_pillow_gives_a_picture_or_value_error(content):
    with contextlib.suppress(ValueError):
        grey = preprocess.read_png(content)
        assert grey.ndim == 2 and grey.isfinite().all() and grey.min() >= 0 and grey.max() <= 1 + 1e-6


def _png(width, height, data):
    def chunk(kind, content):
        return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(20, 20), (2**31 - 1, 2**31 - 1), (100_000, 100_000), (0, 5)])
def test_decompression_bomb_is_not_unpacked(network, tmp_path, width, height):
    bomb = _png(width, height, b"\0" * 50_000_000)
    (tmp_path / "bomb.png").write_bytes(bomb)
    for prediction in predict.predict(network, [str(tmp_path / "bomb.png")]):
        assert prediction.error
    if width == height == 20:
        assert preprocess.read_png(bomb).shape == (20, 20)  # the rest is never unpacked
    else:
        with pytest.raises(ValueError, match=r"too many|damaged"):
            preprocess.read_png(bomb)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "LA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3000, 2), (37, 41)])
def test_odd_modes_and_sizes_are_digits_or_one_clear_line(network, tmp_path, mode, size):
    path = tmp_path / "picture.tif"
    Image.new(mode, size).save(path)
    Image.linear_gradient("L").resize(size).save(tmp_path / "gradient.png")
    for prediction in predict.predict(network, [str(path), str(tmp_path / "gradient.png")]):
        _check(prediction)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_no_numbers_are_refused(value):
    grey = torch.ones(30, 30)
    grey[10:20, 10:12] = value
    with pytest.raises(ValueError, match="no numbers"):
        preprocess.prepare(grey)


# --- databases and folders -------------------------------------------------------------------------------------------


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A real one, closed, with a trial in it."""
    path = tmp_path_factory.mktemp("database") / "s.db"
    storage = Storage.parse(str(path))
    opened = storage.open(create=True)
    studies.create(opened, "nas-mnist", metric="m", attributes={"identity": {"max_params": 8000}})
    studies.load(opened, "nas-mnist").enqueue_trial({"x": 1})
    opened.engine.dispose()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    return path


def run(*arguments):
    """Exit code, stdout and stderr of a command, run in this process, whatever it prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
    return code, out.getvalue(), err.getvalue()


def refused(*arguments):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n"), (out, err)
    return err


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.3, 0.9, 0.999])
def test_database_cut_short_is_one_clear_line_and_stays_as_it_is(database, tmp_path, fraction):
    path = tmp_path / "cut.db"
    content = database.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    before = snapshot(tmp_path)
    for command in (["show"], ["search", "--trials", 1], ["dashboard"]):
        assert "--storage" in refused(*command, "--storage", path)
    assert {name: before[name] for name in before} == {
        name: content for name, content in snapshot(tmp_path).items() if name.suffix != ".lock"
    }


@pytest.mark.parametrize("version", ["v2.6.0.a", "v99.0.0.a"])
def test_database_of_another_schema_version_is_one_clear_line_and_stays_as_it_is(database, tmp_path, version):
    path = tmp_path / "s.db"
    shutil.copy(database, path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
        connection.execute("DROP TABLE trial_heartbeats")  # that Optuna would make again
    before = snapshot(tmp_path)
    for command in (["show"], ["search", "--trials", 1]):
        assert "optuna" in refused(*command, "--storage", path).lower()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("tables", [["bookmarks"], ["trials"], ["studies", "trials", "version_info"]])
def test_database_of_another_program_is_one_clear_line_and_stays_as_it_is(tmp_path, tables):
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for table in tables:
            connection.execute(f"CREATE TABLE {table} (url TEXT)")
    before = snapshot(tmp_path)
    for command in (["show"], ["search", "--trials", 1]):
        assert "another program" in refused(*command, "--storage", path)
    assert snapshot(tmp_path) == before


def _flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {"missing": None, "empty": lambda _: b"", "cut": lambda c: c[: len(c) // 2], "changed": _flip}
EXPORTED = ["README.md", "model.onnx", "model.py", "solution.json", "weights.safetensors", "figures/curves.png"]


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("damage", DAMAGE)
def test_solution_with_any_file_damaged_is_not_evaluated(solution, data_dir, tmp_path, name, damage):
    folder = tmp_path / "solution"
    shutil.copytree(solution, folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if DAMAGE[damage]:
        (folder / name).write_bytes(DAMAGE[damage](content))
    before = snapshot(folder)
    assert name in refused("evaluate", folder)
    if name in ("solution.json", "weights.safetensors"):
        assert name in refused("predict", folder, tmp_path / "none.png")
    assert snapshot(folder) == before


@few
@given(
    st.binary()
    | st.text().map(str.encode)
    | st.recursive(st.none() | st.text(), st.lists).map(
        lambda value: json.dumps({"architecture": value, "sha256": value}).encode()
    )
)
def test_any_record_is_refused_with_one_line(solution, tmp_path, content):
    folder = tmp_path / "any"
    shutil.copytree(solution, folder, dirs_exist_ok=True)
    (folder / "solution.json").write_bytes(content)
    assert "solution.json is damaged or was changed" in refused("evaluate", folder)


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = [
    "a?b.db",
    "a#b.db",
    "100%.db",
    "a%20b.db",
    "{x}.db",
    "-x.db",
    "two\nlines.db",
    "é ü.db",
    "'q\".db",
    "\x1b[2J.db",
]


@pytest.mark.parametrize("name", NAMES)
def test_database_may_be_called_what_it_likes(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    storage = Storage.parse(name)
    studies.create(storage.open(create=True), "s", metric="m", attributes={})
    assert studies.names(Storage.parse(str(tmp_path / name)).open()) == ["s"]
    assert {path.name.removesuffix(".lock").split("-")[0] or "-x.db" for path in tmp_path.iterdir()} == {
        name.split("-")[0] or name
    }
    assert "no study 'nas-mnist'" in refused("show", f"--storage={name}")
    refused("show", f"--storage={name}.none")


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "/dev/null/x", ".", "/", "sqlite://", "\udcff.db"])
def test_name_that_cannot_be_a_database_is_one_clear_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for command in ("show", "search"):
        refused(command, "--storage", name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_never_replaced_by_a_database(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for command in ("show", "search"):
        assert "must be a file" in refused(command, "--storage", tmp_path / "pipe")
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


@pytest.mark.parametrize("name", ["file:x.db", "file:x.db?uri=true", ":memory:?cache=shared", "?x=1"])
def test_address_of_sqlite_that_is_no_file_is_refused(name):
    with pytest.raises(StudyError, match="SQLAlchemy URL"):
        Storage.parse(f"sqlite:///{name}")


@pytest.mark.parametrize("name", ['it\'s "quoted"', "a; DROP TABLE studies", "100% {x} [bold]", "süß", "x" * 200, "-x"])
def test_study_may_be_called_what_it_likes(database, tmp_path, name):
    path = tmp_path / "s.db"
    shutil.copy(database, path)
    storage = Storage.parse(str(path))
    studies.create(storage.open(), name, metric="m", attributes={})
    code, out, err = run("show", "--storage", path, f"--study={name}")
    assert code == 0 and "0 trained" in out and err == ""
    assert repr(name + "?") in refused("show", "--storage", path, f"--study={name}?") or len(name) == 200


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "\x1b[2J", "x" * 201, "\udcff"])
def test_study_without_a_name_that_can_be_read_is_refused(name):
    assert "argument --study: must be 1 to 200 characters" in refused("show", f"--study={name}")


@few
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_whatever_is_shown_is_one_line_that_no_terminal_obeys(text):
    assert len(shown(text).splitlines()) <= 1 and shown(text).isprintable()


# --- the command line ------------------------------------------------------------------------------------------------

HOSTILE = [
    "",
    " ",
    "-1",
    "0",
    "3",
    "1e9",
    "9" * 5000,
    "nan",
    "inf",
    "-inf",
    "0.5",
    "é",
    "two\nlines",
    "\x1b[31m",
    "--",
    "-x",
]
HOSTILE += [
    "x" * 300,
    "c8 x",
    "c10k28-",
    "era1a7",
    "cpu",
    "cuda:9",
    "cpu,cuda:9",
    ",",
    "a\udcff",
    "%s%n",
    "{x}",
    "'",
    '"',
]
HOSTILE += [
    "other.db",
    "notes.txt",
    "cut.db",
    "s.db",
    "none.db",
    "solution",
    "lr.png",
    ".",
    "/",
    "/proc/x/y",
]
HOSTILE += ["postgresql://u:secret@127.0.0.1:1/x", "mysql://u:secret@h/x", "sqlite://", "127.0.0.1", "a..b", "sgd"]
COMMANDS = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


@st.composite
def argument_lists(draw):
    """A command, some of its options and positionals, and hostile values for them."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    arguments = [name]
    for action in draw(st.lists(st.sampled_from(COMMANDS[name]._actions), max_size=5)):
        arguments += [draw(st.sampled_from(action.option_strings))] if action.option_strings else []
        arguments += [] if action.nargs == 0 else [draw(st.sampled_from(HOSTILE))]
    return arguments


@pytest.fixture
def precious(tmp_path, monkeypatch, database, solution, data_dir):
    """Files that belong to somebody, in the current folder; no command can train, listen or draw."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("years of work")
    (tmp_path / "cut.db").write_bytes(database.read_bytes()[:9000])
    shutil.copytree(solution, tmp_path / "solution")
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")

    def kept_out(*_, **__):
        raise NasMnistError("kept out of the test")

    for module, name in (
        (search, "run_workers"),
        (planned, "run_workers"),
        (lr_finder, "range_test"),
        (search, "prepare"),
    ):
        monkeypatch.setattr(module, name, kept_out)
    monkeypatch.setattr("nas_mnist.views.dashboard._check_port", kept_out)
    theirs = snapshot(tmp_path)
    shutil.copy(database, tmp_path / "s.db")  # a study, which a command may add to

    def is_untouched():
        there = snapshot(tmp_path)
        return {name: there.get(name) for name in theirs} == theirs

    return is_untouched


@few
@given(arguments=argument_lists())
def test_any_arguments_are_answered_by_a_result_or_one_clear_line(precious, arguments):
    code, out, err = run(*arguments)
    assert code in (0, 1, 2), (arguments, err)
    assert "Traceback" not in err and "secret" not in out + err
    if code == 2 and arguments[0] != "predict":
        assert err.count("\n") == 1 and out == "", (arguments, out, err)
    assert precious()


def test_arguments_that_no_encoding_knows_are_shown_all_the_same(solution, capfdbinary):
    assert refused("predict", solution, "\udcff\n.png").startswith(r"\udcff\n.png: cannot be read")
