"""The benchmark of quantised weights: what it makes of predictions and of rates."""

from __future__ import annotations

import math

import pytest
import torch

from bench.harness import Row
from bench.quantization import OPENVINO, OURS, PLAIN, Exactness, Speed, Work, compared, exactness_table, rows, speed_table

GIB = 1 << 30
ALONE = [Speed(PLAIN, "S", 1, 100.0, GIB), Speed(OURS, "S", 1, 150.0, GIB // 2)]
TEXT = torch.tensor([[0, 1, 2]])


def predictions(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([rows]).log()


def test_predictions_that_are_the_same_diverge_by_nothing() -> None:
    given = predictions([0.25, 0.5, 0.25], [0.2, 0.2, 0.6])
    found = compared("int8", given, given, TEXT)
    assert (found.divergence, found.agreement) == (pytest.approx(0, abs=1e-6), 1.0)
    assert found.perplexity == pytest.approx(1 / math.sqrt(0.5 * 0.6))


def test_divergence_and_agreement_are_beside_the_reference() -> None:
    reference, other = predictions([0.5, 0.4, 0.1], [0.2, 0.2, 0.6]), predictions([0.4, 0.5, 0.1], [0.2, 0.2, 0.6])
    found = compared("fp8", other, reference, TEXT)
    assert found.agreement == 0.5
    assert found.divergence == pytest.approx((0.5 * math.log(0.5 / 0.4) + 0.4 * math.log(0.4 / 0.5)) / 2)


def test_the_best_of_sixteen_bits_and_of_the_peer_is_what_counts() -> None:
    assert rows(ALONE) == [Row("S", 1, 1, 150.0, 100.0, PLAIN, 1.5)]
    assert rows([*ALONE, Speed(OPENVINO, "S", 1, 120.0, GIB)]) == [Row("S", 1, 1, 150.0, 120.0, OPENVINO, 1.25)]


def test_tables_have_ratios_and_a_dash_for_who_is_not_there() -> None:
    shown = speed_table(ALONE)
    (cells,) = (dict(zip(shown.columns, line, strict=True)) for line in shown.lines)
    assert (cells["ratio"], cells["int8 / openvino-genai"], cells["memory int8, GiB"]) == ("1.50", "-", "0.5")
    table = exactness_table([Exactness("float32", 20.0, 0.0, 1.0), Exactness("int8", 20.1, 0.001, 0.99)])
    assert [line[2] for line in table.lines] == ["+0.000%", "+0.500%"]


def test_a_work_is_the_same_for_every_engine() -> None:
    assert Work(8, 2).prompts(100) == Work(8, 2).prompts(100)
    assert len(Work(8, 2).prompts(100)) == 16
