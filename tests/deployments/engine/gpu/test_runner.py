"""Everything around the kernel, on the CPU: packed inputs, buffers that stay, padding, graphs' policy; tokens as transformers'."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.attention import CPU, KvCache
from deployments.engine.engine import Engine
from deployments.engine.gpu.inputs import pack, padded
from deployments.engine.gpu.runner import DeviceRunner
from deployments.engine.gpu.static import Body, StaticDecode, uncaptured, why_not
from deployments.engine.messages import Request
from deployments.engine.runner import Runner, load_model
from tests.deployments.engine.families import VOCABULARY, build, reference
from tests.deployments.engine.gpu.pages import BLOCK, batch, both
from tests.deployments.engine.gpu.readable import attend
from tests.deployments.engine.guesses import Guesses

FAMILIES = ["llama", "gemma2"]
BLOCKS = 24
SIZES = [1, 2, 4]
WIDTH = 8
NEW = 10


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, VOCABULARY) for _ in range(length)] for length in (3, 17, 30, 1, 9)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, and what transformers answers to the prompts."""
    path: Path = build(request.param, tmp_path_factory.mktemp("models") / request.param)
    return load_model(path, "float32"), reference(path, prompts(), NEW)


def device_runner(model: torch.nn.Module, blocks: int = BLOCKS) -> DeviceRunner:
    return DeviceRunner(model, KvCache(blocks, BLOCK), CPU, attend, group=2, kv_heads=2)


def static(model: torch.nn.Module, capture: Any = uncaptured, blocks: int = BLOCKS) -> StaticDecode:
    made = StaticDecode(device_runner(model, blocks), SIZES, WIDTH, capture)
    made.prepare()
    return made


def answers(runner: Any, *, blocks: int = BLOCKS, guesses: Any = None, **settings: Any) -> tuple[list[list[int]], Engine]:
    options = {"block_size": BLOCK, "max_sequences": 8, "max_batch_tokens": 16, "speculation": 0} | settings
    engine = Engine.of(runner.run, blocks, EngineSettings(**options))
    engine.speculation = guesses
    for number, prompt in enumerate(prompts()):
        engine.add(Request(number, prompt, Sampling(temperature=0.0), NEW, [], seed=0))
    found: list[list[int]] = [[] for _ in prompts()]
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output.token)
    return found, engine


def test_inputs_in_one_copy_give_the_tokens_of_transformers(model: Any) -> None:
    runner = device_runner(model[0])
    runner.check()
    assert runner.error() < 1e-5
    assert answers(runner)[0] == model[1]


def test_buffers_that_stay_give_the_same_tokens(model: Any) -> None:
    found, engine = answers(static(model[0]))
    assert found == model[1]
    assert engine.stats().blocks_used == 0


def test_preemption_prefixes_and_guesses_change_no_token(model: Any) -> None:
    few = 8
    right = {(number, 0): answer for number, answer in enumerate(model[1])}
    guesses = Guesses(right, vocabulary=VOCABULARY)
    found, engine = answers(static(model[0], blocks=few), blocks=few, guesses=guesses)
    assert found == model[1]
    stats = engine.stats()
    assert stats.preemptions > 0
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


def test_a_step_of_decoders_is_a_replay_of_the_smallest_bucket_that_holds_it(model: Any) -> None:
    made, replayed = [], []

    def capture(body: Body) -> Body:
        number = len(made)
        made.append(body)

        def replay() -> torch.Tensor:
            replayed.append(number)
            return body()

        return replay

    runner = static(model[0], capture)
    for count in (1, 2, 3, 4, 5):
        runner.run(batch([(length, 1) for length in range(count)])[0])
    runner.run(batch([(0, 1), (0, 2)])[0])
    assert [SIZES[::-1][number] for number in replayed] == [1, 2, 4, 4], "five decoders, and a chunk, are nobody's"


def test_rows_that_fill_up_touch_no_sequence(model: Any) -> None:
    runner, plain = static(model[0]), device_runner(model[0])
    work = batch([(0, 19), (0, 11), (0, 30)])[0]
    decoders = batch([(11, 1), (19, 1), (30, 1)], spare=0)[0]
    tables = work.tables[[1, 0, 2]]
    decoders = type(work)(decoders.tokens, decoders.starts, decoders.counts, decoders.sampled, tables)
    expected = None
    for one in (plain, runner):
        one.run(work)
        logits = one.run(decoders).clone()
        again = one.run(decoders)
        torch.testing.assert_close(logits, again)
        expected = logits if expected is None else expected
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_decoders_that_are_not_asked_give_no_row(model: Any) -> None:
    found = batch([(3, 1), (5, 1), (9, 1)])[0]
    some = type(found)(found.tokens, found.starts, found.counts, np.array([0, 2], np.int32), found.tables)
    runner = static(model[0])
    torch.testing.assert_close(runner.run(some), runner.run(found)[[0, 2]].clone())


def test_the_largest_step_can_be_tried_and_the_cache_changed(model: Any) -> None:
    runner = device_runner(model[0], blocks=3)
    runner.rehearse(40, 8)
    before = runner.cache.num_bytes
    runner.resize(7)
    assert runner.scratch == 7
    assert runner.cache.num_bytes == before * 8 // 4
    plain = Runner(model[0], KvCache(3, BLOCK))
    plain.rehearse(40, 8)
    assert plain.cache.num_bytes == before * 3 // 4


def test_packed_inputs_follow_from_the_batch() -> None:
    found = batch([(9, 1), (0, 20)])[0]
    packed = pack(found, BLOCK, 8, 1, 2)
    numbers = torch.from_numpy(packed.numbers)
    step = packed.step(numbers[: packed.num_fixed], numbers[packed.num_fixed :].view(-1, packed.width))
    assert step.positions.tolist() == [9, *range(20)]
    assert step.slots.tolist()[0] == found.tables[0, 1] * BLOCK + 1
    assert step.programs.tolist() == [[0, 0], [1, 0], [1, 16]]
    assert [(launch.first, launch.count, launch.tokens_each) for launch in step.launches] == [(0, 1, 1), (1, 2, 16)]


def test_filled_up_batches_use_the_spare_block_alone() -> None:
    found = padded(batch([(9, 1)])[0], 3, 77)
    assert found.tables[1:].tolist() == [[77, 77]] * 2
    assert found.starts.tolist() == [9, 0, 0]
    assert found.rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"window": 12, "softcap": 3.0}, {"heads": 6, "value_size": 8}], ids=str)
def test_the_readable_door_is_the_specification(options: dict[str, Any]) -> None:
    found, expected = both(attend, [(7, 1), (30, 1), (0, 19), (11, 3)], **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, None),
        ({"rope_parameters": {"rope_type": "llama3"}}, None),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longest position"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "longest position"),
        ({"num_local_experts": 8}, "experts"),
    ],
)
def test_what_a_graph_could_not_hold_is_known(config: dict[str, Any], reason: str | None) -> None:
    found = why_not(config)
    assert found == reason if reason is None else reason in str(found)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
