"""What the replica tells its engine of a call. The replica as a whole is tested end to end."""

from __future__ import annotations

from types import SimpleNamespace

from cluster.settings import EngineSettings
from cluster.types import Deployment, Generate, Sampling
from deployments.engine.checkpoint import ModelInfo
from deployments.engine.messages import Request
from deployments.llm import LLM, bundles


def replica() -> LLM:
    llm: LLM = object.__new__(LLM)
    llm._cache_secret = b"secret"
    llm._defaults, llm._room = {}, 100
    llm._model = SimpleNamespace(vocab_size=50)  # type: ignore[assignment]
    llm._tokenizer = SimpleNamespace(eos_ids=[1])  # type: ignore[assignment]
    llm._life = SimpleNamespace(engine=SimpleNamespace(next_id=lambda: 7))  # type: ignore[assignment]
    return llm


async def prepared(tenant: str, **more: object) -> Request:
    return await replica()._prepare(Generate("r", tenant, prompt_ids=(2, 3), sampling=Sampling(max_tokens=4), **more))  # type: ignore[arg-type]


async def test_engine_knows_tenants_apart_and_never_by_name() -> None:
    one, again, other = await prepared("acme"), await prepared("acme"), await prepared("umbrella")
    assert (one.tenant, one.salt) == (again.tenant, again.salt)
    assert len({one.tenant, one.salt, other.tenant, other.salt}) == 4, "a name for each use"
    assert not any(b"acme" in name for name in (one.tenant, one.salt))


async def test_class_of_service_reaches_the_engine() -> None:
    assert (await prepared("acme", priority="batch")).priority == "batch"
    assert (await prepared("acme")).priority == "interactive"


def test_a_stage_is_one_bundle_with_the_memory_of_its_part() -> None:
    """A bundle is never torn over nodes; stages may be."""
    model = ModelInfo("llama", "LlamaForCausalLM", 4, 64, 4, 2, 16, 100, 160, 1000, 4000, "float32")
    engine = EngineSettings(kv_cache_bytes=1 << 20, block_size=16, cpus_per_shard=0.5, max_sequences=2)
    assert bundles(Deployment("m", "/m", tp=2), model, engine) == [{"CPU": 0.5}] * 2
    cached = 2 * 160 * model.kv_bytes_per_token  # two sequences of the longest kind: less than the cache could hold
    expected = {"CPU": 1.0, "memory": (4000 + cached) / 2}
    assert bundles(Deployment("m", "/m", tp=2, pp=2), model, engine) == [expected] * 2
