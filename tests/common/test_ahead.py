"""Work ahead of whoever takes the results: their order, whose thread does what, and how it ends."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from diffalign.common.ahead import DEPTH, ordered


def at_work() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_results_come_in_the_order_of_the_items_whoever_is_done_first() -> None:
    def slow_first(number: int, prepared: int) -> int:
        time.sleep(0.02 if number % 4 == 0 else 0.0)
        return prepared + 1

    found = list(ordered(range(20), lambda number: 10 * number, slow_first, threads=4))
    assert found == [(number, 10 * number + 1) for number in range(20)]
    assert list(ordered([], str, lambda item, text: text)) == []
    assert at_work() == []


def test_preparing_is_done_in_the_callers_thread_and_work_is_not() -> None:
    prepared: list[int] = []

    def prepare(number: int) -> str:
        prepared.append(number)
        return threading.current_thread().name

    here = threading.current_thread().name
    both = [
        result
        for _, result in ordered(
            range(9), prepare, lambda _, name: (name, threading.current_thread().name), threads=3
        )
    ]
    assert prepared == list(range(9))
    assert {name for name, _ in both} == {here} and here not in {name for _, name in both}


def test_only_a_few_items_are_taken_ahead() -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number

    results = ordered(endless(), str, lambda item, text: text, threads=2)
    for number in range(50):
        assert next(results) == (number, str(number))
        assert len(taken) == number + 1 + DEPTH * 2
    results.close()
    assert at_work() == []


def test_what_work_raises_comes_out_in_the_place_of_its_item() -> None:
    def work(number: int, prepared: None) -> int:
        if number == 5:
            raise ValueError("five")
        return number

    results, found = ordered(range(100), lambda number: None, work, threads=2), []
    with pytest.raises(ValueError, match="five"):
        for number, _ in results:
            found.append(number)
    assert found == [0, 1, 2, 3, 4] and at_work() == []


@pytest.mark.parametrize("where", ["items", "prepare"])
def test_what_items_or_preparing_raise_ends_it(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        if where == "items":
            raise KeyError(where)
        yield 3

    def prepare(number: int) -> int:
        if number == 3:
            raise KeyError(where)
        return number

    with pytest.raises(KeyError, match=where):
        list(ordered(items(), prepare, lambda item, _: item, threads=2))
    assert at_work() == []


def test_what_has_not_begun_is_dropped_when_it_is_left_early() -> None:
    """One thread, held at the second item: of the three that are taken the last never begins."""
    begun, held, gate = [], threading.Event(), threading.Event()

    def work(number: int, prepared: int) -> int:
        begun.append(number)
        if number == 1:
            held.set()
            gate.wait(10)
        return number

    results = ordered(range(100), int, work, threads=1)
    assert next(results) == (0, 0) and held.wait(10)
    threading.Timer(0.05, gate.set).start()
    results.close()
    assert begun == [0, 1] and at_work() == []
