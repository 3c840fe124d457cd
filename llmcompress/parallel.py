"""Threads over an iterable. The kernels and the system calls they spend their time in release the GIL."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


def in_parallel(
    workers: int,
    tasks: Iterable[Task],
    work: Callable[[Task], Outcome],
    stopping: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """Results of `work(task)` as they are finished; the first exception stops all workers and is raised here.

    `stopping()` is called when the workers are to end, and wakes those that wait for something."""
    source, lock = iter(tasks), threading.Lock()
    results: queue.Queue = queue.Queue()
    stop = threading.Event()

    def loop() -> None:
        try:
            while not stop.is_set():
                with lock:
                    task = next(source, None)
                if task is None:
                    break
                results.put((work(task), None))
        except BaseException as error:  # handed to the main thread, which raises it
            stop.set()
            results.put((None, error))  # before those it wakes put theirs
            stopping()
        finally:
            results.put(None)

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        while running:
            item = results.get()
            if item is None:
                running -= 1
                continue
            value, error = item
            if error is not None:
                raise error
            yield value
    finally:
        stop.set()
        stopping()
        for thread in threads:
            thread.join()
