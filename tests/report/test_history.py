"""history.csv: a line for each epoch, whoever trains and however often it is begun again."""

import threading

import pandas as pd

from lab.measure.models import EpochLog
from lab.report import history

NO_EPOCH = f"{','.join(history.HEADINGS)}\nbaseline,42,x,1,1,1,1,1\n"


def log(k):
    return EpochLog(1 / k, 10.0 * k, 2 / k, 11.0 * k, 0.5)


def test_lines_are_there_as_epochs_end_and_none_twice(tmp_path):
    path = tmp_path / "results" / "history.csv"
    for epoch in (1, 2, 3):
        history.add(path, "baseline", 42, epoch, log(epoch))
        assert pd.read_csv(path)["epoch"].tolist() == list(range(1, epoch + 1))
    history.add(path, "baseline", 43, 1, log(9))
    history.add(path, "baseline", 42, 2, log(7))  # killed after the second, it goes on there
    found = pd.read_csv(path)
    assert list(found["network"]) == ["baseline"] * 3
    assert sorted(zip(found["seed"], found["epoch"], strict=True)) == [(42, 1), (42, 2), (43, 1)]
    again = found[(found["seed"] == 42) & (found["epoch"] == 2)].iloc[0]
    assert (again["train_accuracy"], again["validation_accuracy"]) == (70, 77)
    history.add(path, "baseline", 42, 1, log(1))  # trained anew
    assert sorted(pd.read_csv(path)["seed"]) == [42, 43]


def test_networks_that_train_at_once_lose_no_line(tmp_path):
    path = tmp_path / "history.csv"

    def train(key):
        for epoch in range(1, 9):
            history.add(path, key, 42, epoch, log(epoch))

    threads = [threading.Thread(target=train, args=[key]) for key in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = pd.read_csv(path)
    assert len(found) == 24 and found.groupby("network")["epoch"].nunique().tolist() == [8] * 3


def test_what_is_not_its_own_is_replaced(tmp_path):
    path = tmp_path / "history.csv"
    for content in (
        "",
        "another,table\n1,2\n",
        "\0\0",
        ",".join(history.HEADINGS) + "\na,b\n",
        NO_EPOCH,
    ):
        path.write_text(content)
        history.add(path, "baseline", 42, 1, log(1))
        assert len(pd.read_csv(path)) == 1


def test_a_finished_run_writes_what_its_weights_say(results, made_tiny_run):
    found = pd.read_csv(made_tiny_run / "results" / "history.csv")
    assert list(found.columns) == history.HEADINGS
    assert len(found) == len(results.networks) * results.setup.epochs
    last = results.networks[1].runs[0].history[-1]
    row = found.iloc[-1]
    assert row["network"] == "se_attention" and row["epoch"] == results.setup.epochs
    assert abs(row["validation_loss"] - last.validation_loss) < 1e-4
