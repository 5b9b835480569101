"""What has to happen for a change of the desired state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ModelNotServable
from cluster.settings import Settings
from cluster.types import Deployment
from deployments.fleet import Plan, Target, find, plan
from tests.deployments.engine.families import build

CHAT = Deployment("chat", "models:/chat@champion")
TARGET = Target(CHAT, Path("/models/2"), "digest-2", "frame")


def runs(digest: str = "digest-1", frame: str = "frame") -> dict[str, str]:
    return {"digest": digest, "frame": frame, "version": "v1"}


def test_what_runs_as_wanted_is_left_alone() -> None:
    assert plan([TARGET], {"chat": runs("digest-2")}) == Plan((), (), ())


def test_new_files_are_swapped_in_and_keep_their_version() -> None:
    assert plan([TARGET], {"chat": runs()}) == Plan((), ((TARGET, "v1"),), ())


def test_anything_else_is_deployed_anew() -> None:
    assert plan([TARGET], {"chat": runs(frame="other")}) == Plan((), (), (TARGET,))
    assert plan([TARGET], {"chat": None}) == Plan((), (), (TARGET,))
    assert plan([TARGET], {}) == Plan((), (), (TARGET,))
    assert plan([TARGET], {"chat": {"digest": "of an older version"}}) == Plan((), (), (TARGET,))


def test_what_nobody_wants_is_removed() -> None:
    assert plan([], {"chat": runs(), "other": None}) == Plan(("chat", "other"), (), ())


def test_frame_is_everything_but_the_files(tmp_path: Path) -> None:
    first, second = build("llama", tmp_path / "first"), build("llama", tmp_path / "second", seed=1)
    settings = Settings(home=tmp_path)
    of = {name: find(Deployment("chat", str(path)), settings) for name, path in (("first", first), ("second", second))}
    assert of["first"].digest != of["second"].digest
    assert of["first"].frame == of["second"].frame
    other = replace(of["first"].deployment, dtype="bfloat16")
    assert find(other, settings).frame != of["first"].frame
    slower = Settings(home=tmp_path, engine={"max_sequences": 3})
    assert find(of["first"].deployment, slower).frame != of["first"].frame


def test_fp8_is_found_servable_for_gpus_and_for_nothing_else(tmp_path: Path) -> None:
    asked = Deployment("chat", str(build("llama", tmp_path / "model")), quantization="fp8")
    for device in ("cpu", "auto"):
        with pytest.raises(ModelNotServable, match=r"chat: quantization=fp8 .* engine\.device=cuda; use int8"):
            find(asked, Settings(home=tmp_path, engine={"device": device}))
    assert find(asked, Settings(home=tmp_path, engine={"device": "cuda"})).deployment == asked


def test_a_tabular_model_is_found_and_served_as_it_was_saved(iris: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    target = find(Deployment("iris", str(iris)), settings)
    assert (target.kind, target.version, target.frame) == ("predictor", "1", "")
    for wrong in (
        Deployment("iris", str(iris), tp=2),
        Deployment("iris", str(iris), pp=2),
        Deployment("iris", str(iris), dtype="bfloat16"),
        Deployment("iris", str(iris), max_model_len=9),
    ):
        with pytest.raises(ModelNotServable, match="as it was saved"):
            find(wrong, settings)
    wider = Settings(home=tmp_path, predictor={"threads": 2})
    assert find(target.deployment, wider).digest != target.digest
