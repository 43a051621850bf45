"""The dossier of failures: counted by hand, against scikit-learn, and the same in every file."""

import dataclasses
import re
import shutil
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BASELINE, SE, comparison, evaluation_of, tiny
from sklearn.metrics import classification_report
from statsmodels.stats.multitest import multipletests

import main
from lab.data import shapes
from lab.data.images import Images
from lab.machine.files import ResultFiles
from lab.measure import failures, statistics
from lab.measure.evaluation import HeldOut, Outputs, evaluate
from lab.measure.models import build_network
from lab.report import figures, sentences


def test_transitions_are_counted_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 0, 0])
    sure = torch.full((6,), 0.9)
    first = evaluation_of(torch.tensor([0, 1, 0, 1, 1, 2]), sure, labels)
    other = evaluation_of(torch.tensor([0, 0, 1, 1, 2, 2]), sure, labels, network=SE)
    counts = failures.count_transitions([first, first], [first, other]).counts
    assert {way.name: found.tolist() for way, found in counts.items()} == {
        "RIGHT": [2, 1],
        "CORRECTED": [0, 1],
        "BROKEN": [0, 1],
        "SAME_CLASS": [4, 2],
        "OTHER_CLASS": [0, 1],
    }
    said = sentences.say_transitions(failures.count_transitions([other], [first]))
    assert "Baseline's 4 mistakes, SE-Attention corrects 1 and makes 1 new ones; 3 stay" in said
    of_seeds = failures.count_transitions([other, other, first], [first, first, first])
    assert sentences.say_transitions(of_seeds) == (
        "Of Baseline's 4.0 mistakes, SE-Attention corrects 0.7 and makes 0.7 new ones; 3.3 stay, "
        "2.7 of them with the same class (means over 3 seeds)."
    )


def test_table_csv_figure_and_text_count_the_same(made_tiny_run, tmp_path):
    """Each from its own file."""
    shutil.copytree(made_tiny_run / "models", tmp_path / "models")
    plotted = []

    def plot_only_transitions(results, files):
        plotted.append(figures.FAILURE_FIGURES["transitions"](results, results.failures))

    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.object(ResultFiles, "write", autospec=True, side_effect=ResultFiles.write) as w,
    ):
        patch.setattr(figures, "save", plot_only_transitions)
        main.main(tiny(tmp_path))
    (figure,) = plotted
    predictions = pd.read_csv(tmp_path / "results" / "predictions.csv")
    mistakes = pd.read_csv(tmp_path / "results" / "failures.csv")
    table = pd.read_csv(tmp_path / "results" / "transitions.csv", index_col=0)["to SE-Attention"]
    wrong = ~predictions.baseline_correct | ~predictions.se_attention_correct
    assert len(predictions) == table.sum() == 100 and len(mistakes) == wrong.sum()
    assert [call.args[1] for call in w.call_args_list].count("results/predictions.csv") == 1
    by_way = mistakes.se_attention_transition.value_counts().reindex(table.index[1:], fill_value=0)
    assert by_way.tolist() == table.iloc[1:].tolist()
    drawn = [bar.get_width() for bar in figure.axes[0].patches]
    assert drawn == table.iloc[1:].tolist()
    recorded = comparison(tmp_path)["failures"]
    assert list(recorded["transitions"]["se_attention"].values()) == table.tolist()
    summary = (tmp_path / "results" / "summary.md").read_text()
    assert recorded["said"]["transitions"] in summary
    for way, count in table.astype(int).items():
        assert re.search(rf"\| {way} +\| +{count:,} \|", summary)
    # what is said of single images is what the networks' accuracies are made of
    for key in ("baseline", "se_attention"):
        accuracy = comparison(tmp_path)["networks"][key]["accuracy"]["overall"]["value"]
        assert 100 * predictions[f"{key}_correct"].mean() == pytest.approx(accuracy)
        called = predictions[f"{key}_predicted"] == predictions.true_class
        assert (called == predictions[f"{key}_correct"]).all()
    sure = pd.read_csv(tmp_path / "results" / "sure_mistakes.csv", index_col=0)
    for level in (50, 99):
        found = mistakes[~mistakes.baseline_correct].baseline_confidence >= level / 100
        assert sure.loc[f"{level} % confidence", "Baseline: as trained"] == found.sum()
    surest = np.maximum(
        mistakes.baseline_confidence * ~mistakes.baseline_correct,
        mistakes.se_attention_confidence * ~mistakes.se_attention_correct,
    )
    assert (np.diff(surest) <= 0).all()


def test_dividing_the_logits_makes_a_network_less_sure_and_no_better(trained, evaluated):
    settings, *_ = trained
    (run,) = evaluated["baseline"]
    outputs = Outputs(run.features, run.logits / 2)
    held_out = run.held_out.outputs
    halved = HeldOut(Outputs(held_out.features, held_out.logits / 2), run.held_out.labels)
    # one that errs more often, so that there is something to count
    labels = torch.where(torch.arange(400) % 3 == 0, (run.predicted + 1) % 10, run.predicted)
    first = evaluate(run.trained, Outputs(run.features, run.logits), labels, run.held_out)
    other = evaluate(dataclasses.replace(run.trained, network=SE), outputs, labels, halved)
    found = [failures.count_sure_mistakes([one], [first], settings.rules) for one in (first, other)]
    (said,) = sentences.say_sureness(found, 0.05)
    assert "makes fewer mistakes than Baseline as trained" in said
    assert "scaling the temperature changes that" in said


