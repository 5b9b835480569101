"""A model in stages, one after the other in this process: logits are those of the whole model to the last bit, each stage reads its
own weights alone, and they are as many as `mmaas plan` says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from deployments.engine import copies
from deployments.engine.attention import KvCache
from deployments.engine.batch import Batch
from deployments.engine.census import take
from deployments.engine.checkpoint import inspect
from deployments.engine.families import STAGEABLE
from deployments.engine.layouts import rank_sizes
from deployments.engine.load import load
from deployments.engine.progress import Progress
from deployments.engine.runner import Runner
from deployments.engine.stages import Place
from tests.deployments.engine.families import build_tokenizer
from tests.deployments.engine.tiny import build

OFF = EngineSettings(cut_weights_bytes=0)
FEW = ["llama", "gemma2", "granite", "gpt_neox", "opt", "phi3", "qwen3_moe", "smollm3"]
BATCH = Batch(
    np.arange(3, 23, dtype=np.int32),
    np.zeros(2, np.int32),
    np.array([12, 8], np.int32),
    np.arange(2, dtype=np.int32),
    np.array([[0, 1, 2], [3, 4, 5]], np.int32),
)


@dataclass
class Lone:
    """The group of a rank whose others aren't there."""

    place: Place
    rank: int = 0
    size: int = 0

    def all_agree(self, mine: bool) -> bool:
        return mine


@dataclass
class Box:
    """A handover between stages of one process."""

    streams: list[torch.Tensor] = field(default_factory=list)

    def take(self, tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        stream = self.streams.pop(0)
        assert (stream.shape, stream.dtype) == ((tokens, width), dtype)
        return stream

    def give(self, stream: torch.Tensor) -> None:
        self.streams.append(stream.clone())


@dataclass
class Stage:
    model: Any
    progress: Progress
    out: torch.Tensor


def staged(directory: Path, pp: int, settings: EngineSettings = OFF, dtype: str = "float32") -> list[Stage]:
    """The stages from the first to the last, with what each made of the batch."""
    box, found = Box(), []
    for rank in reversed(range(pp)):
        progress = Progress()
        model = load(directory, dtype, Lone(Place(rank, 1, pp)) if pp > 1 else None, settings, progress)  # type: ignore[arg-type]
        out = Runner(model, KvCache(8, 4), box if pp > 1 else None).run(BATCH)  # type: ignore[arg-type]
        found.append(Stage(model, progress, out))
    assert box.streams == []
    return found


def check(directory: Path, pp: int) -> None:
    (whole,) = staged(directory, 1)
    stages = staged(directory, pp)
    assert torch.equal(stages[-1].out, whole.out)
    census = take(directory)
    for number, stage in enumerate(stages):
        held = sum(tensor.numel() for tensor in stage.model.parameters())
        assert held == rank_sizes(census, 1, pp, 1)[number, 0]
        stored = sum(tensor.nbytes for tensor in stage.model.state_dict().values())  # a few have buffers besides
        now = stage.progress.now()
        assert now.source == "model"
        assert now.bytes_read == now.bytes_total == stored, "every byte of the stage is read once, and no other"
        assert not any(tensor.is_meta for tensor in stage.model.state_dict().values())


@pytest.mark.parametrize("family", FEW)
def test_stages_give_the_logits_of_the_whole_model(tmp_path: Path, family: str) -> None:
    build(family).save_pretrained(tmp_path)
    check(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(STAGEABLE))
def test_every_family_that_is_said_to_can_be_cut_into_stages(tmp_path: Path, family: str) -> None:
    build(family).save_pretrained(tmp_path)
    for pp in (2, 4):
        check(tmp_path, pp)


def test_tied_words_are_with_the_first_stage_and_with_the_last(tmp_path: Path) -> None:
    build("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    check(tmp_path, 2)
    first, last = staged(tmp_path, 2)
    assert torch.equal(first.model.model.embed_tokens.weight, last.model.lm_head.weight)
    assert "model.norm.weight" not in first.model.state_dict()
    assert "model.embed_tokens.weight" not in last.model.state_dict()


def test_a_stage_is_kept_for_the_next_start_apart_from_other_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "WORTH_BYTES", 0)
    build("qwen2").save_pretrained(tmp_path / "model")
    settings = EngineSettings(cache=tmp_path / "cache")
    sources = []
    for pp in (2, 3, 2, 3):
        stages = staged(tmp_path / "model", pp, settings, "bfloat16")
        sources.append({stage.progress.now().source for stage in stages})
    assert sources == [{"model"}, {"model"}, {"copy"}, {"copy"}]


@pytest.mark.parametrize(("pp", "why"), [(0, "1 to 4"), (5, "1 to 4"), (2, "untested")])
def test_what_can_not_be_cut_into_stages_is_refused(tmp_path: Path, pp: int, why: str) -> None:
    build("cohere2" if pp == 2 else "llama").save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    if pp == 2:
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace('"cohere2"', '"cohere9"'))
    with pytest.raises(ModelNotServable, match=why):
        inspect(tmp_path, tp=1, pp=pp, dtype="float32")
