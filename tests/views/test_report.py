"""The report of a study: what the page says, and how it looks in a real browser."""

import re
from itertools import pairwise
from pathlib import Path

import pypdfium2
import pytest
from optuna.trial import TrialState, create_trial
from PIL import Image
from synthetic import ablate_trial, confirm_trial, draw_trial, draw_trials, new_study, retrain_trial

from nas_mnist.cli import main as cli
from nas_mnist.data.datasets import DATASETS
from nas_mnist.errors import NasMnistError, StudyError
from nas_mnist.stages.search import N_TRIALS, leaderboard
from nas_mnist.study.records import TrialCounts, is_trained, origin_attributes
from nas_mnist.study.storage import Storage
from nas_mnist.views import report

SECTIONS = {
    "summary": "Summary",
    "accuracy": "Accuracy against parameters",
    "candidates": "Best candidates",
    "confirmation": "Confirmation",
    "retraining": "Retraining",
    "ablation": "Ablation",
    "history": "Optimisation history",
    "curves": "Learning curves",
    "epochs": "Epochs spent",
    "importance": "Parameter importance",
    "budget": "Over budget",
    "timeline": "Timeline",
    "failures": "Failures",
    "settings": "Settings",
}
FIGURES = ("accuracy", "ablation", "history", "curves", "epochs", "importance", "budget", "timeline")
HOSTILE = """"><script>window.broken=1</script></script>'<img src=x onerror="window.broken=1">"""


@pytest.fixture(scope="module")
def long_search():
    return new_study(draw_trials(300))


@pytest.fixture(scope="module")
def report_file(long_search, tmp_path_factory):
    """The page of a search of 300 trials with everything there can be in it."""
    best = leaderboard(long_search.get_trials(deepcopy=False))
    ranking = [confirm_trial(best[0]), confirm_trial(best[1]), confirm_trial(best[2], given_up=True)]
    path = tmp_path_factory.mktemp("report") / "index.html"
    page = report.page(long_search, ranking, [retrain_trial(best[0])], ablate_trial(best[0]))
    path.write_text(page, encoding="utf-8")
    return path


def _text(html: str) -> str:
    """What a reader sees before the figures are drawn."""
    body = html[html.index("<body>") : html.index('<script type="application/json"')]
    return " ".join(re.sub("<[^>]*>", " ", body).split())


def _section(html: str, name: str) -> str:
    start = html.index(f'<section id="{name}">')
    return html[start : html.index("</section>", start)]


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_summary_counts_what_became_of_the_trials(long_search, report_file):
    trials = long_search.get_trials(deepcopy=False)
    now = TrialCounts.of(trials)
    summary = _text("<body>" + _section(report_file.read_text(), "summary") + '<script type="application/json"')
    best = leaderboard(trials)[0]
    epochs = sum(len(t.intermediate_values) for t in trials if is_trained(t))
    for fact in (
        f"best {best.value:.2%} of the validation images with {best.user_attrs['n_parameters']:,} parameters",
        f"trained {now.trained} trials: {now.trained - now.pruned} to the end, {now.pruned} stopped early, 1 of these",
        f"over budget {now.over_budget} of 300 drawn",
        "under way 2 running, 0 waiting",
        f"epochs {epochs:,} trained, {now.trained * 15 - epochs:,} saved by pruning",
        "± 0.01 (n = 4) of fresh folds",
        "± 0.02 (n = 3) of the test set",
    ):
        assert fact in summary, fact


@pytest.mark.parametrize(("n_asked", "unfinished"), [(2, False), (3, True)])
def test_only_a_search_that_has_not_all_its_trials_is_called_unfinished(n_asked, unfinished):
    study = new_study([draw_trial(0), draw_trial(1, "pruned"), create_trial(state=TrialState.WAITING)])
    study.set_user_attr(N_TRIALS, n_asked)
    html = report.page(study)
    assert ("This study is not finished" in html) == ("0 running, 1 waiting" in html) == unfinished


