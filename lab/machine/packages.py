"""Other people's packages: whether they are there, and one line where one can't be imported.

The slow ones (torchvision, SciPy's statistics, statsmodels, scikit-learn, pandas, seaborn) are
imported by the functions that use them, so that --help need not wait for them. `import_all` brings
them in at once, before hours of work that would miss one at their end; torchvision comes with
CIFAR-10.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import NoReturn

from lab.machine.options import PROGRAM

# By the names that they are imported by; pandas writes LaTeX with jinja2, and Markdown with
# tabulate.
NEEDED = (
    "cv2", "filelock", "jinja2", "joblib", "matplotlib", "numpy", "pandas", "PIL", "requests",
    "scipy", "seaborn", "sklearn", "statsmodels", "tabulate", "torch", "torchvision", "tqdm",
    "tyro",
)  # fmt: skip

WITH_CIFAR10 = "torchvision"  # whose import takes seconds, as it brings PyTorch's compiler
OWN = ("lab", "main")


def refuse_missing() -> None:
    """One line, and exit status 1, where a package is not installed; imports none of them."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            end_without(f"No module named {name}")


def import_all() -> None:
    """Import every package that each run needs."""
    for name in NEEDED:
        if name != WITH_CIFAR10:
            import_one(name)


def import_one(name: str) -> None:
    """Import a package; one line, and exit status 1, where it is there and can't be imported."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        end_without(str(error))


def end_unless_ours(error: ImportError) -> NoReturn:
    """One line, and exit status 1, unless what can't be imported is the program's own part."""
    if (error.name or "").partition(".")[0] in OWN:
        raise error
    end_without(str(error))


def end_without(problem: str) -> NoReturn:
    """The line in which a program ends that lacks a package."""
    sys.exit(
        f"{PROGRAM} can't import what it needs ({problem}): activate the environment that has it, "
        "or pip install -r requirements.txt (see the README's Troubleshooting)"
    )
