"""The flatness benchmark: that a policy decides each step's chunk, and what is made of the gaps."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import flatness, models
from bench.flatness import Gap, Trial, Work, measure, policies, rows, summarise, table
from bench.step import NoModel
from deployments.engine.batch import Batch
from deployments.engine.chunking import Chunking

WORK = Work(decoders=3, context=20, prompt_tokens=100)


def chunks(model: NoModel) -> list[int]:
    """The long prompt's tokens in every step that had some beside all decoders."""
    counts = [Batch.unpack(batch).counts.tolist() for batch in model.batches]
    return [step[-1] for step in counts if len(step) == 4 and step[:3] == [1, 1, 1] and step[-1] > 1]


@pytest.fixture
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "S", {"vocab_size": 50})
    monkeypatch.setattr(flatness, "STEPS_AROUND", 5)


@pytest.mark.usefixtures("small_vocabulary")
@pytest.mark.parametrize(("budget", "expected"), [(28, [25] * 4), (63, [60, 40]), (103, [100])])
def test_a_fixed_budget_is_shared_by_decoders_and_prompt(budget: int, expected: list[int]) -> None:
    model = NoModel(4, vocab_size=50)
    measurement, gaps = measure(model.execute, "x", Chunking(budget, 0), WORK, "S")
    assert chunks(model) == expected
    assert {gap.request for gap in gaps} == {0, 1, 2}
    assert measurement.gap_max_ms >= measurement.gap_p99_ms >= measurement.gap_p50_ms > 0


@pytest.mark.usefixtures("small_vocabulary")
def test_every_policy_brings_the_prompt_in() -> None:
    for name, policy in policies(WORK.prompt_tokens, WORK.decoders, target_s=0.05).items():
        model = NoModel(4, vocab_size=50)
        assert measure(model.execute, name, policy, WORK, "S")[0].policy == name
        assert sum(chunks(model)) in (99, 100)  # a last chunk of one token looks like a decoder


def test_gaps_count_between_one_token_and_the_next_of_the_same_request() -> None:
    trial = Trial(NoModel(3, vocab_size=50).execute, Chunking(1000, 0), Work(decoders=2, context=4, prompt_tokens=8))
    for number in (0, 1):
        trial.add(number, [1, 2, 3, 4], max_tokens=3)
    assert [trial.step() for _ in range(3)] == [{0, 1}] * 3
    assert [gap.request for gap in trial.gaps] == [0, 1, 0, 1]


def test_only_gaps_beside_the_prompt_are_its_doing() -> None:
    gaps = [Gap(0, -0.2, 0.01), Gap(0, -0.1, 0.01), Gap(0, 0.5, 0.1), Gap(0, 1.0, 0.3), Gap(0, 1.1, 9.0)]
    m = summarise(gaps, "x", "S", 8, first_s=1.0, alone_s=0.4)
    assert (m.alone_gap_p50_ms, m.gap_p50_ms, m.gap_max_ms) == pytest.approx((10, 200, 300))
    assert (m.first_token_ms, m.alone_first_token_ms, m.tokens_per_s) == (1000, 400, 2.0)
    assert rows([m])[0].model == "S: x"
    assert table([m], 4096).lines[0][:4] == ["S", "x", "10", "200"]


def test_the_plot_has_one_line_for_each_policy(tmp_path: Path) -> None:
    gaps = [Gap(0, 0.1, 0.01), Gap(1, 0.1, 9.0), Gap(0, 0.2, 0.02)]
    flatness.draw(tmp_path / "x.svg", "S", {"64 tokens": gaps, "whole prompt": gaps})
    drawn = (tmp_path / "x.svg").read_text()
    assert drawn.count("<circle") == 2 * 3, "two points of decoder 0 and one in the legend, for each"
    assert "whole prompt" in drawn
