"""The engine with LoRA adapters against peft: greedy float32 tokens must be those of the merged model, whatever is beside them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.batch import Batch
from deployments.engine.local import LocalEngine
from deployments.engine.messages import AdapterUse
from tests.deployments.engine.adapter_ranks import Case, Report, run_on_two_ranks
from tests.deployments.engine.families import build
from tests.deployments.engine.guesses import Guesses
from tests.deployments.engine.lora import build_adapter, linears, merged_answers, prompts

TOKENS = 10
GREEDY = Sampling(temperature=0.0, max_tokens=TOKENS)
PATHS = {"torch": {"native": False, "block_size": 4}, "native": {"native": True, "block_size": 16}}
FAMILIES = ["llama", "gemma2", "phi3"]
SHARDED = ["llama", "gemma2"]
ROOMY = EngineSettings(kv_cache_bytes=1 << 22, max_batch_tokens=256, threads=2, cut_weights_bytes=0)
TIGHT = EngineSettings(kv_cache_bytes=1 << 22, max_batch_tokens=16, max_sequences=8, threads=1, cut_weights_bytes=0)


@dataclass(frozen=True)
class Made:
    """A base, its adapters, and what the base (first) and each merged model answer to the prompts."""

    base: Path
    adapters: list[Path]
    answers: list[list[list[int]]]

    @property
    def mixed(self) -> list[list[int]]:
        """When the adapters, and none, take turns."""
        return [self.answers[number % len(self.answers)][number] for number in range(len(prompts()))]


def through(path: str, settings: EngineSettings) -> EngineSettings:
    return settings.model_copy(update=PATHS[path])


def put_all(engine: LocalEngine, made: Made) -> list[AdapterUse | None]:
    return [None, *(engine.put_adapter(slot, path) for slot, path in enumerate(made.adapters, 1))]


def told(engine: LocalEngine, uses: list[AdapterUse | None]) -> list[list[int]]:
    """The answers when prompts take turns with `uses`."""
    chosen = [uses[number % len(uses)] for number in range(len(prompts()))]
    return [answer.token_ids for answer in engine.generate(prompts(), GREEDY, adapters=chosen)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """For each family an adapter of all linears, one of some with an odd rank and another scale, one of few in other layers."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for family in FAMILIES:
        base, names = build(family, root / family), linears(family)
        adapters = [
            build_adapter(base, root / f"{family}-all", targets=names, rank=8),
            build_adapter(base, root / f"{family}-odd", targets=names[1:-1], rank=3, seed=2, use_rslora=True),
            build_adapter(base, root / f"{family}-few", targets=[names[0], names[-1]], rank=16, seed=3, layers_to_transform=[1]),
        ]
        answers = [merged_answers(base, adapter, prompts(), TOKENS) for adapter in [None, *adapters]]
        assert len({str(answer) for answer in answers}) == 4, "the adapters were meant to change what is said"
        found[family] = Made(base, adapters, answers)
    return found


