"""Pure parts of the worker and the configuration."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import ModelConfig, OptimisationConfig, Recipe
from training.worker import deepspeed_config, learning_rate


@given(st.integers(1, 2000), st.floats(0, 0.5))
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(num_steps: int, warmup_share: float) -> None:
    config = OptimisationConfig(learning_rate=1.0, warmup_share=warmup_share)
    rates = [learning_rate(step, num_steps, config) for step in range(num_steps)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(1.0)


def test_the_dial_changes_size_and_keeps_heads_divisible_by_four() -> None:
    for depth in (1, 2, 3, 4):
        config = ModelConfig.of_depth(depth)
        assert config.num_layers == depth
        assert config.num_heads % 4 == config.num_kv_heads % 4 == 0
    assert ModelConfig.of_depth(2) == ModelConfig()


def test_heads_that_do_not_divide_are_an_error_with_numbers() -> None:
    with pytest.raises(ValueError, match="100"):
        ModelConfig(hidden_size=100, num_heads=8)


def test_a_recipe_is_flat_for_mlflow() -> None:
    flat = Recipe(seed=3).flat()
    assert flat["seed"] == 3
    assert flat["model.num_layers"] == 2
    assert all(not isinstance(value, dict) for value in flat.values())


def test_the_engine_keeps_the_global_batch_whatever_the_number_of_workers() -> None:
    config = OptimisationConfig(global_rows=4)
    for world in (1, 2, 4):
        assert deepspeed_config(config, world, on_cpu=True)["train_micro_batch_size_per_gpu"] * world == 4
    assert deepspeed_config(config, 2, on_cpu=True)["optimizer"]["params"]["torch_adam"]


def test_the_demonstration_gives_every_worker_a_row() -> None:
    for workers in (1, 2, 3, 8):
        rows = Recipe.demonstration(workers).optimisation.global_rows
        assert rows >= workers
        assert rows % workers == 0
