from __future__ import annotations

import io
import json
import stat
from pathlib import Path

import pytest
from rich.console import Console

from cluster import settings
from cluster.desired import Desired
from cluster.errors import InvalidRequest
from cluster.private_files import Secrets
from cluster.tenancy.keys import Keys
from cluster.types import Deployment
from mmaas.audited import audit_of
from mmaas.quickstart import Quickstart
from mmaas.up import Asked, deployment_of, opened_store, up
from tests.cluster.tenancy.watching import watching
from tests.fakes import FakePlatform


@pytest.fixture
def loaded(tmp_path: Path) -> settings.Settings:
    return settings.load(home=tmp_path / "home")


def run(loaded: settings.Settings, platform: FakePlatform, asked: Asked = Asked()) -> str:  # noqa: B008 - frozen
    output = io.StringIO()
    up(loaded, asked, Console(file=output, width=200), platform)
    return output.getvalue()


def wanted(loaded: settings.Settings) -> list[Deployment]:
    with opened_store(loaded) as store:
        return Desired(store).list()


def test_first_time_starts_trains_deploys_and_prints_how_to_call(loaded: settings.Settings) -> None:
    platform = FakePlatform()
    printed = run(loaded, platform)
    assert platform.steps == ["start", "train", "register", "table", "apply"]
    assert [(d.name, d.model, d.tp) for d in wanted(loaded)] == [
        ("chat", "models:/chat@champion", 2),
        ("iris", "models:/iris@champion", 1),
        ("minilm", "models:/minilm@champion", 1),
    ]
    quickstart = Quickstart.load(loaded)
    assert quickstart.api_key in printed
    assert quickstart.admin_key not in printed
    assert f"curl -N {loaded.base_url}/v1/chat/completions" in printed
    assert '"stream": true' in printed
    assert f"curl {loaded.base_url}/v1/embeddings" in printed
    assert f"curl {loaded.base_url}/v2/models/iris/infer" in printed


def test_without_the_package_no_encoder_is_served_and_that_is_said(loaded: settings.Settings) -> None:
    printed = run(loaded, FakePlatform(has_package=False))
    assert [deployment.name for deployment in wanted(loaded)] == ["chat", "iris"]
    assert "No encoder is served" in printed
    assert "/v1/embeddings" not in printed


