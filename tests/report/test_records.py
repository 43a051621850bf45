"""What a run leaves as JSON: an earlier one's record says what seeds can show."""

import pytest
from helpers import comparison, tiny

import main
from lab.measure import statistics
from lab.report import figures, records, sentences


def test_an_earlier_run_tells_what_seeds_can_show(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda *_: None)  # which takes most of the time
    monkeypatch.setattr("gc.collect", lambda: 0)  # and so does Holm's of statsmodels
    once = ("--epochs", "1", "--precision", "fp32")
    main.main(tiny(tmp_path, *once, "--seeds", "2"))
    first = capsys.readouterr().out
    assert "spreads as in the run before" not in first and "2 seeds detect" in first
    monkeypatch.setattr(main, "train_network", None)  # stops the next one
    with pytest.raises(TypeError):
        main.main(tiny(tmp_path, *once, "--seeds", "7"))
    said = capsys.readouterr().out
    found = comparison(tmp_path)["compared_with_first"]["se_attention"]["overall"]
    deviation = found["over_seeds"]["planning"]["deviation"]
    rules = statistics.Settings()
    expected = sentences.say_planning(statistics.plan(deviation, 7, rules), 7, rules)
    assert f"If SE-Attention spreads as in the run before: {expected}" in said
    for epochs, count in (("1", 1), ("2", 0)):  # another recipe's run tells nothing
        recipe = main.parse_settings(tiny(tmp_path, "--epochs", epochs)).recipe.record()
        del recipe["seed"]
        told = records.plan_from_earlier(tmp_path, recipe, main.NETWORKS, 7, rules)
        assert len(told) == count
