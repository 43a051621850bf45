"""What the README and the report promise: commands that run as written, a paper that compiles whatever was found."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import STRESS, tiny

import main

ROOT = Path(__file__).parents[1]
SMALL = "--dataset shapes --shapes-train 300 --shapes-test 100 --epochs 2 --batch-size 64 --widths 16 16 32"
SMALL += f" --data-dir nothing_here {' '.join(STRESS)}"


def commands():
    """The README's shell blocks, but for the one that CI itself starts with."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block for block in blocks if "pytest" not in block]


@pytest.mark.clone
def test_the_readmes_commands_run_in_a_fresh_clone(tmp_path):
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    script = "set -e\n" + "".join(commands())
    script = script.replace("main.py\n", f"main.py {SMALL} --output-dir output\n").replace(
        "main.py --", f"main.py {SMALL} --"
    )
    if not shutil.which("latexmk"):
        script = re.sub(r"^latexmk.*\n", "", script, flags=re.MULTILINE)
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path / "clone", env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if shutil.which("latexmk"):
        assert all((tmp_path / "clone" / name).stat().st_size > 100_000 for name in ("report.pdf", "shapes.pdf"))


def test_the_readme_names_every_option():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"--([a-z][a-z-]+)", text))
    options = {name.replace("_", "-") for name in main.Settings.__dataclass_fields__}
    assert named - options <= {"help", "nproc-per-node", "nnodes", "index-url"}
    assert {"seeds", "stress", "data-dir", "output-dir", "device", "precision", "retrain", "mirror"} <= named


def test_the_readmes_pictures_are_small():
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert shown and sum((ROOT / name).stat().st_size for name in shown) < 1_000_000


# The report


def compile_report(folder, run):
    """Compile a copy of the report from a run's output: its text, its log and its number of pages."""
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
    return " ".join(text.split()), log, int(re.search(r"Output written on report\.pdf \((\d+) pages", log)[1])


def assert_clean(log):
    assert "undefined" not in log
    widths = [float(width) for width in re.findall(r"Overfull \\[hv]box \(([\d.]+)pt", log)]
    assert max(widths, default=0) <= 2


def test_the_report_compiles_clean(tiny_run, tmp_path):
    text, log, pages = compile_report(tmp_path, tiny_run)
    assert_clean(log)
    assert 6 <= pages <= 10
    found = json.loads((tiny_run / "results" / "comparison.json").read_text())
    assert f"{found['networks']['baseline']['accuracy']:.2f}" in text
    assert "Shapes" in text and "They are drawn by main.py itself" in text and "CIFAR-10 for" not in text
    assert "one seed can’t speak for the architecture" in text


class Blind(main.BaselineCNN):
    def classify(self, features):
        return self.classifier(0 * features.mean((2, 3)))


@pytest.mark.parametrize(("verdict", "seeds"), [("worse than", 1), ("not distinguishable from", 1), ("better than", 2)])
def test_the_reports_text_is_right_whichever_way_it_fell(tmp_path, monkeypatch, verdict, seeds):
    """SE blocks that shut every gate, that leave all as it is, and beside a Baseline that sees nothing."""
    if verdict.startswith("better"):
        monkeypatch.setitem(main.NETWORKS, "baseline", Blind)
    else:
        monkeypatch.setattr(main.SEBlock, "forward", lambda block, x: x * (0 if verdict.startswith("worse") else 1))
    more = ["--epochs", "4", "--shapes-train", "1000", "--shapes-test", "200", "--seeds", str(seeds)]
    main.main(tiny(tmp_path / "run", *more, "--level", "0.2"))  # two seeds are few for a t test
    text, log, _ = compile_report(tmp_path, tmp_path / "run")
    assert_clean(log)
    assert f"SE-Attention CNN is {verdict} Baseline CNN" in text
    assert ("Baseline CNN: −" in text) == (verdict == "worse than")  # a minus sign, not a hyphen
    for other in {"worse than", "not distinguishable from", "better than"} - {verdict}:
        assert f"CNN is {other}" not in text
    assert ("one seed can’t speak" in text) == (seeds == 1) and ("Resampling both seeds" in text) == (seeds == 2)
    assert "Stress tests" not in text and "What the SE blocks learnt" not in text


def test_the_report_says_what_to_run_and_compiles_when_that_is_done(tiny_run, tmp_path):
    """latexmk must notice results that appear, and a paper on shapes beside one on CIFAR-10."""
    if not shutil.which("latexmk"):
        pytest.skip("latexmk is not installed")
    shutil.copy(ROOT / "report.tex", tmp_path)
    for job, run, more in (("report", "output", []), ("shapes", "output/shapes", ["-jobname=shapes"])):
        command = ["latexmk", "-pdf", "-interaction=nonstopmode", *more, "report.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0 and 'run "python main.py" first' in done.stdout
        assert not (tmp_path / f"{job}.pdf").exists()
        shutil.copytree(tiny_run, tmp_path / run)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and (tmp_path / f"{job}.pdf").exists(), done.stdout[-3000:]
        assert f"{run}/results/report_values.tex" in (tmp_path / f"{job}.fls").read_text()
