"""The arithmetic of the benchmark of talk between ranks."""

from __future__ import annotations

from bench import meeting
from bench.meeting import DEEPSPEED, GLOO, OURS, Case, Measurement


def test_a_broadcast_lasts_until_the_other_rank_has_it_and_a_sum_until_the_leader_has() -> None:
    def stamps(case: Case) -> list[dict[str, dict[str, list[tuple[int, int]]]]]:
        return [{case.name: {OURS: [(1_000, 3_000)]}}, {case.name: {OURS: [(500, 9_000)]}}]

    for what, microseconds in (("all-reduce", 2.0), ("broadcast", 8.0)):
        case = Case(what, 1, 1)
        assert meeting._medians(case, stamps(case)) == {OURS: microseconds}


def test_rows_compare_with_the_fastest_of_the_others() -> None:
    row, *_ = meeting.rows([Measurement("all-reduce", 8, 512, {OURS: 20.0, GLOO: 400.0, DEEPSPEED: 30.0})], 2)
    assert (row.peer, row.ratio, row.concurrency, row.tp) == (DEEPSPEED, 1.5, 8, 2)


def test_table_leaves_out_what_a_way_cannot_do() -> None:
    (line,) = meeting.table([Measurement("broadcast", 1, 64, {OURS: 10.0, GLOO: 200.0})], 2).lines
    assert line == ["broadcast", "1", "64", "200", "", "10", "20.0", ""]
