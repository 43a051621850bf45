"""The README: its commands and code run as written, and each of its numbers is a run's."""

import ast
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, STRESS, look_up, run_record, tiny
from PIL import Image

import main
from lab.data import shapes
from lab.machine.options import settings_by_flag
from lab.measure import statistics
from lab.measure.comparison import probability_within
from lab.measure.statistics import MeanSquares, SeedsAndImages

SMALL = "--dataset shapes --shapes-train 300 --shapes-test 100 --epochs 2 --batch-size 64"
SMALL += f" --widths 16 16 32 --data-dir nothing_here {' '.join(STRESS)}"
SMALL += " --gradcam-images 1"


def commands():
    """The README's shell blocks, but for the one that CI itself starts with."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block for block in blocks if "pytest" not in block]


def put_packages(environment):
    """Into a new virtual environment what CI has just installed from requirements.txt, and no more.

    So that the README's pip finds it there; without CI it installs all of it.
    """
    if "INSTALLED_BY_CI" not in os.environ:
        return
    installed = Path(os.environ["INSTALLED_BY_CI"])
    subprocess.run(["python3", "-m", "venv", str(environment)], check=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    shutil.rmtree(packages)
    shutil.copytree(installed / packages.relative_to(environment), packages, copy_function=os.link)
    for script in (installed / "bin").iterdir():
        here = environment / "bin" / script.name
        if not here.exists() and script.read_bytes().startswith(b"#!"):
            _, _, code = script.read_text().partition("\n")
            here.write_text(f"#!{environment}/bin/python\n{code}")
            here.chmod(0o755)


@pytest.mark.clone
def test_the_readmes_commands_run_in_a_fresh_clone(tmp_path):
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    put_packages(tmp_path / "clone" / ".venv")
    script = "set -e\n" + "".join(commands())
    script = script.replace("main.py\n", f"main.py {SMALL} --output-dir output\n")
    # What the first command has drawn, and tried whole, the others need not again.
    others = f"tests/sketching_main.py {SMALL} --stress quick"
    script = script.replace("main.py --", f"{others} --")
    if not shutil.which("latexmk"):
        script = re.sub(r"^latexmk.*\n", "", script, flags=re.MULTILINE)
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path / "clone", env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if shutil.which("latexmk"):
        assert (tmp_path / "clone" / "report.pdf").stat().st_size > 100_000
        assert (tmp_path / "clone" / "shapes.pdf").stat().st_size > 100_000


def test_the_readme_names_every_option():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"--([a-z][a-z-]+)", text))
    options = {name.replace("_", "-") for name in settings_by_flag(main.Settings())}
    assert named - options <= {"help", "nproc-per-node", "nnodes", "index-url"}
    assert {
        "seeds",
        "stress",
        "data-dir",
        "output-dir",
        "device",
        "precision",
        "retrain",
        "mirror",
    } <= named


def test_the_readmes_python_runs(made_tiny_run, tmp_path, monkeypatch, capsys):
    code, _, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    picture = tmp_path / "cat.jpg"
    Image.fromarray(shapes.draw(1, 0).pixels[0].numpy()).resize((90, 60)).save(picture)
    of_this_run = tiny(made_tiny_run)
    code = code.replace("parse_settings([])", f"parse_settings({of_this_run})")
    code = code.replace('classify("cat.jpg")', f'classify("cat.jpg", *{of_this_run})')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (1, 10) and names["network"].network.key == "se_attention"
    said = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert list(said) == ["baseline", "se_attention"]
    likeliest = next(iter(said["se_attention"]))
    assert list(shapes.SHAPES)[names["logits"].argmax()] == likeliest
    for chances in said.values():
        assert sum(chances.values()) == pytest.approx(1) and len(chances) == 10
        assert sorted(chances.values(), reverse=True) == list(chances.values())


@pytest.mark.slow
def test_the_readmes_cells_run_in_a_shell(tmp_path):
    """Those for Colab, with this repository as the address, and without installing anything."""
    (cells,) = re.findall(r"```\n(!git.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for cell in cells.splitlines():
        command = cell.removeprefix("!").replace("ADDRESS", str(ROOT))
        command = command.replace("pip install -q -r", "ls").replace("zip -qr", "ls")
        command = command.replace("main.py", f"tests/sketching_main.py {SMALL} --output-dir output")
        command = command.replace("../results.zip ", "").replace("python ", f"{sys.executable} ")
        subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True, capture_output=True)
    summary = tmp_path / "se-attention" / "output" / "results" / "summary.md"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", summary.read_text()):
        assert (summary.parent / picture).exists()


def test_the_readmes_pictures_are_small():
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert shown and sum((ROOT / name).stat().st_size for name in shown) < 1_000_000


TEN_SEEDS = ("amx_ten_seeds", "zen5_ten_seeds", "h200_ten_seeds")


def p_of_run(run):
    """Of no difference between the two networks."""
    return look_up(run_record(run), "compared_with_first/se_attention/overall/difference/p")


@functools.cache
def with_recomputed(run):
    """A run's record; of one of ten seeds also what today's tests make of its accuracies.

    Where the images' part in the error is needed, from the spread that the record holds: how much
    the image counts that counts most is not known, and taken for a whole one.
    """
    record = run_record(run)
    if not run.endswith("ten_seeds"):
        return record
    seeds = len(record["networks"]["baseline"]["runs"])
    accuracy = {}
    for key, network in record["networks"].items():
        accuracy[key] = np.array([one["accuracy"] for one in network["runs"]])
    change = accuracy["se_attention"] - accuracy["baseline"]
    images = record["images"]["test"]
    overall = look_up(record, "compared_with_first/se_attention/overall")
    spread = overall["over_seeds"]["spread"]
    test = statistics.t_test(change, 100 / images, spread["of_few_images"] / np.sqrt(seeds))
    difference = statistics.judge_by(test, statistics.Settings())
    assert difference.interval.low == pytest.approx(overall["difference"]["interval"]["low"])
    assert difference.margin_p == pytest.approx(overall["difference"]["margin_p"])
    of_rest = spread["of_few_images"] ** 2 * images
    squares = MeanSquares(
        seeds=seeds,
        images=images,
        mean=test.mean,
        of_seeds=spread["standard_deviation"] ** 2 * images,
        of_images=max(of_rest, spread["error_of_images"] ** 2 * seeds * images),
        of_rest=of_rest,
        largest=100,
    )
    both = SeedsAndImages(
        test.mean, squares.error_of_seeds(), seeds, squares.error_of_images(), images
    )
    recomputed = {
        "smallest_margin": difference.smallest_margin,
        "p_of_three_runs": min(statistics.holm([p_of_run(one) for one in TEN_SEEDS])),
        "seeds_and_images": dataclasses.asdict(both.interval(0.95)),
        "effect_size": test.mean / test.standard_deviation,
        "probability_within": [probability_within(at, test) for at in (0.5, 0.25, 0.1)],
    }
    return {**record, "recomputed": recomputed}


def listed_numbers():
    """The README's as docs/numbers.md lists them, in its order, each equal to its run's."""
    page = (ROOT / "docs" / "numbers.md").read_text()
    row = r"^\| ([\d.,+-]+)( s| min| GB)? \| (\w+) \| (.+) \|$"
    for number, unit, run, keys in re.findall(row, page, re.MULTILINE):
        value = sum(look_up(with_recomputed(run), key) for key in keys.split(" + "))
        if unit == " min":
            value /= 60
        sign = "+" if number[0] in "+-" else ""
        digits = len(number.partition(".")[2])
        assert number == format(value, f"{sign},.{digits}f"), (number, unit, run, keys)
        yield number + unit


NO_RESULTS = {"0.5", "0.25", "0.1", "0.0001"}  # bounds of differences, and the least p


def test_each_number_of_the_readme_is_a_runs():
    """Of its first lines and of docs/results.md: listed with their source, and equal to it."""
    text = (ROOT / "README.md").read_text()
    first_lines = text[: text.index("## Set up and run")]
    results = (ROOT / "docs" / "results.md").read_text()
    number = r"(?<![\w.-])[+-]?\d[\d,]*\.\d+(?![\w.])"
    given = set(re.findall(number, first_lines + results))
    given -= set(re.findall(rf"PyTorch ({number})", results))
    listed = set(listed_numbers())
    assert len(given) > 40 and given <= listed | NO_RESULTS, given - listed


def test_each_time_in_the_readme_was_taken():
    """Also the memory: all are listed in the order in which they stand there."""
    text = (ROOT / "README.md").read_text()
    times = re.search(r"\n## How long it takes\n.*?\n## ", text, re.DOTALL)[0]
    given = re.findall(r"[\d.]+ (?:s|min|GB)\b", times)
    given.remove("62 s")  # numbers.md says why
    assert len(given) > 8 and given == [one for one in listed_numbers() if " " in one]


def test_the_architecture_names_every_room():
    """In the order in which they may use each other, as pyproject.toml holds it."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    for wing in ("report", "measure", "data", "machine"):
        (row,) = re.findall(rf"^\| `lab/{wing}` \| (.*) \|$", page, re.MULTILINE)
        named = re.findall(r"`(\w+)`", row)
        there = {path.stem for path in (ROOT / "lab" / wing).glob("*.py")} - {"__init__"}
        assert set(named) == there, wing
        (layers,) = [
            one["layers"]
            for one in contracts["contracts"]
            if one.get("containers") == [f"lab.{wing}"]
        ]
        assert named == re.findall(r"\w+", " ".join(layers))
    for name in re.findall(r"`(lab/\w+/\w+\.py)`", page):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
