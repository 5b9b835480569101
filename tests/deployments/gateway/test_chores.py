from __future__ import annotations

import threading

from deployments.gateway.chores import Chore, Chores


def test_a_chore_that_fails_stops_neither_itself_nor_others() -> None:
    turns: dict[str, int] = {"bad": 0, "good": 0}
    enough = threading.Event()

    def bad() -> None:
        turns["bad"] += 1
        raise OSError("no database")

    def good() -> None:
        turns["good"] += 1
        if min(turns.values()) >= 3:
            enough.set()

    chores = Chores([Chore("bad", 0.001, bad), Chore("good", 0.001, good)])
    assert enough.wait(20)
    chores.close()
    assert turns["bad"] >= 3


def test_at_the_end_everything_is_done_once_more() -> None:
    turns: list[int] = []
    first = threading.Event()

    def work() -> None:
        turns.append(1)
        first.set()

    chores = Chores([Chore("rare", 3600, work)])
    assert first.wait(20)
    chores.close()
    assert len(turns) == 2


def test_a_chore_that_hangs_keeps_only_its_own_line_waiting() -> None:
    free, turns, enough = threading.Event(), [], threading.Event()

    def beat() -> None:
        turns.append(1)
        if len(turns) >= 3:
            enough.set()

    chores = Chores([Chore("hangs", 0.001, lambda: free.wait(60), at_end=int, line="slow"), Chore("beat", 0.001, beat)])
    assert enough.wait(20)
    chores.close(seconds=0.05)
    assert not free.is_set(), "nobody waited for it, not even the end"
    free.set()


def test_no_chores_need_no_thread() -> None:
    chores = Chores([])
    chores.close()
