from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import settings, settings_page
from cluster.errors import SettingsError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in settings.os.environ if name.startswith("MMAAS_")]:
        monkeypatch.delenv(name)


def test_defaults_put_everything_on_loopback_under_the_working_directory(tmp_path: Path) -> None:
    loaded = settings.load()
    assert loaded.home == tmp_path / ".mmaas"
    assert loaded.store_url == f"sqlite:///{tmp_path}/.mmaas/mmaas.db"
    assert loaded.base_url == "http://127.0.0.1:8000"
    assert loaded.mlflow_uri == "http://127.0.0.1:5000"


def test_argument_beats_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("log_level: ERROR\ngateway: {port: 1111, max_ongoing: 7}\nmlflow: {port: 1112}\n")
    monkeypatch.setenv("MMAAS_HOME", str(tmp_path))
    monkeypatch.setenv("MMAAS_GATEWAY__PORT", "2222")
    monkeypatch.setenv("MMAAS_LOG_LEVEL", "WARNING")
    loaded = settings.load(log_level="DEBUG")
    assert (loaded.log_level, loaded.gateway.port, loaded.mlflow.port) == ("DEBUG", 2222, 1112)
    assert loaded.gateway.max_ongoing == 7, "a section's other keys must survive"
    assert loaded.ray.gcs_port == 6379


@pytest.mark.parametrize(
    ("variable", "near"),
    [("MMAAS_GATEWAY__PROT", "gateway.port"), ("MMAAS_LOG_LEVL", "log_level"), ("MMAAS_ENGINE__BLOCKSIZE", "engine.block_size")],
)
def test_unknown_variable_names_the_nearest_key(monkeypatch: pytest.MonkeyPatch, variable: str, near: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SettingsError, match=f"{variable}.*did you mean '{near}'"):
        settings.load()


def test_unknown_key_in_the_file_names_file_and_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("gateway:\n  max_stream: 5\n")
    monkeypatch.setenv("MMAAS_CONFIG", str(file))
    with pytest.raises(SettingsError, match=r"own\.yaml.*gateway\.max_stream.*gateway\.max_stream_s"):
        settings.load()


def test_named_file_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAAS_CONFIG", "/nowhere/settings.yaml")
    with pytest.raises(SettingsError, match="not a file"):
        settings.load()


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", "\x00"])
def test_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(SettingsError):
        settings.load(home=tmp_path)


def test_values_out_of_range_and_contradictions_are_errors() -> None:
    with pytest.raises(SettingsError, match=r"gateway\.port"):
        settings.load(gateway={"port": 80})
    with pytest.raises(SettingsError, match="needs Postgres"):
        settings.load(gateway={"replicas": 2})
    assert settings.load(gateway={"replicas": 2}, database_url="postgresql+psycopg://host/db").gateway.replicas == 2


def test_settings_are_frozen() -> None:
    loaded = settings.load()
    with pytest.raises(ValueError, match="frozen"):
        loaded.gateway.port = 1  # type: ignore[misc]


@given(st.text(min_size=1, max_size=30))
def test_any_unknown_key_is_refused(key: str) -> None:
    if key not in settings.known_keys():
        with pytest.raises(SettingsError):
            settings.load(**{key: 1})


def test_every_setting_is_documented() -> None:
    for model in [settings.Settings, *(field.annotation for field in settings.Settings.model_fields.values())]:
        for name, field in getattr(model, "model_fields", {}).items():
            assert field.description, f"{model}.{name} has no docstring"


def test_the_page_of_settings_is_up_to_date() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page.page(), (
        "run: python -m cluster.settings_page > docs/settings.md"
    )
