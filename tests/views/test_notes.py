import optuna
from optuna.trial import TrialState, create_trial

from nas_mnist.model import zoo
from nas_mnist.study.space import Candidate, fingerprint
from nas_mnist.study.storage import experimental
from nas_mnist.training.recipe import Recipe
from nas_mnist.views import notes


def made(architecture="c8 M c16 G c10k1- | dropout=0.05", **attributes):
    candidate = Candidate(zoo.resolve(architecture), Recipe()).to_dict()
    attributes |= candidate | {"n_parameters": zoo.resolve(architecture).n_parameters}
    return create_trial(value=0.994, user_attrs=attributes)


def test_trial_note_has_the_line_the_drawing_every_layer_and_the_recipe():
    note = notes.trial_note(made("step-by-step", reference="step-by-step"), "/artifacts/1/2/abc")
    assert "](/artifacts/1/2/abc)" in note and "by the sampler: **step-by-step**" in note
    assert note.startswith("`c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1-")
    rows = [line for line in note.splitlines() if line.startswith("| `")]
    assert len(rows) == 10 and "| `c20` | 20×6×6 | 18×18 | 2 | 2,920 | 39% | 103,680 |" in rows
    assert "one cycle up to 0.1" in note and "turned ±10°" in note


def test_trial_over_the_budget_says_by_how_much():
    study = optuna.create_study()
    trial = study.ask()
    trial.set_constraint("parameters", 1234)
    for name, value in made().user_attrs.items():
        trial.set_user_attr(name, value)
    study.tell(trial, state=TrialState.PRUNED)
    assert "**Over the budget by 1,234 parameters**; recorded, never trained." in notes.trial_note(study.trials[0], "x")
    assert "Over the budget" not in notes.trial_note(made(), "x")


def study_of(name="tiny", **identity):
    study = optuna.create_study(study_name=name)
    with experimental():
        study.set_metric_names(["validation accuracy"])
    study.set_user_attr("identity", identity)
    return study


def test_study_note_tells_what_the_study_is_and_ranks_the_best():
    identity = {"optimizer": "sgd", "space": fingerprint("sgd")}
    study = study_of(dataset="mnist", max_params=8000, train_images=50_000, **identity)
    trials = [made(), made("step-by-step")]
    note = notes.study_note(study, trials, trials, 1_234_567, "nas-mnist search --trials 7")
    assert "**parameters, fewer than**: 8,000" in note and "**train images**: 50,000" in note
    assert "**objective**: validation accuracy" in note and "at most 15 epochs" in note
    assert "**trained**: 2 trials, 0 of them pruned early" in note and "1.2 MB" in note
    number = trials[0].number  # -1, for a trial made by hand
    assert f"| 1 | {number} | 99.40% | {trials[0].user_attrs['n_parameters']:,} |" in note
    assert "G c10k1- \\| dropout=0.05`" in note  # a bare bar would end the cell
    assert "```\nnas-mnist search --trials 7\n```" in note
    assert "| `learning_rate` | `0.04 – 0.25, log` |" in note and "| `dropout` | `0 – 0.02` |" in note


def test_ranges_of_another_space_are_not_told_as_those_of_a_study():
    study = study_of(optimizer="sgd", space="0123456789ab")
    note = notes.study_note(study, [], [], 0, "nas-mnist search")
    assert "That of an earlier version" in note and "`learning_rate`" not in note


def test_study_that_is_no_search_has_no_command_and_no_space():
    note = notes.study_note(study_of(dataset="mnist"), [], [], 0, None)
    assert "No candidate has been trained" in note and "Command" not in note and "Space" not in note


def test_name_of_a_study_is_nobodys_markdown():
    note = notes.study_note(study_of("a *b* <img src=x>\n# c"), [], [], 0, None)
    assert note.splitlines()[0] == r"# a \*b\* \<img src=x\> \# c"
