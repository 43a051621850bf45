"""Several things at once: their order, the cores they share, and their end when one fails."""

import threading
import time

import pytest
import torch

from lab.machine import parallel
from lab.machine.device import CancelledError, Hardware
from lab.machine.options import UserError


@pytest.fixture
def two_at_once():
    """Hardware that does two things at once, whose threads are given back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield Hardware(torch.device("cpu"), "fp32", "", at_once=2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_work_side_by_side_shares_the_cores_and_keeps_its_order(two_at_once):
    together = threading.Barrier(2, timeout=30)

    def work(item):
        together.wait()  # would break if one came after the other
        return item, torch.get_num_threads()

    assert parallel.in_parallel(work, [3, 1, 2, 0], two_at_once) == [(k, 1) for k in (3, 1, 2, 0)]


@pytest.mark.parametrize("order", [[True, False], [False, True]])
@pytest.mark.parametrize("error", [UserError("no"), ZeroDivisionError(), KeyboardInterrupt()])
def test_work_ends_when_other_work_fails(two_at_once, order, error):
    ended = []

    def work(fails):
        if fails:
            time.sleep(0.2)
            raise error
        try:
            for _ in range(300):
                two_at_once.raise_if_cancelled()
                time.sleep(0.1)
        except CancelledError:
            ended.append(True)
            raise

    start = time.monotonic()
    with pytest.raises(type(error)):
        parallel.in_parallel(work, order, two_at_once)
    assert ended == [True] and time.monotonic() - start < 5
    assert parallel.in_parallel(str, [1, 2], two_at_once) == ["1", "2"]  # it can work again