def test_an_encoders_directory_is_shown_with_the_call_that_it_answers(loaded: settings.Settings, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForSequenceClassification"]}')
    printed = run(loaded, FakePlatform(), Asked(str(tmp_path), name="judge"))
    assert "/v1/classify" in printed
    assert "/v1/chat" not in printed


def test_a_tabular_models_directory_is_shown_with_how_to_ask_what_it_takes(loaded: settings.Settings, tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {}")
    printed = run(loaded, FakePlatform(), Asked(str(tmp_path), name="risk"))
    assert "/v2/models/risk " in printed
    assert "/v1/chat" not in printed


def test_the_keys_work_and_only_the_admin_key_is_an_admins(loaded: settings.Settings) -> None:
    run(loaded, FakePlatform())
    quickstart = Quickstart.load(loaded)
    with opened_store(loaded) as store:
        keys = Keys(store, Secrets(loaded.home).pepper)
        assert keys.verify(quickstart.api_key).scopes == {"inference"}
        assert keys.verify(quickstart.admin_key).can("admin")


def test_what_it_makes_is_recorded(loaded: settings.Settings) -> None:
    with opened_store(loaded) as store:
        audit = audit_of(store, loaded)
        with watching(store, audit) as seen:
            run(loaded, FakePlatform())
    seen.check()
    assert sorted({*seen.actions}) == ["api_key.created", "model.deployed", "service_account.created"]


def test_quickstart_is_private_and_complete(loaded: settings.Settings) -> None:
    run(loaded, FakePlatform())
    path = loaded.home / "quickstart.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(json.loads(path.read_text())) == {"base_url", "api_key", "admin_key", "model"}


def test_second_time_does_nothing_and_shows_no_key(loaded: settings.Settings) -> None:
    platform = FakePlatform()
    run(loaded, platform)
    before = (loaded.home / "quickstart.json").read_bytes()
    printed = run(loaded, platform)
    assert platform.steps == ["start", "train", "register", "table", "apply"]
    assert "Already up" in printed
    assert "mk_" not in printed
    assert (loaded.home / "quickstart.json").read_bytes() == before


def test_after_down_it_comes_up_again_with_the_same_keys_and_without_training(loaded: settings.Settings) -> None:
    run(loaded, FakePlatform())
    before = Quickstart.load(loaded)
    again = FakePlatform(champion=True)
    printed = run(loaded, again)
    assert again.steps == ["start", "apply"]
    assert Quickstart.load(loaded) == before
    assert "mk_" not in printed


def test_a_lost_quickstart_gets_fresh_keys(loaded: settings.Settings) -> None:
    run(loaded, FakePlatform())
    old = Quickstart.load(loaded)
    (loaded.home / "quickstart.json").unlink()
    printed = run(loaded, FakePlatform(champion=True))
    assert Quickstart.load(loaded).api_key != old.api_key
    assert Quickstart.load(loaded).api_key in printed


def test_revoked_quickstart_keys_are_replaced(loaded: settings.Settings) -> None:
    run(loaded, FakePlatform())
    old = Quickstart.load(loaded)
    with opened_store(loaded) as store:
        keys = Keys(store, Secrets(loaded.home).pepper)
        keys.revoke(keys.verify(old.api_key).key_id)
    run(loaded, FakePlatform(champion=True))
    assert Quickstart.load(loaded).api_key != old.api_key


def test_a_model_directory_is_served_without_training(loaded: settings.Settings, tmp_path: Path) -> None:
    (tmp_path / "My Model").mkdir()
    platform = FakePlatform()
    run(loaded, platform, Asked(str(tmp_path / "My Model"), tp=2, dtype="bfloat16"))
    assert platform.steps == ["start", "apply"]
    assert [(d.name, d.model, d.tp, d.dtype) for d in wanted(loaded)] == [("my-model", str(tmp_path / "My Model"), 2, "bfloat16")]
    assert Quickstart.load(loaded).model == "my-model"


def test_changing_how_a_running_model_is_served_applies_again(loaded: settings.Settings, tmp_path: Path) -> None:
    platform = FakePlatform()
    run(loaded, platform, Asked(str(tmp_path), name="m"))
    run(loaded, platform, Asked(str(tmp_path), name="m"))
    assert platform.applied == 1
    run(loaded, platform, Asked(str(tmp_path), name="m", tp=2))
    assert platform.applied == 2
    run(loaded, platform, Asked(str(tmp_path), name="m", tp=2, pp=3))
    assert (platform.applied, [(d.tp, d.pp) for d in wanted(loaded)]) == (3, [(2, 3)])


def test_quantised_weights_are_asked_for_by_name(loaded: settings.Settings, tmp_path: Path) -> None:
    run(loaded, FakePlatform(), Asked(str(tmp_path), name="m", quantization="int8"))
    assert [deployment.quantization for deployment in wanted(loaded)] == ["int8"]


@pytest.mark.parametrize(
    "asked",
    [
        Asked(tp=2),
        Asked(pp=2),
        Asked(quantization="int8"),
        Asked("/", "m", quantization="int3"),
        Asked("/nowhere/at/all"),
        Asked("/", name="No Name"),
    ],
)
def test_what_can_not_be_meant_is_refused(loaded: settings.Settings, asked: Asked) -> None:
    with pytest.raises(InvalidRequest):
        run(loaded, FakePlatform(), asked)


def test_name_of_a_directory_is_made_from_its_last_part(tmp_path: Path) -> None:
    directory = tmp_path / "Qwen3 0.6B__Instruct!"
    directory.mkdir()
    assert deployment_of(str(directory), Asked()).name == "qwen3-0.6b__instruct"
