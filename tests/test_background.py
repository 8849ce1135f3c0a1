"""Prefetching: the same items, in order, errors where they belong, and no thread left running."""

import threading
import time

import pytest

from pc_clip.core.prefetch import prefetch


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_items_are_prefetched_in_order_and_bounded():
    made = []
    coming = prefetch((made.append(n) or n for n in range(100)), depth=2)
    assert next(coming) == 0
    end = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 3  # one given, two waiting
    assert list(coming) == list(range(1, 100)) and not running()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_is_raised_after_the_items_before_it(kind):
    def items():
        yield 1
        raise kind("no second")

    coming = prefetch(items())
    assert next(coming) == 1
    with pytest.raises(kind, match="no second"):
        next(coming)
    assert not running()


def test_leaving_early_ends_the_thread():
    for n in prefetch(iter(range(10**9))):
        if n == 5:
            break
    assert not running()
