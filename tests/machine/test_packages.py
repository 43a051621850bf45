"""TODO machine/test_packages.py"""

import ast
import re
import runpy
import subprocess
import sys

import joblib
import pytest
from helpers import MAIN, run_main


def test_an_old_python_is_told_so():
    """The line stands before all that an old one would stumble over."""
    head = MAIN.read_text().split("import copy\n")[0].replace("(3, 11)", "(4, 0)")
    done = subprocess.run([sys.executable, "-c", head], capture_output=True, text=True)
    assert done.returncode == 1 and "needs Python" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("missing", ["cv2", "tabulate", "jinja2", "torch"])
def test_a_missing_package_is_told_before_anything_else(tmp_path, missing):
    """As in a shell without the environment; pandas wants two of these only after training."""
    stop = "raise ImportError('No module named ' + __name__, name=__name__)"
    (tmp_path / f"{missing}.py").write_text(stop)
    run = run_main("--help", PYTHONPATH=str(tmp_path))
    (line,) = run.stderr.splitlines()
    assert run.returncode == 1 and run.stdout == ""
    assert f"(No module named {missing})" in line and "pip install -r requirements.txt" in line


def test_an_interrupt_before_the_run_ends_in_a_line(tmp_path, monkeypatch):
    """While packages are imported, which takes seconds, or the machine is prepared."""
    (tmp_path / "tabulate.py").write_text("raise KeyboardInterrupt")
    run = run_main("--help", PYTHONPATH=str(tmp_path))
    assert run.returncode == 1 and run.stderr == "main.py: interrupted\n"

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(joblib, "cpu_count", interrupt)
    monkeypatch.setattr(sys, "argv", ["main.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"main\.py: interrupted"):
        runpy.run_path(str(MAIN), run_name="__main__")


def test_requirements_are_those_that_are_imported():
    """Each package that main.py imports has a lower bound, and no other."""
    text = (MAIN.parent / "requirements.txt").read_text()
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", text, re.MULTILINE))
    assert len(bounds) == len(text.split())
    imported = set()
    for node in ast.walk(ast.parse(MAIN.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    names = {"cv2": "opencv-python-headless", "PIL": "pillow", "sklearn": "scikit-learn"}
    packages = {names.get(name, name) for name in imported - set(sys.stdlib_module_names)}
    assert packages == set(bounds)
