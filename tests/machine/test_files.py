"""Files whole or not at all, locks, and the list of results: odd file systems, killed runs."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import KEYS, STRESS, refused, tiny

import main
from lab.machine import files
from lab.machine.files import ResultFiles
from lab.machine.options import UserError
from lab.report import writer


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_at_once(tmp_path, monkeypatch, capsys, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    message = refused(capsys, *tiny(tmp_path))
    assert f"the file system of {tmp_path} has no locks" in message
    assert os.strerror(number) in message and "choose" in message
    assert "in use" not in message
    arguments = ["--data-dir", str(tmp_path), "--output-dir", str(tmp_path)]
    assert "has no locks" in refused(capsys, *arguments)


def test_a_folder_in_use_is_named_with_who_uses_it(tmp_path, capsys):
    with files.hold_folder(tmp_path):
        message = refused(capsys, *tiny(tmp_path))
    assert f"{tmp_path} is in use by process {os.getpid()} on " in message
    with files.hold_folder(tmp_path):
        assert (tmp_path / ".held_by").exists()


def test_a_file_that_is_open_elsewhere_is_replaced_when_it_is_closed(tmp_path, monkeypatch):
    """As on Windows, where a virus scanner holds a file for a moment."""
    real, refusals = Path.replace, [PermissionError(13, "in use")] * 3

    def replace(self, target):
        if refusals:
            raise refusals.pop()
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    files.write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and not refusals


def test_a_file_that_stays_open_elsewhere_ends_in_a_line(tmp_path, monkeypatch, capsys):
    def replace(self, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(files, "PATIENCE", 0.2)
    monkeypatch.setattr(Path, "replace", replace)
    since = time.monotonic()
    assert "Permission denied" in refused(capsys, *tiny(tmp_path))
    assert time.monotonic() - since < 30
    assert not list(tmp_path.rglob("*.tmp"))


def test_only_what_is_ones_own_is_cleaned(tmp_path, undrawn):
    """Another live run may be writing in a folder below, and even a live process in this one."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    others = tmp_path / "shapes" / "models" / f".baseline_model.pth.{gone.pid}.tmp"
    lives = tmp_path / "models" / f".baseline_model.pth.{os.getppid()}.tmp"
    mine = tmp_path / "models" / f".baseline_model.pth.{gone.pid}.tmp"
    same = tmp_path / "models" / f".se_attention_model_resume.pth.{os.getpid()}.tmp"
    drawn = tmp_path / "plots" / f".robustness.png.{gone.pid}.tmp"
    overlay = tmp_path / "gradcam" / "baseline" / f".disc_1.png.{gone.pid}.tmp"
    foreign = tmp_path / ".someones.file.tmp"  # of another program
    for path in (others, lives, mine, same, drawn, overlay, foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    main.main(tiny(tmp_path))
    assert others.exists() and lives.exists() and foreign.exists()
    for path in (mine, same, drawn, overlay):
        assert not path.exists()


def test_a_file_that_cannot_be_written_is_named_when_the_others_are_there(tmp_path):
    (tmp_path / "plots" / "a.png").mkdir(parents=True)
    made = ResultFiles(tmp_path)
    for name in ("results/b.md", "plots/a.png", "results/c.json"):
        made.write(name, name)
    with pytest.raises(UserError, match=r"plots/a\.png \(Is a directory\)") as raised:
        made.finish()
    for name in ("results/b.md", "results/c.json"):
        assert (tmp_path / name).read_text() == name and name not in str(raised.value)
    listed = json.loads((tmp_path / "results" / "files.json").read_text())
    assert listed == ["plots/a.png", "results/b.md", "results/c.json"]


@pytest.mark.slow
def test_a_file_that_cannot_be_written_keeps_no_other_from_it(
    made_tiny_run, tmp_path, capsys, sketching
):
    shutil.copytree(made_tiny_run / "models", tmp_path / "models")
    blocked = ["plots/accuracy_comparison.pdf", "results/summary.md", "gradcam/baseline/disc_1.png"]
    blocked += ["results/files.json"]
    for name in blocked:
        (tmp_path / name).mkdir(parents=True)
    message = refused(capsys, *tiny(tmp_path, *STRESS))
    assert "Is a directory" in message and "mend that and run again" in message
    expected = {*json.loads((made_tiny_run / "results" / "files.json").read_text()), blocked[-1]}
    assert expected > set(blocked)
    for name in expected:
        assert (name in message) == (name in blocked)
        assert (tmp_path / name).is_file() == (name not in blocked)


def test_what_was_not_made_again_does_not_stay(tmp_path):
    """Whether the run that made it ended or was killed; what someone put there is left alone."""
    for has_ended in (True, False):
        before = ResultFiles(tmp_path)
        for name in ("plots/again.png", "plots/once.png", "gradcam/baseline/once.png"):
            before.write(name, "old")
        if has_ended:
            before.finish()
        (tmp_path / "plots" / "mine.png").write_text("mine")
        after = ResultFiles(tmp_path)
        after.write("plots/again.png", "new")
        after.finish()
        there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
        assert there == {"plots/again.png", "plots/mine.png", "results/files.json"}
        assert (tmp_path / "plots" / "mine.png").read_text() == "mine"
        listed = json.loads((tmp_path / "results" / "files.json").read_text())
        assert listed == ["plots/again.png"]


@pytest.mark.slow
def test_what_a_run_did_not_make_does_not_stay(made_tiny_run, tiny_run, sketching):
    """Another seed without stress tests, fewer pictures; what someone put there is left alone."""
    output = tiny_run
    (output / "plots" / "mine_curves.png").write_text("mine")
    main.main(tiny(output, "--retrain", "--seed", "7", "--gradcam-images", "1"))
    for name in ("results/robustness.json", "plots/robustness.png", "plots/attacks.pdf",
                 "plots/gradcam_disc_2.png", "gradcam/baseline/disc_2.png"):  # fmt: skip
        assert (made_tiny_run / name).exists() and not (output / name).exists()
    assert (output / "plots" / "mine_curves.png").read_text() == "mine"
    assert (output / "plots" / "gradcam_disc_1.png").exists()
    listed = json.loads((output / "results" / "files.json").read_text())
    there = [path for path in output.rglob("[!.]*") if path.is_file()]
    there = {path.relative_to(output).as_posix() for path in there}
    models = {f"models/{key}_model{of_seed}.pth" for key in KEYS for of_seed in ("", "_seed7")}
    measured = {f"measured/{key}_seed42.pth" for key in KEYS}
    assert there == {*listed, *models, *measured, "results/files.json", "plots/mine_curves.png"}


@pytest.mark.slow
def test_what_a_killed_run_made_does_not_stay_either(tmp_path, monkeypatch, sketching):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(writer, "write_report", killed)
        main.main(tiny(tmp_path))
    assert (tmp_path / "plots" / "gradcam_disc_2.png").exists()
    main.main(tiny(tmp_path, "--gradcam-images", "1"))
    assert not (tmp_path / "plots" / "gradcam_disc_2.png").exists()


PRECIOUS = '["../precious", "plots/../../precious", "{outside}", "models/baseline_model.pth"]'


@pytest.fixture(params=["", "{", "7", PRECIOUS])
def damaged(request, tmp_path):
    """A folder of results with a damaged list, beside a file that it may name."""
    (tmp_path / "precious").write_text("mine")
    output = tmp_path / "run"
    (output / "results").mkdir(parents=True)
    content = request.param.replace("{outside}", str(tmp_path / "precious"))
    (output / "results" / "files.json").write_text(content)
    return output


def test_a_damaged_list_of_files_deletes_nothing_elsewhere(damaged):
    files.write_file(damaged / "models" / "baseline_model.pth", "weights")
    made = ResultFiles(damaged)
    made.write("results/summary.md", "found")
    made.finish()
    assert (damaged.parent / "precious").read_text() == "mine"
    assert (damaged / "models" / "baseline_model.pth").exists()
    listed = json.loads((damaged / "results" / "files.json").read_text())
    assert listed == ["results/summary.md"]


@pytest.mark.slow
def test_a_run_over_a_damaged_list_of_files_deletes_nothing_elsewhere(damaged, undrawn):
    main.main(tiny(damaged))
    assert (damaged.parent / "precious").read_text() == "mine"
    assert (damaged / "models" / "baseline_model.pth").exists()


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    files.write_file(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        files.write_file(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_json_has_not_is_not_written():
    for value in (float("nan"), float("inf"), np.array([1.0, np.nan])):
        with pytest.raises(ValueError):
            files.as_json({"value": value})
