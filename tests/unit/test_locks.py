"""Locks by name: one holder each, and none left behind."""

import threading

import pytest

from ringstone.errors import BusyError
from ringstone.gateway.locks import NamedLocks


def test_one_name_has_one_holder_at_a_time() -> None:
    locks = NamedLocks()
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            with locks.hold("v"):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (800, 1)
    assert locks.users("v") == 0


def test_who_comes_while_another_waits_gets_the_same_lock() -> None:
    """The lock may be forgotten only by the last of them: forgotten by the first, the third would not
    wait."""
    locks = NamedLocks()
    order: list[str] = []
    leave_second = threading.Event()
    second_in = threading.Event()

    def second() -> None:
        with locks.hold("v"):
            order.append("second in")
            second_in.set()
            assert leave_second.wait(30)
            order.append("second out")

    def third() -> None:
        with locks.hold("v"):
            order.append("third in")

    with locks.hold("v"):
        waiting = threading.Thread(target=second)
        waiting.start()
        while locks.users("v") < 2:
            assert waiting.is_alive()
    assert second_in.wait(30)
    late = threading.Thread(target=third)
    late.start()
    while locks.users("v") < 2:
        assert late.is_alive()
    leave_second.set()
    waiting.join()
    late.join()
    assert order == ["second in", "second out", "third in"]


def test_names_do_not_wait_for_each_other_and_are_forgotten() -> None:
    locks = NamedLocks()
    with locks.hold("a"), locks.hold("b"):
        assert (locks.users("a"), locks.users("b"), locks.users("c")) == (1, 1, 0)
    assert (locks.users("a"), locks.users("b")) == (0, 0)


def test_a_change_that_does_not_end_is_not_waited_for_for_ever() -> None:
    """An upgrade waited for it without a limit, and every other change was refused meanwhile."""
    locks = NamedLocks()
    with locks.hold("volume slow"):
        with pytest.raises(BusyError, match="volume slow"), locks.frozen("upgrade", 0.01):
            pass
        with locks.hold("volume other"):
            pass
    with locks.frozen("upgrade", 30), pytest.raises(BusyError, match="upgrade"), locks.hold("v"):
        pass