def test_settings_tell_what_makes_the_study_comparable_and_where_it_ran(long_search, report_file):
    settings = _section(report_file.read_text(), "settings")
    made_with = [value for value in long_search.user_attrs["identity"].values() if value is not None]
    for value in (*made_with, "a processor", "torch 2.15.0"):
        assert (f"{value:,}" if isinstance(value, int) else value) in settings


def test_each_of_the_best_has_a_drawing_its_line_and_its_recipe(long_search, report_file):
    section = _section(report_file.read_text(), "candidates")
    best = leaderboard(long_search.get_trials(deepcopy=False))[:10]
    assert section.count("<svg") == section.count("<article") == 10
    assert "momentum" not in section  # all of them are trained by SOAP
    for trial in best:
        assert f"<code>{trial.user_attrs['architecture']}</code>" in section
        assert f"learning rate <b>{trial.user_attrs['recipe']['learning_rate']:.4g}</b>" in section


def test_an_ablation_is_told_row_by_row(report_file):
    text = _text(report_file.read_text(encoding="utf-8"))
    assert re.search(r"no augmentation [\d,]+ 99\.\d{3}% 0\.01 4 -0\.210 0\.040 0\.012", text)
    assert re.search(r"constant rate of \S+ [\d,]+ 99\.\d{3}% 1 \(3 diverged\) \+0\.030", text)
    assert "nas-mnist ablate" in _text(report.page(new_study(draw_trials(20))))


def test_another_dataset_is_named_and_has_no_reference_systems():
    html = report.page(new_study([draw_trial(0)], dataset=DATASETS["kmnist"]))
    assert "the best network on Kuzushiji-MNIST" in html and "published" not in _section(html, "accuracy")
    assert "eva-drilldown" not in html


def test_the_standard_error_is_that_of_the_validation_images():
    assert report._standard_error(0.995, 10_000) == "0.071"
    html = report.page(new_study([draw_trial(0)]))
    assert "10,000 <em>validation</em>" in html


def test_failures_come_with_their_reason(report_file):
    assert "the training loss was nan" in _section(report_file.read_text(), "failures")


@pytest.mark.parametrize("outcomes", [[], ["finished"], ["pruned"] * 6, ["over budget"], ["failed"], ["running"]])
def test_what_cannot_be_drawn_is_a_sentence_that_says_why(outcomes):
    trials = [draw_trial(number, outcome) for number, outcome in enumerate(outcomes)]
    html = report.page(new_study(trials))
    for name in FIGURES:
        section = _section(html, name)
        missing = re.findall('<p class="missing">(.*)</p>', section)
        assert ('class="plot"' in section) != bool(missing)
        assert all(sentence.endswith(".") and len(sentence) > 20 for sentence in missing)
    assert ("no leaderboard" in html) == ("finished" not in outcomes)


def test_a_study_that_is_no_search_is_refused():
    study = new_study()
    study.set_user_attr("identity", {"dataset": "mnist", "folds": 6})
    with pytest.raises(StudyError, match="is not a search"):
        report.page(study)


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_command_writes_one_file_and_replaces_its_own(tmp_path, capsys):
    new_study([draw_trial(0)], path=tmp_path / "s.db")
    out = tmp_path / "deep" / "report"
    command = ["report", "--storage", str(tmp_path / "s.db"), "--out", str(out)]
    assert cli.main(command) == 0 and cli.main(command) == 0
    assert [path.name for path in out.iterdir()] == ["index.html"]
    assert re.search(r"index.html: \d\.\d MB", capsys.readouterr().out)
    assert (out / "index.html").stat().st_mode & 0o777 == 0o644


