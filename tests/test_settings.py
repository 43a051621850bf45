"""The command line: every option and its range, what is refused, and the way back to it."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
from helpers import KEYS

import main
from lab.machine.options import Between, command_line

BAD = [
    "--epochs 0", "--epochs -3", "--epochs 1.5", "--epochs x", "--batch-size 0",
    "--batch-size 60000", "--seed -1", "--seeds 0", "--learning-rate nan", "--learning-rate inf",
    "--learning-rate 0", "--momentum 1", "--validation 0", "--validation 1", "--label-smoothing 1",
    "--crop-epochs 2", "--crop-padding 40", "--crop-size 33", "--widths 0", "--widths",
    "--stem 28", "--muon-rate 0", "--reduction 0", "--device tpu", "--precision fp8",
    "--dataset mnist", "--shapes-train 3", "--level 0", "--stress some", "--epsilons 0",
    "--epsilons 1 256", "--nonsense 1", "--widths 8 8 8 8 8", "--widths 1000000000",
    "--crop-size 8 --widths 8 8 8 8", "--validation 0.01 --dataset shapes --shapes-train 300",
    "--validation 0.9 --dataset shapes --shapes-train 200 --batch-size 21",
    "--shapes-test 1000000000", "--shapes-train 1000000000", "--score-resamples 1000000000",
    "--batch-size 1 --widths 8 8 8 8", "--power 0.1 --level 0.2",
    "--curve-steps 1000000000", "--data-dir ~nobody-of-this-name/data",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_impossible_settings_are_usage_errors(bad, capsys, monkeypatch):
    monkeypatch.setattr(main, "prepare_machine", None)  # nothing may be started
    with pytest.raises(SystemExit) as ended:
        main.main(bad.split())
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    named = [option for option in bad.split() if option.startswith("--")]
    assert any(option in " ".join(errors.split()) for option in named)
    assert "Traceback" not in errors


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = main.parse_settings(["--data-dir=~/x", "--output-dir=~/y"])
    assert (settings.data_dir, settings.output()) == (tmp_path / "x", tmp_path / "y")


def flag(name):
    return name.replace("_", "-")


def options(settings_class=main.Settings):
    """Name, help and default of every option, with all that its annotation says."""
    hints = typing.get_type_hints(settings_class, include_extras=True)
    for field in dataclasses.fields(settings_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options(hints[field.name])
        else:
            default = field.default
            if default is dataclasses.MISSING:
                default = field.default_factory()
            yield field.name, default, hints[field.name]


def test_help_lists_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main.parse_settings(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert ended.value.code == 0 and "None" not in text
    for name, default, _ in options():
        shown = "''" if default == "" else default
        if isinstance(default, tuple):
            shown = " ".join(map(str, default))
        if default is None:
            shown = {"output_dir": "output, for shapes output/shapes",
                     "stress_images": "1000, of shapes 250",
                     "attack_images": "400, of shapes 60"}[name]  # fmt: skip
        mentions = [text[found.start() :] for found in re.finditer(f"--{flag(name)} ", text)]
        assert any(f"(default: {shown})" in mention[:300] for mention in mentions), name


def test_every_number_has_a_range_and_every_default_lies_in_it():
    """So that a new option without one is noticed."""
    for name, default, hint in options():
        numbers = default if isinstance(default, tuple) else (default,)
        if numbers and type(numbers[0]) in (int, float):
            (allowed,) = [part for part in hint.__metadata__ if isinstance(part, Between)]
            assert all(allowed.least <= number <= allowed.most for number in numbers), name


def test_command_line_becomes_settings():
    words = "--dataset shapes --widths 8 9 --learning-rate 0.5 --retrain"
    settings = main.parse_settings(words.split())
    recipe = settings.recipe
    assert (recipe.widths, recipe.learning_rate, recipe.epochs) == ((8, 9), 0.5, 15)
    assert settings.retrain
    assert str(settings.output()) == str(Path("output", "shapes"))
    assert str(main.parse_settings([]).output()) == "output"


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--dataset shapes --seeds 3 --stress quick",
        "--widths 8 9 --learning-rate 0.5 --retrain --attack-images 30",
        "--epsilons 0.5 2.0 --precision fp32 --conformal-misses 0.2 0.1",
    ],
)
def test_settings_become_the_command_line(options):
    given = options.split()
    where = ["--data-dir", "there", "--output-dir", "here", "--mirror", "http://x"]
    settings = main.parse_settings([*given, *where])
    command = command_line(settings, main.Settings(), main.PLACES).split()
    assert command[:2] == ["python", "main.py"] and sorted(command[2:]) == sorted(given)
    assert main.parse_settings(command[2:]) == main.parse_settings(given)


def test_networks_are_chosen_by_their_keys(capsys):
    """In the order given; the option's help names them all."""
    settings = main.parse_settings("--networks wide baseline".split())
    assert [network.key for network in settings.taking_part()] == ["wide", "baseline"]
    assert [network.key for network in main.parse_settings([]).taking_part()] == KEYS
    keys = [network.key for network in [*main.NETWORKS, *main.CONTROLS]]
    assert len(set(keys)) == len(keys)
    with pytest.raises(SystemExit):
        main.parse_settings(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    told = shown[shown.rindex("--networks") :][:300]
    assert all(key in told for key in keys)
    for words, problem in (
        ("--networks baseline foo", "there is no foo: there are baseline, se_attention"),
        ("--networks wide wide", "names a network twice"),
        ("--networks", "names fewer than two networks"),
        ("--networks baseline", "names fewer than two networks: there is nothing to compare"),
    ):
        with pytest.raises(SystemExit) as ended:
            main.parse_settings(words.split())
        assert ended.value.code == 2
        assert f"argument --networks: {problem}" in capsys.readouterr().err


def test_weights_from_before_there_was_a_choice_of_heads_are_used():
    """Their files do not name the head; those of another head are not theirs."""
    usual = main.Recipe().record()
    assert "head" not in usual
    assert main.Recipe(head="max").record() == {**usual, "head": "max"}
