"""The paper: it compiles, its numbers are a run's, and its text is right whatever was found."""

import dataclasses
import re
import shutil
import subprocess
import sys
from decimal import ROUND_HALF_UP, Decimal
from functools import partial

import pytest
import torch
from helpers import BASELINE, ROOT, SE, STRESS, comparison, look_up, run_record, small_recipe, tiny
from statsmodels.stats.multitest import multipletests
from torch import nn

import main
from lab.data import shapes
from lab.measure import robustness
from lab.measure.models import Network, build_network
from lab.measure.statistics import Verdict


def test_each_number_that_the_paper_rounds_is_a_runs():
    """docs/numbers.md lists them for the run that the README tells of, and only those."""
    page = (ROOT / "docs" / "numbers.md").read_text()
    found = re.search(r"\n## The paper's\n.*?runs/(\w+)\.json(.*)", page, re.DOTALL)
    listed = dict(re.findall(r"^\| `([^`]+)` \| (\S+) \|$", found[2], re.MULTILINE))
    assert len(listed) > 50 and listed == dict(numbers_in_report(run_record(found[1])))


def compile_report(folder, run):
    """Compile a copy of the report from a run's output: its text, log and number of pages."""
    if not (shutil.which("latexmk") and shutil.which("pdftotext")):
        pytest.skip("latexmk or pdftotext is not installed")
    shutil.copy(ROOT / "report.tex", folder)
    define = rf"\def\run{{{run}}}"
    done = subprocess.run(
        ["latexmk", "-pdf", "-interaction=nonstopmode", f"-usepretex={define}", "report.tex"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    log = (folder / "report.log").read_text(errors="replace")
    assert done.returncode == 0, log[-3000:]
    text = subprocess.run(
        ["pdftotext", "-layout", "report.pdf", "-"], cwd=folder, capture_output=True, text=True
    ).stdout
    return (
        " ".join(text.split()),
        log,
        int(re.search(r"Output written on report\.pdf \((\d+) pages", log)[1]),
    )


def assert_clean(log):
    assert "undefined" not in log
    widths = [float(width) for width in re.findall(r"Overfull \\[hv]box \(([\d.]+)pt", log)]
    assert max(widths, default=0) <= 2


def numbers_in_report(record):
    """What report.tex rounds, as it should be printed; of each network and stage that has it."""
    source = (ROOT / "report.tex").read_text()
    rounded = [(found[1], found[2]) for found in re.finditer(r"\\num\{(\d)\}\{([^{}]*)\}", source)]
    for found in re.finditer(r"\\each(?:\[.*?\])?\{(\d)\}\{(\w+)\}", source):
        rounded.append((found[1], rf"stress/\key/{found[2]}"))
    for digits, path in rounded:
        for key in record["networks"]:
            for stage in ("1", "2", "3"):
                filled = path.replace(r"\firstkey", "baseline").replace(r"\key", key)
                filled = filled.replace(r"\stage", stage)
                try:
                    value = look_up(record, filled)
                except (KeyError, TypeError):  # the first network has no change and no gates, and
                    continue  # one seed no spread
                exact = Decimal(repr(float(value)))  # TeX rounds its digits, halves up
                rounded = exact.quantize(Decimal(1).scaleb(-int(digits)), ROUND_HALF_UP)
                yield filled, f"{rounded:,f}".replace("-", "−")


def test_the_report_has_no_number_of_its_own():
    source = (ROOT / "report.tex").read_text()
    body = re.search(r"\\begin\{document\}(.*)\\begin\{thebibliography\}", source, re.DOTALL)[1]
    body = body.replace("CIFAR-10.1", "")  # a name
    body = re.sub(r"\d*\.\d+(pt|\\linewidth|\\textheight)", "", body)
    assert re.findall(r"\d*\.\d+", body) == ["80.4"]  # another paper's result


def test_the_report_compiles_clean(made_tiny_run, tmp_path):
    text, log, pages = compile_report(tmp_path, made_tiny_run)
    assert_clean(log)
    assert 6 <= pages <= 10
    accuracy = comparison(made_tiny_run)["networks"]["baseline"]["accuracy"]["overall"]["value"]
    assert f"{accuracy:.2f}" in text
    assert (
        "Shapes" in text
        and "They are drawn by main.py itself" in text
        and "CIFAR-10 for" not in text
    )
    assert "One seed can’t speak for the architecture" in text


@pytest.mark.slow
def test_each_network_at_its_own_best_comes_into_the_paper(tiny_run, tmp_path, capsys):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tuning

    tuning.run(main.parse_settings(tiny(tiny_run, "--epochs", "1", "--seeds", "2")))
    trained = sorted((tiny_run / "tuning").glob("[0-9]/*.pth"))
    assert len(trained) == 2 * 4 * 2
    said = capsys.readouterr().out
    for path in (trained[0], trained[-1]):
        found = torch.load(path, weights_only=True)["history"][-1]["validation_accuracy"]
        assert f"{found:.2f}" in said
    fresh = (tiny_run / "tuning" / "winners").glob("*.pth")
    seeds = sorted(int(re.search(r"_seed(\d+)_", path.name)[1]) for path in fresh)
    assert seeds == [44, 44, 45, 45]  # 42 and 43 chose the winners
    assert "trained anew with seeds 44 to 45, on the test images" in said
    text, log, _ = compile_report(tmp_path, tiny_run)
    assert_clean(log)
    assert "SE-Attention: reduction 4" in text and "The best of each, trained anew" in text
    assert "Trained on" in text


@pytest.mark.slow
def test_the_controls_come_into_the_paper(tiny_run, tmp_path, capsys):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import controls

    controls.main([str(tiny_run), str(tiny_run), "--paper", str(tmp_path)])
    record = comparison(tiny_run)
    change = record["compared_with_first"]["se_attention"]["overall"]["difference"]["interval"]
    row = f"{change['value']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})"
    said = capsys.readouterr().out
    assert said.count("SE-Attention against Baseline, 2 epochs, 1 seed ") == 2
    assert said.count(row) == 2 and said.count(record["conclusion"]) == 2
    assert f"Trained on {record['device']} in {record['precision']}." in said
    shutil.copytree(tmp_path / "controls", tiny_run / "controls")
    text, log, _ = compile_report(tmp_path, tiny_run)
    assert_clean(log)
    assert "SE-Attention against Baseline, 2 epochs" in text and "Controls" in text
    with pytest.raises(SystemExit, match=r"nowhere/results/comparison\.json is not there"):
        controls.main([str(tiny_run), "nowhere"])


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 4])
def test_a_paper_on_networks_of_other_depths(tmp_path, stages, sketching):
    main.main(tiny(tmp_path / "run", *STRESS, "--widths", *["16"] * stages))
    text, log, _ = compile_report(tmp_path, tmp_path / "run")
    assert_clean(log)
    assert f"attention {stages}" in text and f"attention {stages + 1}" not in text
    share = comparison(tmp_path / "run")["stress"]["se_attention"][f"gate_share_stage_{stages}"]
    assert f"{share:.3f}".replace("-", "−") in text


