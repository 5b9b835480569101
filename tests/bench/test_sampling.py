"""The benchmark of ways to choose tokens, with an engine whose model is a table."""

from __future__ import annotations

from bench.harness import Row
from bench.sampling import BEST, WAYS, Measurement, Work, measure, rows, table
from tests.bench.test_speculation import local

MEASURED = Measurement(8, {way: 100.0 if way == BEST else 80.0 for way in WAYS})


def test_every_way_answers_the_same_work() -> None:
    found = measure(local(surprise=0.5), Work(2, prompt_tokens=6, output_tokens=10), 12, rounds=1)
    assert found.tokens_per_s.keys() == WAYS.keys()
    assert min(found.tokens_per_s.values()) > 0


def test_ways_differ_in_their_own_fields_alone() -> None:
    plain = Work(1).sampling(BEST)
    for way, fields in WAYS.items():
        sampling = Work(1).sampling(way)
        differing = {name for name in plain.__dataclass_fields__ if getattr(sampling, name) != getattr(plain, name)}
        assert differing <= fields.keys(), way
    assert Work(1).prompts(100) == Work(1).prompts(100)


def test_the_peer_is_the_engine_that_takes_the_best_token() -> None:
    found = rows([MEASURED], "S")
    assert found[0] == Row("S: dice", 8, 1, 80.0, 100.0, "the best token", 0.8)
    assert len(found) == len(WAYS) - 1


def test_the_table_has_a_line_for_each_way() -> None:
    lines = table([MEASURED]).lines
    assert [line[0] for line in lines] == list(WAYS)
    assert lines[1][1] == "80 (0.80)"