def test_a_page_of_someone_else_is_not_lost(tmp_path):
    new_study(path=tmp_path / "s.db")
    (tmp_path / "index.html").write_text("<h1>mine</h1>")
    with pytest.raises(NasMnistError, match="is no report and must not be lost"):
        report.write(Storage.parse(str(tmp_path / "s.db")), "nas-mnist", tmp_path)
    assert (tmp_path / "index.html").read_text() == "<h1>mine</h1>"


def test_a_folder_that_is_a_file_is_one_clear_line(tmp_path):
    new_study(path=tmp_path / "s.db")
    (tmp_path / "report").write_text("")
    with pytest.raises(NasMnistError, match="must be a folder that can be written"):
        report.write(Storage.parse(str(tmp_path / "s.db")), "nas-mnist", tmp_path / "report")


def test_a_page_that_cannot_be_written_whole_is_not_there(tmp_path, monkeypatch):
    new_study(path=tmp_path / "s.db")
    out = tmp_path / "report"
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(NasMnistError, match="no space"):
        report.write(Storage.parse(str(tmp_path / "s.db")), "nas-mnist", out)
    assert list(out.iterdir()) == []


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def open_page(page):
    """Open a page and wait until its figures are drawn; what it asks the network for is in `page.requests`."""
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))  # warnings too

    def open_page(path, **viewport):
        if viewport:
            page.set_viewport_size(viewport)
        page.goto(path.as_uri())
        _wait_until(page, "Object.keys(figures).every(n => document.querySelector(`#figure-${n} .main-svg`))")
        return page

    return open_page