def spoilt(adapter: Path, target: Path, number: float = float("nan")) -> Path:
    """A copy with one number changed."""
    shutil.copytree(adapter, target)
    tensors = load_file(target / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[7] = number
    save_file(tensors, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_merged_model_alone_and_mixed(made: dict[str, Made], family: str, path: str) -> None:
    subject = made[family]
    with LocalEngine(subject.base, settings=through(path, ROOMY)) as engine:
        uses = put_all(engine, subject)
        for use, expected in zip(uses, subject.answers, strict=True):
            assert told(engine, [use]) == expected
        assert told(engine, uses) == subject.mixed


@pytest.mark.parametrize("path", PATHS)
def test_chunks_preemption_and_guesses_change_no_token(made: dict[str, Made], path: str) -> None:
    subject = made["llama"]
    with LocalEngine(subject.base, settings=through(path, TIGHT), blocks={"torch": 16, "native": 5}[path]) as engine:
        uses = put_all(engine, subject)
        engine.engine.speculation = Guesses({(number, 0): answer for number, answer in enumerate(subject.mixed)})
        assert told(engine, uses) == subject.mixed
        stats = engine.engine.stats()
        assert stats.preemptions > 0
        assert stats.accepted_tokens > 5
        assert stats.blocks_used == 0


@pytest.fixture(scope="module")
def two_ranks(made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    root, cases = tmp_path_factory.mktemp("spoilt"), {}
    for family in SHARDED:
        refused = spoilt(made[family].adapters[0], root / family)
        for path in PATHS:
            settings = through(path, TIGHT).model_copy(update={"shared_memory": False, "speculation": 0})
            cases[f"{family} {path}"] = Case(made[family].base, tuple(made[family].adapters), refused, settings, 60)
    return run_on_two_ranks(cases, prompts(), TOKENS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", SHARDED)
def test_two_ranks_give_the_tokens_of_the_merged_models(
    made: dict[str, Made], two_ranks: dict[str, Report], family: str, path: str
) -> None:
    report = two_ranks[f"{family} {path}"]
    assert report.tokens == made[family].mixed
    assert "finite" in report.refusal


@pytest.mark.parametrize("path", PATHS)
def test_prefixes_are_shared_within_an_adapter_and_never_between_two(made: dict[str, Made], path: str) -> None:
    subject = made["llama"]
    with LocalEngine(subject.base, settings=through(path, ROOMY), blocks=400) as engine:
        uses = put_all(engine, subject)
        for use, expected in zip(uses, subject.answers, strict=True):
            for cached in (False, True):
                answers = engine.generate(prompts(), GREEDY, adapters=[use] * len(prompts()))
                assert [answer.token_ids for answer in answers] == expected
                assert any(answer.cached_tokens for answer in answers) == cached
        other = engine.put_adapter(1, subject.adapters[1])  # the slot of the first has another adapter now
        assert told(engine, [other]) == subject.answers[2]


@pytest.mark.parametrize("path", PATHS)
def test_an_adapter_with_a_number_that_is_not_finite_is_refused_and_harms_nobody(
    made: dict[str, Made], path: str, tmp_path: Path
) -> None:
    subject = made["llama"]
    with LocalEngine(subject.base, settings=through(path, ROOMY)) as engine:
        uses = put_all(engine, subject)
        for name, number in (("nan", float("nan")), ("infinite", float("inf"))):
            with pytest.raises(ModelNotServable, match="finite"):
                engine.put_adapter(4, spoilt(subject.adapters[0], tmp_path / name, number))
        assert told(engine, uses) == subject.mixed


def test_an_adapter_that_overflows_the_models_type_is_refused(made: dict[str, Made], tmp_path: Path) -> None:
    subject = made["llama"]
    with LocalEngine(subject.base, dtype="float16", settings=ROOMY) as engine:
        engine.put_adapter(1, subject.adapters[0])
        with pytest.raises(ModelNotServable, match="float16"):
            engine.put_adapter(2, spoilt(subject.adapters[0], tmp_path / "large", 1e6))


def test_bfloat16_through_the_decoder_is_no_further_from_float32_than_torch_is(made: dict[str, Made]) -> None:
    subject, found = made["llama"], {}
    for path, dtype in (("torch", "float32"), ("torch", "bfloat16"), ("native", "bfloat16")):
        with LocalEngine(subject.base, dtype=dtype, settings=through(path, ROOMY)) as engine:
            logits, inner = [], engine.engine.execute

            def execute(batch: Batch, inner=inner, logits=logits) -> torch.Tensor:
                logits.append(inner(batch).float())
                return logits[-1]

            engine.engine.execute = execute
            uses = put_all(engine, subject)
            engine.generate(prompts(), Sampling(temperature=0.0, max_tokens=1), adapters=[uses[i % 4] for i in range(6)])
            found[path, dtype] = torch.cat(logits)
    exact = found["torch", "float32"]
    ours, theirs = ((found[path, "bfloat16"] - exact).square().sum() for path in ("native", "torch"))
    assert ours <= 1.05 * theirs


def test_a_batch_says_its_adapters_and_survives_packing(made: dict[str, Made]) -> None:
    subject = made["llama"]
    seen: list[Batch] = []
    with LocalEngine(subject.base, settings=through("native", ROOMY)) as engine:
        inner = engine.engine.execute
        engine.engine.execute = lambda batch: (seen.append(batch), inner(Batch.unpack(batch.pack())))[1]
        uses = put_all(engine, subject)
        assert told(engine, uses) == subject.mixed
        mixed = len(seen)
        told(engine, [None])
    assert any(set(batch.adapters.tolist()) == {0, 1, 2, 3} for batch in seen[:mixed])
    assert all(len(batch.adapters) == 0 for batch in seen[mixed:]), "who has no adapter pays nothing"
