"""Which commit of the program runs.

In comes the program's folder; out comes the commit's short name.
"""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit_of(folder: Path) -> str:
    """The commit that is checked out there, "…, changed" where files differ from it.

    "" where the folder is no checkout, or there is no git.
    """
    name = ask_git(folder, "rev-parse", "--short", "HEAD")
    if name and ask_git(folder, "status", "--porcelain", "--untracked-files=no"):
        return f"{name}, changed"
    return name


def ask_git(folder: Path, *words: str) -> str:
    """What git says; "" where it can't."""
    if not (folder / ".git").exists():  # it may lie in someone else's checkout
        return ""
    command = ["git", "-C", str(folder), *words]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.strip()