def _wait_until(page, condition: str) -> None:
    """Playwright's own `wait_for_function` needs what the page forbids itself: to run text as a script."""
    for _ in range(1200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {condition}")


def test_everything_appears_and_nothing_is_fetched(report_file, open_page, screenshots):
    page = open_page(report_file)
    for name, title in SECTIONS.items():
        assert page.locator(f"section#{name} h2").first.inner_text() == title
        assert page.locator(f"nav a[href='#{name}']").count() == 1
    for name in FIGURES:
        assert page.locator(f"#figure-{name} .trace, #figure-{name} .bars .point").count() > 0
    page.screenshot(path=screenshots / "report-desktop.png", full_page=True)
    assert page.complaints == [] and page.requests == [report_file.as_uri()]


def test_hovering_a_point_names_the_trial(report_file, open_page):
    page = open_page(report_file)
    page.locator("#figure-history").scroll_into_view_if_needed()
    box = page.locator("#figure-history .scatterlayer .trace:nth-child(2) .point").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#figure-history .hoverlayer .hovertext")
    assert re.match(r"trial \d+: 9\d\.\d\d%, [\d,]+ parameters", page.text_content("#figure-history .hovertext"))


def test_no_button_sends_the_study_anywhere(report_file, open_page):
    titles = open_page(report_file).locator(".modebar-btn").evaluate_all("all => all.map(b => b.dataset.title)")
    assert len(titles) == 4 * len(FIGURES)
    assert not [title for title in titles if re.search("cloud|share|link|edit|upload", title, re.IGNORECASE)]


def test_a_phone_shows_it_without_scrolling_sideways(report_file, open_page, screenshots):
    page = open_page(report_file, width=390, height=844)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.screenshot(path=screenshots / "report-phone-dark.png", full_page=True)
    assert page.complaints == []


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_labels_of_an_axis_overlap_nowhere_and_legends_are_whole(report_file, open_page, width):
    page = open_page(report_file, width=width, height=900)
    for name in FIGURES:
        for axis, low, high in (("xtick", "left", "right"), ("ytick", "top", "bottom")):
            boxes = page.locator(f"#figure-{name} .{axis} text").evaluate_all(BOXES)
            boxes.sort(key=lambda box: box[low])
            assert boxes and all(a[high] <= b[low] + 1 for a, b in pairwise(boxes)), (name, axis)
        (figure,) = page.locator(f"#figure-{name}").evaluate_all(BOXES)
        for box in page.locator(f"#figure-{name} :is(.legendtext, .xtitle, .ytitle, .bartext)").evaluate_all(BOXES):
            assert box["left"] >= figure["left"] and box["right"] <= figure["right"], name
            assert box["top"] >= figure["top"] and box["bottom"] <= figure["bottom"] + 1, name


BOXES = "all => all.map(e => (({left, right, top, bottom}) => ({left, right, top, bottom}))(e.getBoundingClientRect()))"


def test_dark_readers_get_dark_figures_and_paper_gets_light_ones(report_file, open_page):
    page = open_page(report_file)
    ink = "getComputedStyle(document.querySelector('#figure-history .xtick text')).fill"
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    _wait_until(page, f"{ink} !== '{light}'")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    _wait_until(page, f"{ink} === '{light}'")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    _wait_until(page, f"{ink} !== '{light}'")


def test_printed_figures_stay_on_one_page_with_their_titles(report_file, open_page, screenshots):
    pdf = screenshots / "report.pdf"
    page = open_page(report_file)
    page.pdf(path=pdf, format="A4", print_background=True)
    assert page.complaints == []
    document = pypdfium2.PdfDocument(pdf)
    pages = [sheet.get_textpage().get_text_range() for sheet in document]
    for title, axis in (("Optimisation history", "best so far"), ("Parameter importance", "share of the importance")):
        assert [axis in text for text in pages if title in text] == [True], title
    sheets = [sheet.render(scale=1).to_pil() for sheet in document]
    width, height = sheets[0].size
    overview = Image.new("RGB", (4 * width, -(-len(sheets) // 4) * height), "gray")
    for i, sheet in enumerate(sheets):
        overview.paste(sheet, (i % 4 * width, i // 4 * height))
    overview.save(screenshots / "report-print.png")
    assert all(sheet.getbbox() for sheet in sheets)


def test_text_from_the_database_is_never_run(open_page, tmp_path):
    trials = [draw_trial(0), draw_trial(1, "diverged")]
    trials[0].set_user_attr("architecture", HOSTILE)
    trials[0].set_user_attr("reference", HOSTILE)
    trials[0].set_user_attr("device", HOSTILE)
    trials[1].set_user_attr("reason", HOSTILE)
    path = tmp_path / "index.html"
    path.write_text(report.page(new_study(trials, name=HOSTILE)), encoding="utf-8")
    page = open_page(path)
    assert page.inner_text("h1") == f"Study {HOSTILE}"
    assert HOSTILE in page.inner_text("#failures") and HOSTILE in page.inner_text("#settings")
    assert "no architecture, so it is not drawn" in page.inner_text("#candidates")
    assert page.evaluate("window.broken") is None
    assert page.complaints == [] and page.requests == [path.as_uri()]


def test_the_page_forbids_itself_other_scripts_and_the_network(report_file, open_page):
    page = open_page(report_file)
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.broken = 1'}))")
    assert page.evaluate("window.broken") is None
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'fetched', () => 'refused')") == "refused"
    assert sum("Content Security Policy" in complaint for complaint in page.complaints) >= 2


def test_the_best_is_told_with_the_trials_it_descends_from():
    trials = draw_trials(40)
    best = trials.index(leaderboard(trials)[0])
    parent, first, *_ = (i for i, t in enumerate(trials) if t.state.name == "PRUNED" and t.intermediate_values)
    trials[first].user_attrs |= origin_attributes("random")
    for child, ancestor in ((parent, first), (best, parent)):
        change = f"mutation of trial {ancestor}: blocks 2 → 3"
        trials[child].user_attrs |= origin_attributes(change, ancestor)
    page = report.page(new_study(trials))
    told = _text("<body>" + page[page.index('id="family"') :])
    root = f"{first} stopped after epoch {len(trials[first].intermediate_values)} random"
    end = f"{best} {trials[best].value:.2%} mutation of trial {parent}: blocks 2 → 3"
    assert told.index(root) < told.index(end)
