"""Several things at once: work on items in threads that share the cores.

In come a function and its items. Out come its results in the items' order, or the first error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from tqdm import tqdm

from lab.machine.console import on_terminal
from lab.machine.device import Hardware

Item = TypeVar("Item")
Result = TypeVar("Result")
Tick = Callable[[int], object]  # moves a progress bar on by so many steps


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], hardware: Hardware
) -> list[Result]:
    """What `work` makes of each item, several at once in threads that share the cores.

    Work that takes long calls `hardware.raise_if_cancelled()` now and then, so that it ends soon
    after other work has failed, whose error is raised here.
    """
    if hardware.at_once == 1:
        return [work(item) for item in items]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // hardware.at_once))
    pool = ThreadPoolExecutor(hardware.at_once)
    try:
        futures = [pool.submit(work, item) for item in items]
        wait_for_all(futures)
        return [future.result() for future in futures]
    finally:
        hardware.cancelled.set()
        pool.shutdown(cancel_futures=True)
        hardware.cancelled.clear()
        torch.set_num_threads(threads)


def wait_for_all(futures: Sequence[Future]) -> None:
    """Until all are done, or one has failed, whose error is raised at once."""
    waiting = set(futures)
    while waiting:
        # A second at a time: on Windows, Ctrl-C does not interrupt a longer wait.
        done, waiting = wait(waiting, timeout=1, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def try_each(
    work: Callable[[Item, Tick], Result],
    items: Sequence[Item],
    hardware: Hardware,
    title: str,
    total: int | None = None,
) -> list[Result]:
    """`in_parallel`, with a progress bar on a terminal.

    Work that has several steps is told their `total` over all items, and ticks as it goes; without
    it, the bar counts items.
    """
    steps = len(items) if total is None else total
    with tqdm(desc=title, total=steps, leave=False, disable=not on_terminal()) as bar:

        def work_and_show(item: Item) -> Result:
            result = work(item, bar.update)
            if total is None:
                bar.update()
            return result

        return in_parallel(work_and_show, items, hardware)
