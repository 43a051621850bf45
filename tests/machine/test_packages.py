"""Packages that are missing or broken: one line, before any work; and what is asked of pip."""

import ast
import re
import runpy
import subprocess
import sys

import joblib
import pytest
from helpers import MAIN, SKETCHING, refused, run_main, tiny

import main
from lab.machine import packages


def test_an_old_python_is_told_so():
    """The line stands before all that an old one would stumble over."""
    head = MAIN.read_text().split("import dataclasses\n")[0].replace("(3, 11)", "(4, 0)")
    done = subprocess.run([sys.executable, "-c", head], capture_output=True, text=True)
    assert done.returncode == 1 and "needs Python" in done.stderr
    assert len(done.stderr.splitlines()) == 1


ABSENT = """
from importlib.machinery import PathFinder

real = PathFinder.find_spec

def find_spec(finder, name, *more):
    return None if name == "{name}" else real(name, *more)

PathFinder.find_spec = classmethod(find_spec)
"""


def without(name, tmp_path):
    """The environment of a Python that does not find a module, though it is installed."""
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(name=name))
    return {"PYTHONPATH": str(tmp_path)}


def assert_told(line, problem):
    assert f"main.py can't import what it needs ({problem}): " in line
    assert "pip install -r requirements.txt" in line


def assert_ends_in_a_line(run, problem):
    (line,) = run.stderr.splitlines()
    assert run.returncode == 1 and run.stdout == ""
    assert_told(line, problem)


@pytest.mark.parametrize("missing", ["cv2", "tabulate", "jinja2", "torch"])
def test_a_missing_package_is_told_before_anything_else(tmp_path, missing):
    """As in a shell without the environment; pandas wants two of these only after training."""
    run = run_main("--help", **without(missing, tmp_path))
    assert_ends_in_a_line(run, f"No module named {missing}")


PROBLEM = "libmissing.so.1: cannot open shared object file"


@pytest.fixture
def broken(tmp_path):
    """Breaks a package, which is there and can't be imported; gives the folder that does it."""

    def make(name):
        folder = tmp_path / "packages"
        folder.mkdir()
        (folder / f"{name}.py").write_text(f"raise ImportError({PROBLEM!r})")
        return str(folder)

    return make


def test_a_broken_package_is_told_before_any_work(broken, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(broken("tabulate"))
    monkeypatch.delitem(sys.modules, "tabulate", raising=False)
    assert_told(refused(capsys, *tiny(tmp_path / "output", "--precision", "fp32")), PROBLEM)
    assert not (tmp_path / "output").exists()


def test_a_broken_package_that_only_cifar10_needs_is_told_before_any_training(
    broken, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(broken("torchvision"))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(main, "train_all", None)  # calling it would fail
    places = ["--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "output")]
    assert_told(refused(capsys, *places, "--precision", "fp32"), PROBLEM)


@pytest.mark.slow
def test_drawn_shapes_do_without_what_only_cifar10_needs(broken, tmp_path):
    """It brings PyTorch's compiler, which takes seconds to import."""
    arguments = tiny(tmp_path, "--precision", "fp32", "--stress", "quick")
    run = run_main(*arguments, program=SKETCHING, PYTHONPATH=broken("torchvision"))
    assert run.returncode == 0, run.stderr


def test_a_broken_package_that_help_needs_is_told_at_once(broken):
    assert_ends_in_a_line(run_main("--help", PYTHONPATH=broken("numpy")), PROBLEM)


@pytest.mark.slow
def test_help_does_without_what_only_a_run_needs(broken):
    run = run_main("--help", PYTHONPATH=broken("tabulate"))
    assert run.returncode == 0 and "--batch-size" in run.stdout


def test_a_broken_import_of_our_own_keeps_its_traceback(tmp_path):
    """To install packages would not mend it."""
    run = run_main("--help", **without("lab.data.images", tmp_path))
    assert run.returncode == 1 and "Traceback" in run.stderr and "pip install" not in run.stderr
    assert run.stderr.endswith("ModuleNotFoundError: No module named 'lab.data.images'\n")


@pytest.mark.parametrize("name", ["lab", "lab.report.tables", "main"])
def test_what_is_our_own_is_known_by_its_name(name):
    error = ImportError("cannot import name 'it'", name=name)
    with pytest.raises(ImportError) as raised:
        packages.end_unless_ours(error)
    assert raised.value is error
    for others in (None, "labels", f"other.{name}"):
        with pytest.raises(SystemExit, match=r"cannot import name 'it'.* pip install"):
            packages.end_unless_ours(ImportError("cannot import name 'it'", name=others))


def test_an_interrupt_before_the_run_ends_in_a_line(tmp_path, monkeypatch):
    """While packages are imported, which takes seconds, or the machine is prepared."""
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")
    run = run_main("--help", PYTHONPATH=str(tmp_path))
    assert run.returncode == 1 and run.stderr == "main.py: interrupted\n"

    def interrupt(*_):
        raise KeyboardInterrupt

    arguments = ["main.py", *tiny(tmp_path, "--precision", "fp32", "--device", "cpu")]
    monkeypatch.setattr(sys, "argv", arguments)
    for place in ((packages, "import_all"), (joblib, "cpu_count")):
        with monkeypatch.context() as patch:
            patch.setattr(*place, interrupt)
            with pytest.raises(SystemExit, match=r"main\.py: interrupted"):
                runpy.run_path(str(MAIN), run_name="__main__")


def names_imported(path):
    """The packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_requirements_are_those_that_are_imported():
    """Each package that main.py and its rooms import has a lower bound, and no other."""
    text = (MAIN.parent / "requirements.txt").read_text()
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", text, re.MULTILINE))
    assert len(bounds) == len(text.split())
    rooms = list((MAIN.parent / "lab").rglob("*.py"))
    assert len(rooms) > 30
    imported = {name for path in (MAIN, *rooms) for name in names_imported(path)}
    imported |= {"jinja2", "tabulate"}  # by pandas, to write LaTeX and Markdown
    imported -= {"pillow_heif"}  # used where it is installed
    imported -= {"lab", *sys.stdlib_module_names}
    assert imported == set(packages.NEEDED) and len(packages.NEEDED) == len(imported)
    names = {"cv2": "opencv-python-headless", "PIL": "pillow", "sklearn": "scikit-learn"}
    assert {names.get(name, name) for name in imported} == set(bounds)
