"""Bounds against the models themselves, and a reading that really reads."""

from __future__ import annotations

import pytest
import torch

from bench.bandwidth import bound, kv_bytes, measure, step_bytes, weight_bytes
from bench.models import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_model_that_a_step_reads(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec))
    embedding = 0 if spec["tie_word_embeddings"] else model.get_input_embeddings().weight.numel()
    assert weight_bytes(spec) == 2 * (sum(p.numel() for p in model.parameters()) - embedding)


def test_keys_and_values_of_a_token() -> None:
    assert kv_bytes(MODELS["M"]) == 2 * 2 * 24 * 2 * 64


def test_a_bound_is_steps_a_second_for_every_sequence() -> None:
    spec = MODELS["S"]
    assert step_bytes(spec, 8, 192) == weight_bytes(spec) + 8 * 192 * kv_bytes(spec)
    assert bound(spec, 8, 192, 1e9) == pytest.approx(8 * 1e9 / step_bytes(spec, 8, 192))
    assert bound(spec, 32, 192, 1e9) > bound(spec, 8, 192, 1e9)


def test_caches_are_read_faster_than_memory() -> None:
    small = measure(1 << 16, 1, rounds=2000)
    large = measure(1 << 27, 1, rounds=1, tries=2)
    assert small > large > 1e8
