"""TODO report/test_records.py"""

import pytest
from helpers import comparison, tiny

import main
from lab.measure import statistics
from lab.report import records, sentences


def test_an_earlier_run_tells_what_seeds_can_show(tmp_path, capsys, monkeypatch):
    main.main(tiny(tmp_path, "--epochs", "1", "--seeds", "2"))
    first = capsys.readouterr().out
    assert "spreads as in the run before" not in first and "2 seeds detect" in first
    monkeypatch.setattr(main, "train_network", None)  # stops the next one
    with pytest.raises(TypeError):
        main.main(tiny(tmp_path, "--epochs", "1", "--seeds", "7"))
    said = capsys.readouterr().out
    deviation = comparison(tmp_path)["compared_with_first"]["se_attention"]["overall"][
        "over_seeds"
    ]["planning"]["deviation"]
    expected = sentences.say_planning(statistics.plan(deviation, 7, statistics.Settings()), 7,
                                 statistics.Settings())  # fmt: skip
    assert f"If SE-Attention spreads as in the run before: {expected}" in said
    other = main.parse_settings(tiny(tmp_path, "--epochs", "2", "--seeds", "7"))
    assert list(records.plan_from_earlier(other)) == []