def test_sure_mistakes_p_is_corrected_over_levels_and_networks():
    rng = np.random.default_rng(0)
    counts = np.zeros((1, 2), int)
    made = []
    for network in (BASELINE, SE, dataclasses.replace(SE, key="third")):
        ps = [tuple(rng.random(2) / 20) for _ in range(3)]
        made.append(failures.SureMistakes(network, (50.0, 90.0), counts, counts, *ps))
    first, *others = failures.correct_sure_mistakes(made)
    assert first == made[0]
    for name in ("p_as_trained", "p_scaled", "p_of_scaling"):
        ps = [p for one in made[1:] for p in getattr(one, name)]
        found = [p for one in others for p in getattr(one, name)]
        assert found == pytest.approx(multipletests(ps, method="holm")[1].tolist())
    assert failures.correct_sure_mistakes(made[:1]) == (made[0],)


def test_sure_mistakes_are_counted_before_and_after_scaling(evaluated, dossier):
    for found in dossier.mistakes:
        (run,) = evaluated[found.network.key]
        wrong = torch.from_numpy(~run.correct)
        for by_level, temperature in ((found.as_trained, 1), (found.scaled, run.temperature)):
            sure = (run.logits / temperature).softmax(1).amax(1)[wrong]
            expected = [int((100 * sure >= level).sum()) for level in found.levels]
            assert by_level.tolist() == [expected]


def test_precision_recall_and_f1_are_scikit_learns(trained, evaluated, dossier):
    _, _, data, _ = trained
    for found in dossier.scores:
        (run,) = evaluated[found.network.key]
        report = classification_report(data.test.labels, run.predicted, output_dict=True)
        for label in range(10):
            expected = report[str(label)]
            assert found.precision[0, label] == pytest.approx(100 * expected["precision"])
            assert found.recall[0, label] == pytest.approx(run.class_accuracy[label], abs=1e-3)
            assert found.f1[0, label] == pytest.approx(100 * expected["f1-score"])
        assert found.f1.mean() == pytest.approx(100 * report["macro avg"]["f1-score"])


def test_confused_pairs_are_counted_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    sure = torch.full((8,), 0.9)
    first = evaluation_of(torch.tensor([1, 0, 0, 1, 2, 3, 3, 3]), sure, labels)
    other = evaluation_of(torch.tensor([0, 0, 0, 1, 2, 3, 3, 0]), sure, labels, network=SE)
    rules = statistics.Settings()
    pairs = failures.find_confused_pairs(
        {"baseline": [first], "se_attention": [other]}, labels, 5, rules
    )
    # and (0, 3), which the other network alone takes for each other
    assert [(p.first_class, p.second_class) for p in pairs] == [(0, 1), (2, 3), (0, 3)]
    assert pairs[0].error == {"baseline": 50, "se_attention": 25}
    assert pairs[0].change["se_attention"].value == -25
    gains = np.array([[-100, 0, 0, 0]])  # of images 0 to 3, of which the other network mends one
    all_hold = dataclasses.replace(rules, level=rules.level / 3)
    assert pairs[0].change["se_attention"] == statistics.judge(gains, all_hold).interval
    assert pairs[1].error == {"baseline": 25, "se_attention": 25}


def test_failures_are_of_distinct_kinds_with_all_networks_answers():
    labels = torch.zeros(6, dtype=torch.long)
    test = Images(shapes.draw(6, 0).pixels, labels)
    recipe = main.Recipe(widths=(8, 8), stem=4)
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.95, 0.9])
    called = torch.tensor([1, 1, 2, 0, 3, 0])
    first = evaluation_of(called, confidence, labels, model=build_network(BASELINE, recipe, 4))
    model = build_network(SE, recipe, 4)
    called = torch.tensor([1, 0, 0, 2, 0, 0])
    second = evaluation_of(called, confidence, labels, model=model, network=SE)
    groups = failures.group_mistakes([first, second], test, [4], None, 5)
    # of the two that the first calls 1, the surer
    assert [indices(group) for group in groups] == [[0], [4, 1, 2], [3]]
    assert [group.network for group in groups] == [None, BASELINE, SE]
    for group in groups:
        for mistake in group.mistakes:
            assert [answer.network for answer in mistake.image.answers] == [BASELINE, SE]
            assert mistake.is_suspect == (mistake.image.index == 4)
            assert mistake.people_for_label is None
    groups = failures.group_mistakes([first, second], test, [], None, 1)
    assert [indices(group) for group in groups] == [[0], [4], [3]]
    # those that people are sure of come first
    share = np.array([90, 95, 96, 97, 94, 99.0])
    groups = failures.group_mistakes([first, second], test, [], share, 5)
    assert [indices(group) for group in groups] == [[0], [1, 2, 4], [3]]
    assert [mistake.people_for_label for mistake in groups[1].mistakes] == [95, 96, 94]


def indices(group):
    return [mistake.image.index for mistake in group.mistakes]