@pytest.mark.slow
def test_a_paper_on_networks_without_gates(tmp_path, monkeypatch, sketching):
    """Nor with a corruption error, which there is none of where the first network never errs."""
    plain = Network(
        "plain", "Plain", "#DDAA33", "^",
        build=partial(main.SmallCNN, attention=nn.Identity),
        about="nothing either",
    )  # fmt: skip
    monkeypatch.setattr(main, "NETWORKS", [main.NETWORKS[0], plain])
    monkeypatch.setattr(robustness, "corruption_error", lambda *_: None)
    main.main(tiny(tmp_path / "run", *STRESS))
    text, log, _ = compile_report(tmp_path, tmp_path / "run")
    assert_clean(log)
    assert "Do the maps mean anything?" in text and "What the attention learnt" not in text
    assert "Mean accuracy is" in text and "mean corruption error" not in text


class Blind(main.SmallCNN):
    """A network that sees nothing: its classifier is given zeros."""

    def classify(self, features):
        return super().classify(0 * features)


class Shut(main.SEBlock):
    """A block that lets nothing through."""

    def forward(self, activations):
        return 0 * activations


class Idle(main.SEBlock):
    """A block that leaves all as it is, so that both networks are the same."""

    def forward(self, activations):
        return activations


def blind(recipe, classes):
    return Blind(recipe, classes, nn.Identity)


