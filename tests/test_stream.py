"""Work in threads whose results come in order."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from darex_jax.files import stream


def test_ordered_results_are_buffered_to_a_limit():
    """The generators do not run far ahead of the consumer, however long they are."""
    lock, made, taken, too_far = threading.Lock(), 0, 0, threading.Event()
    bound = stream.WAITING + 4 * (os.cpu_count() or 1)

    def make(item):
        nonlocal made
        for i in range(5000):
            with lock:
                made += 1
                if made - taken > bound:
                    too_far.set()
            yield item, i

    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        closing(stream.in_order(pool, make, range(3))) as all_,
    ):
        for item, results in all_:
            for i, result in enumerate(results):
                assert result == (item, i)
                if taken == 0:
                    assert not too_far.wait(0.2)
                with lock:
                    taken += 1
            assert i == 4999
    assert taken == made == 15000 and not too_far.is_set()


def test_a_failure_stops_all_generators():
    begun = []

    def make(item):
        begun.append(item)
        yield item
        if item == 1:
            raise OSError("the disk")
        yield from range(10_000)

    with (
        pytest.raises(OSError, match="the disk"),
        ThreadPoolExecutor(2) as pool,
        closing(stream.in_order(pool, make, range(100))) as results,
    ):
        for _, parts in results:
            for _ in parts:
                pass
    assert len(begun) < 20
