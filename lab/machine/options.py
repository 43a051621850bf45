"""What a person may set: ranges of numbers, their check, and how settings are called.

In come frozen dataclasses whose numbers are annotated with the range that is allowed. Out come
their values by the name of the command-line option, or one line on stderr that names the option.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import tyro

PROGRAM = "main.py"  # whose options these are, as messages begin


class UserError(Exception):
    """Something the person at the keyboard can mend; ends in one line, never in a traceback."""


@dataclass(frozen=True)
class Between:
    """The range of a number in the settings, both ends allowed; of each number in a tuple."""

    least: float
    most: float = 1e9


Count = Annotated[int, Between(1)]
ImageCount = Annotated[int, Between(1, 1e6)]  # a million images are 3 GB
Seed = Annotated[int, Between(0)]
Share = Annotated[float, Between(0, 1)]
Rate = Annotated[float, Between(1e-9)]
Momentum = Annotated[float, Between(0, 0.999)]
Seconds = Annotated[float, Between(0.01)]


def without_it(kind: str, what: str) -> Any:
    """How --help shows an option that has no value unless it is given: of which kind it is, and
    what is done without it."""
    return tyro.conf.arg(metavar=kind, help_behavior_hint=f"(default: {what})")


def settings_by_flag(settings: Any) -> dict[str, object]:
    """Each setting under the name of its command-line option; nested dataclasses are laid flat."""
    values: dict[str, object] = {}
    for setting in dataclasses.fields(settings):
        value = getattr(settings, setting.name)
        if dataclasses.is_dataclass(value):
            values.update(settings_by_flag(value))
        else:
            values[setting.name] = list(value) if isinstance(value, tuple) else value
    return values


def command_line(settings: Any, usual: Any, without: Sequence[str]) -> str:
    """What is typed for these settings where they are not the usual ones; but some options."""
    usual_values = settings_by_flag(usual)
    words = ["python", PROGRAM]
    for name, value in settings_by_flag(settings).items():
        if name in without or value == usual_values[name]:
            continue
        words.append(option_of(name))
        if isinstance(value, list):
            words += [str(one) for one in value]
        elif not isinstance(value, bool):
            words.append(str(value))
    return " ".join(words)


def option_of(setting: str) -> str:
    """A setting's name as it is typed: "data_dir" is --data-dir."""
    return f"--{setting.replace('_', '-')}"


def expand_home(option: str, folder: Path) -> Path:
    """A leading ~ as the home folder: shells leave it alone in --data-dir=~/x."""
    try:
        return folder.expanduser()
    except RuntimeError as error:
        refuse(option, f"{folder}: {error}")


def refuse(option: str, problem: str) -> NoReturn:
    """End the program, whose option has a value that it can't have."""
    end_usage(f"argument {option_of(option)}: {problem}")


def end_usage(problem: str) -> NoReturn:
    """One line on stderr, and the exit status of a usage error."""
    print(f"{PROGRAM}: {problem}", file=sys.stderr)
    sys.exit(2)


def refuse_unknown(arguments: Sequence[str], settings: Any) -> None:
    """Ends the program at an option that there is none of, and names the nearest one."""
    known = [option_of(name) for name in [*settings_by_flag(settings), "help"]]
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            meant = f", did you mean {near[0]}?" if near else ";"
            end_usage(f"there is no {option}{meant} --help lists all")


def check_ranges(settings: Any) -> None:
    """Ends the program where a number lies outside the range of its annotation, or is NaN."""
    hints = get_type_hints(type(settings), include_extras=True)
    for setting in dataclasses.fields(settings):
        value = getattr(settings, setting.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        for allowed in getattr(hints[setting.name], "__metadata__", ()):
            if isinstance(allowed, Between) and value is not None:
                check_range(setting.name, value, allowed)


def check_range(option: str, value: float | tuple[float, ...], allowed: Between) -> None:
    """Ends the program where a number, or one of several, is not allowed."""
    numbers = value if isinstance(value, tuple) else (value,)
    if not numbers:
        refuse(option, "needs at least one number")
    for number in numbers:
        if number > allowed.most:
            refuse(option, f"must be at most {allowed.most:,.12g}")
        if not number >= allowed.least:  # or it is NaN
            refuse(option, f"must be at least {allowed.least:,.12g}")