VERDICTS = [
    (
        Verdict.WORSE,
        1,
        [BASELINE, dataclasses.replace(SE, build=partial(main.SmallCNN, attention=Shut))],
    ),
    (
        Verdict.EQUIVALENT,
        1,
        [BASELINE, dataclasses.replace(SE, build=partial(main.SmallCNN, attention=Idle))],
    ),
    (Verdict.UNDECIDED, 2, [BASELINE, SE]),
    (Verdict.BETTER, 2, [dataclasses.replace(BASELINE, build=blind), SE]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("verdict", "seeds", "networks"), VERDICTS)
def test_the_reports_text_is_right_whichever_way_it_fell(
    tmp_path, monkeypatch, sketching, verdict, seeds, networks
):
    monkeypatch.setattr(main, "NETWORKS", networks)
    more = [
        "--epochs",
        "4",
        "--shapes-train",
        "1000",
        "--shapes-test",
        "400",
        "--seeds",
        str(seeds),
    ]
    level = "0.001" if verdict is Verdict.UNDECIDED else "0.2"  # two seeds are few
    main.main(tiny(tmp_path / "run", *more, "--level", level, "--margin", "0.4"))
    text, log, _ = compile_report(tmp_path, tmp_path / "run")
    assert_clean(log)
    network = "SE-Attention CNN as trained here" if seeds == 1 else "SE-Attention CNN"
    assert f"{network} is {verdict} " in text
    if verdict is Verdict.WORSE:
        assert "Baseline CNN: −" in text  # a minus sign, not a hyphen
    for other in set(Verdict) - {verdict}:
        assert f"{network} is {other}" not in text
    assert "differences of up to 0.4 points" in text
    assert ("One seed can’t speak" in text) == (seeds == 1)
    assert ("speaks of other seeds, tried on these test images" in text) == (seeds == 2)
    assert (" is better than Baseline in " in text) == (seeds == 2)
    assert "Stress tests" not in text and "What the attention learnt" not in text


def readmes_network():
    """The README's example of a third network, as it is written there."""
    text = (ROOT / "README.md").read_text()
    _, block, entry = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = dict(vars(main))
    exec(block, names)
    (network,) = eval(f"[{entry.strip()}]", names)
    return network


def test_the_readmes_network_computes():
    model = build_network(readmes_network(), small_recipe(), classes=10)
    assert model(torch.rand(4, 3, 32, 32)).shape == (4, 10)


@pytest.mark.slow
def test_a_third_network_is_a_class_and_a_line(tmp_path, monkeypatch, sketching):
    """It goes through training, stress tests, tables and figures to the paper; with two seeds,
    people's answers and new test images, so that all sections show."""
    linear = readmes_network()
    load = main.load_data

    def load_with_people(settings):
        data = load(settings)
        labels = data.test.labels
        share = torch.linspace(0.3, 1, len(labels), dtype=torch.float64)
        people = ((1 - share) / 9)[:, None].repeat(1, 10)
        people = people.scatter(1, labels[:, None], share[:, None])
        return dataclasses.replace(data, people=people, new_test=shapes.draw(50, seed=7))

    monkeypatch.setattr(main, "load_data", load_with_people)
    monkeypatch.setattr(main, "NETWORKS", [*main.NETWORKS, linear])
    main.main(tiny(tmp_path / "run", *STRESS, "--seeds", "2"))
    found = comparison(tmp_path / "run")
    assert set(found["networks"]) == set(found["stress"]) == {"baseline", "se_attention", "linear"}
    assert set(found["verdicts"]) == set(found["compared_with_first"]) == {"se_attention", "linear"}
    assert found["stress"]["linear"]["gate_share_stage_3"] <= 1
    for name in ("models/linear_model_seed43.pth", "plots/linear_curves.png",
                 "plots/confusion_matrix_linear.pdf",
                 "gradcam/linear/disc_1.png",
                 "results/linear_classwise_accuracy.json"):  # fmt: skip
        assert (tmp_path / "run" / name).stat().st_size > 100
    summary = (tmp_path / "run" / "results" / "summary.md").read_text()
    assert "Linear CNN is" in summary and "SE-Attention CNN is" in summary
    rows = (tmp_path / "run" / "results" / "people.csv").read_text().splitlines()
    assert "Linear: p (Holm)" in rows[0] and len(rows) == 5
    predictions = (tmp_path / "run" / "results" / "predictions.csv").read_text().splitlines()
    assert "human_label_share,human_class" in predictions[0]
    text, log, pages = compile_report(tmp_path, tmp_path / "run")
    assert_clean(log)
    assert pages <= 12  # with every section that there can be
    assert "Linear has gates of one linear layer after each stage" in text
    for value in (
        found["stress"]["linear"]["corrupted_accuracy"],
        found["stress"]["linear"]["median_epsilon"],
    ):
        assert f"{value:.2f}" in text
    printed = dict(numbers_in_report(found))
    assert len(printed) > 60
    for key, number in printed.items():
        assert number in text or number.replace("−0.00", "0.00") in text, (key, number)
    for key in ("masking", "temperatures"):
        assert found[key] in text.replace("\n", " ")
    assert "Mistakes that people make too." in text and "80 to 95" in text
    assert "From Baseline to Linear the error changes by" in text
    assert "On new images." in text and found["retest"]["said"][:40] in text
    rows = (tmp_path / "run" / "results" / "retest.csv").read_text().splitlines()
    assert len(rows) == 4 and rows[3].startswith("Linear,")
    assert f"{found['networks']['linear']['parameters']:,}" in text


@pytest.mark.slow
def test_five_networks_go_to_page_and_paper(tmp_path, sketching):
    """The controls: their verdicts are corrected over the networks, their tables fit the page."""
    keys = ["baseline", "se_attention", "static_gates", "wide", "se_last"]
    main.main(tiny(tmp_path / "run", *STRESS, "--networks", *keys))
    found = comparison(tmp_path / "run")
    assert list(found["networks"]) == keys and list(found["compared_with_first"]) == keys[1:]
    ps = [one["overall"]["difference"] for one in found["compared_with_first"].values()]
    holm = multipletests([one["p"] for one in ps], method="holm")[1]
    assert [one["p_holm"] for one in ps] == pytest.approx(holm.tolist())
    assert "gate_share_stage_3" in found["stress"]["se_last"]
    assert "gate_share_stage_1" not in found["stress"]["se_last"]
    assert not any("gate_share" in key for key in found["stress"]["static_gates"])
    rows = (tmp_path / "run" / "results" / "networks.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [
        found["networks"][key]["title"] for key in keys
    ]
    page = (tmp_path / "run" / "results" / "report.html").read_text()
    text, log, pages = compile_report(tmp_path, tmp_path / "run")
    assert_clean(log)
    assert pages <= 10
    for key in keys:
        network = found["networks"][key]
        assert network["title"] in page and f"{network['title']} has {network['about']}" in text
        assert f"{network['parameters']:,}" in text
    assert found["conclusion"] in text.replace("−", "-")
    assert "A star: the paired change from Baseline is beyond chance" in text


@pytest.mark.slow
def test_the_report_says_what_to_run_and_compiles_when_that_is_done(made_tiny_run, tmp_path):
    """latexmk must notice results that appear, and a paper on shapes beside one on CIFAR-10."""
    if not shutil.which("latexmk"):
        pytest.skip("latexmk is not installed")
    shutil.copy(ROOT / "report.tex", tmp_path)
    for job, run, more in (
        ("report", "output", []),
        ("shapes", "output/shapes", ["-jobname=shapes"]),
    ):
        command = ["latexmk", "-pdf", "-interaction=nonstopmode", *more, "report.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0 and 'run "python main.py" first' in done.stdout
        assert not (tmp_path / f"{job}.pdf").exists()
        shutil.copytree(made_tiny_run, tmp_path / run)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and (tmp_path / f"{job}.pdf").exists(), done.stdout[-3000:]
        assert f"{run}/results/report_values.tex" in (tmp_path / f"{job}.fls").read_text()
