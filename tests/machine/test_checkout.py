"""Which commit runs: of a checkout, of a changed one, and of none."""

import subprocess

import pytest

from lab.machine import checkout


@pytest.fixture
def folder(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "main.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    return tmp_path


def test_a_checkout_has_its_commit(folder):
    name = checkout.commit_of(folder)
    head = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout
    assert len(name) >= 4 and head.startswith(name)
    (folder / "output").write_text("what a run leaves")
    assert checkout.commit_of(folder) == name
    (folder / "main.py").write_text("2")
    assert checkout.commit_of(folder) == f"{name}, changed"


def test_what_is_none_has_none(folder, monkeypatch):
    (folder / "inside").mkdir()
    assert checkout.commit_of(folder / "inside") == ""  # of another project, perhaps
    monkeypatch.setenv("PATH", "")
    assert checkout.commit_of(folder) == ""
