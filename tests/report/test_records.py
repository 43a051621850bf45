"""What a run leaves as JSON: an earlier one's record says what seeds can show."""

import json

import pytest
from helpers import comparison, tiny

import main
from lab.measure import planning, statistics
from lab.report import figures, records, sentences


def test_an_earlier_run_tells_what_seeds_can_show(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda *_: None)  # which takes most of the time
    monkeypatch.setattr("gc.collect", lambda: 0)  # and so does Holm's of statsmodels
    once = ("--epochs", "1", "--precision", "fp32")
    main.main(tiny(tmp_path, *once, "--seeds", "2"))
    first = capsys.readouterr().out
    summary = (tmp_path / "results" / "summary.md").read_text()
    assert "spreads as" not in first and "2 seeds detect" in summary
    monkeypatch.setattr(main, "train_network", None)  # stops the next one
    with pytest.raises(TypeError):
        main.main(tiny(tmp_path, *once, "--seeds", "7"))
    said = " ".join(capsys.readouterr().out.split())
    found = comparison(tmp_path)["compared_with_first"]["se_attention"]["overall"]
    deviation = found["over_seeds"]["planning"]["deviation"]
    rules = statistics.Settings()
    expected = sentences.say_planning(planning.plan(deviation, 7, rules, known_from=2), 7, rules)
    assert f"If SE-Attention spreads as in the run before: {expected}" in said
    for epochs, count in (("1", 1), ("2", 0)):  # another recipe's run tells nothing
        recipe = main.parse_settings(tiny(tmp_path, "--epochs", epochs)).recipe.record()
        del recipe["seed"]
        told = records.plan_from_earlier(tmp_path, recipe, main.NETWORKS, 7, rules)
        assert len(told) == count


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({}, None),
        ({"seeds": 4, "attack_images": None}, None),
        ({"stress": "off"}, "--stress full"),
        ({"stress": "quick", "seeds": 1}, "--stress full and --seeds 3"),
        ({"attack_images": 50}, "--attack-images 100"),
        ({"networks": ["baseline", "se_attention", "eca"]}, None),
        ({"networks": ["baseline", "eca"]}, "--networks baseline se_attention"),
    ],
)
def test_results_that_are_replaced_by_less_are_named(tmp_path, now, said):
    """With the command that made them, and the minutes that it took."""
    (tmp_path / "results").mkdir()
    options = {
        "stress": "full",
        "seeds": 3,
        "attack_images": 100,
        "networks": ["baseline", "se_attention"],
    }
    earlier = {
        "settings": options, "seconds": {"training": 500, "stress": 400},
        "command": "python main.py --seeds 3",
    }  # fmt: skip
    (tmp_path / records.COMPARISON_FILE).write_text(json.dumps(earlier))
    lines = records.say_what_is_replaced(tmp_path, {**options, **now})
    if said is None:
        assert lines == []
    else:
        (line,) = lines
        assert f" are of {said} (python main.py --seeds 3; 15 min)" in line
        assert "--output-dir" in line


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"settings": {}}'])
def test_damaged_earlier_results_are_not_spoken_of(tmp_path, content):
    if content is not None:
        (tmp_path / "results").mkdir()
        (tmp_path / records.COMPARISON_FILE).write_text(content)
    assert records.say_what_is_replaced(tmp_path, {"stress": "off", "seeds": 1}) == []
