from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster import settings
from cluster.desired import Desired
from cluster.errors import InvalidRequest, PlatformError, Unavailable
from cluster.tenancy.audit import keep_head
from cluster.tenancy.kept_files import KeptCall, KeptFiles
from cluster.types import Deployment
from deployments.gateway.exchange import new_request_id
from mmaas.audited import audit_of
from mmaas.cli import run
from mmaas.commands import chat
from mmaas.commands.models import located, parse_replicas
from mmaas.up import opened_store
from tests.deployments.engine.families import build
from tests.deployments.engine.lora import plain_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in [name for name in os.environ if name.startswith("MMAAS_")]:
        monkeypatch.delenv(name)
    for number, section in enumerate(("RAY__GCS", "RAY__DASHBOARD", "RAY__CLIENT", "MLFLOW_", "GATEWAY_")):
        monkeypatch.setenv(f"MMAAS_{section}_PORT", str(21800 + number))
    monkeypatch.setenv("MMAAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "home"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in (
        "up",
        "down",
        "status",
        "doctor",
        "deploy",
        "undeploy",
        "adapters",
        "organizations",
        "projects",
        "users",
        "keys",
        "chat",
        "train",
    ):
        assert f" {command} " in printed


def test_help_loads_only_what_it_shows() -> None:
    program = "import sys; sys.argv = ['mmaas', '--help']\nfrom mmaas.cli import run\nrun(['--help'])\nprint('|'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.splitlines()[-1].split("|"))
    assert "typer" in loaded
    assert not loaded & {"ray", "torch", "mlflow", "sqlalchemy", "pydantic", "httpx", "psutil", "transformers"}


def test_help_takes_few_times_the_work_of_an_empty_python() -> None:
    """In processor time: on a busy machine the clock on the wall punishes whatever lasts longer than one slice."""

    def least_work(*arguments: str) -> float:
        work = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            work.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(work)

    with_nothing, with_help = least_work("-c", "pass"), least_work("-m", "mmaas", "--help")
    assert with_help < 25 * with_nothing, f"{with_help:.3f} s of work against {with_nothing:.3f} s for an empty program"


def test_acts_of_the_command_line_are_in_the_audit_log(capsys: pytest.CaptureFixture[str], tmp_path: Path, home: Path) -> None:
    assert run(["keys", "create", "--name", "ci", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert run(["keys", "revoke", made["id"]]) == 0
    capsys.readouterr()
    assert run(["audit", "list", "--json"]) == 0
    revoked, created, account = json.loads(capsys.readouterr().out)
    assert (created["action"], created["target"], created["project"]) == ("api_key.created", made["id"], "default")
    assert (revoked["action"], revoked["target"], revoked["actor"]["kind"]) == ("api_key.deleted", made["id"], "session")
    assert account["action"] == "service_account.created"
    assert made["key"] not in (home / "mmaas.db").read_bytes().decode("latin-1")
    assert run(["audit", "verify"]) == 0
    assert "3 records" in capsys.readouterr().out


def test_an_exported_log_is_proved_elsewhere_and_a_changed_one_is_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["keys", "create"]) == 0
    exported = tmp_path / "audit.jsonl"
    assert run(["audit", "export", str(exported)]) == 0
    key = re.search(r"--public-key ([0-9a-f]{64})", capsys.readouterr().out)
    assert key
    monkeypatch.setenv("MMAAS_HOME", str(tmp_path / "elsewhere"))
    command = ["audit", "verify", str(exported), "--public-key", key[1]]
    assert run(command) == 0
    assert not (tmp_path / "elsewhere").exists()
    exported.write_text(exported.read_text().replace("api_key.created", "api_key.updated"))
    assert run(command) == 1
    assert "the record was changed" in capsys.readouterr().out
    assert run(["audit", "export", str(exported)]) == 1


def test_a_log_that_was_cut_off_is_found_by_the_head_outside_of_the_database(
    capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    assert run(["keys", "create"]) == 0
    loaded = settings.load()
    with opened_store(loaded) as store:
        keep_head(audit_of(store, loaded), home / "audit" / "head.json")
        store.downgrade("0004")
    assert run(["audit", "verify"]) == 1
    assert "cut off" in capsys.readouterr().out


def test_consents_are_given_and_kept_calls_shown_and_forgotten(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    call = KeptCall(new_request_id(), 1.0, "acme", "k", "/v1/completions", "m", 200, True, '{"a": 1}', '{"b": 2}')
    assert run(["kept", "allow", "acme", "--share", "0.5", "--days", "7", "--redaction", "contacts"]) == 0
    KeptFiles(home / "kept").write([call])
    assert run(["kept", "show", "acme", call.request_id]) == 0
    assert json.loads(capsys.readouterr().out)["input"] == {"a": 1}
    assert run(["kept", "show", "other", call.request_id]) == 1
    assert run(["kept", "forget", "acme"]) == 0
    assert run(["kept", "show", "acme", call.request_id]) == 1
    capsys.readouterr()
    assert run(["kept", "list", "--json"]) == 0
    [consent] = json.loads(capsys.readouterr().out)
    assert (consent["share"], consent["keep_s"], consent["redaction"]) == (0, 7 * 86400, "contacts")
    assert run(["audit", "list", "--json"]) == 0
    acts = [record["action"] for record in json.loads(capsys.readouterr().out)]
    assert acts == ["kept_calls.forgotten", "project.updated", "kept_call.read", "project.updated"]
    assert run(["kept", "allow", "acme", "--share", "0.5", "--redaction", "nothing"]) == 1


def test_keys_are_made_listed_and_revoked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["projects", "create", "acme", "--json"]) == 0
    project = json.loads(capsys.readouterr().out)["id"]
    assert run(["keys", "create", "--project", project, "--name", "ci", "--model", "chat", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert re.fullmatch(r"mk_[0-9a-f]{84}", made["key"])
    assert run(["keys", "revoke", made["id"]]) == 0
    capsys.readouterr()
    assert run(["keys", "list", "--json"]) == 0
    listed = capsys.readouterr().out
    shown = [(key["project"], key["name"], key["scopes"], key["models"]) for key in json.loads(listed)]
    assert shown == [(project, "ci", ["inference"], ["chat"])]
    assert json.loads(listed)[0]["revoked_at"]
    assert made["key"][15:] not in listed


def test_a_key_is_rotated_and_an_admin_key_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> Any:
        assert run([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    old = said("keys", "create")["id"]
    new = said("keys", "rotate", old, "--hours", "1")
    assert new["replaces"] == old
    admin = said("keys", "create", "--admin")["id"]
    keys = {key["id"]: key for key in said("keys", "list")}
    assert keys[old]["expires_at"]
    assert keys[new["id"]]["owner"] == keys[old]["owner"]
    assert (keys[admin]["project"], keys[admin]["scopes"]) == (None, ["admin"])
    assert run(["keys", "list"]) == 0
    assert old in capsys.readouterr().out


def test_people_are_invited_come_in_and_leave(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> Any:
        assert run([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    organization = said("organizations", "create", "Acme")["id"]
    assert [one["name"] for one in said("organizations", "list")] == ["default", "Acme"]
    place = ("--organization", organization)
    project = said("projects", "create", "web", *place)["id"]
    assert [one["id"] for one in said("projects", "list", *place)] == [project]
    token = said("users", "invite", "ada@example.org", "--project", f"{project}=developer", *place)["token"]
    ada = said("users", "accept", token, "--name", "Ada")["id"]
    assert run(["users", "role", ada, "auditor", *place]) == 0
    capsys.readouterr()
    assert [(one["id"], one["role"]) for one in said("users", "list", *place)] == [(ada, "auditor")]
    said("keys", "create", "--project", project, "--user", ada)
    assert run(["users", "remove", ada, *place]) == 0
    assert run(["projects", "archive", project, *place]) == 0
    capsys.readouterr()
    assert said("users", "list", *place) == said("projects", "list", *place) == []


def test_errors_of_the_platform_are_one_line_and_status_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "revoke", "nope"]) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == "mmaas: there is no key 'nope'\n"


def test_errors_are_json_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAAS_GATEWAY__PROT", "1")
    assert run(["status", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "invalid_settings"
    assert "gateway.port" in error["message"]


def test_wrong_usage_is_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["deploy"]) == 2
    assert run(["no-such-command"]) == 2
    capsys.readouterr()


def test_status_before_the_first_up_says_down_and_makes_nothing(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert run(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parts"] == {"ray": False, "mlflow": False}
    assert found["models"] == []
    assert not (home / "mmaas.db").exists()


def test_doctor_writes_findings_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert checks["python"]["status"] == "ok"
    assert checks["Ray"]["advice"] == "run: mmaas up"
    assert all(check["advice"] for check in checks.values() if check["status"] != "ok")


def test_down_with_nothing_running_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["down"]) == 0
    assert "Nothing was running" in capsys.readouterr().out


def test_deploy_of_a_registered_model_needs_the_library_and_keeps_nothing_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["deploy", "chat", "--model", "models:/chat@champion", "--tp", "2", "--replicas", "1..2"]
    assert run(arguments) == 1
    assert "not up" in capsys.readouterr().err
    assert run(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == []


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1..4", (1, 4)), ("0..1", (0, 1))])
def test_replicas_are_a_number_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert parse_replicas(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1..", "-1", "1...2", "1..2..3"])
def test_other_replicas_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_replicas(text)


def test_models_are_references_or_directories(tmp_path: Path) -> None:
    assert located("models:/chat/3") == "models:/chat/3"
    assert located(str(tmp_path)) == str(tmp_path)
    for wrong in ("models:/chat", "/nowhere"):
        with pytest.raises(InvalidRequest):
            located(wrong)


def test_ctrl_c_ends_with_130() -> None:
    program = (
        "import os, signal, sys, threading\nfrom mmaas import cli\nfrom mmaas.commands import platform\n"
        "@cli.app.command()\ndef wait() -> None:\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n    threading.Event().wait(20)\n"
        "sys.exit(cli.run(['wait']))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 128 + signal.SIGINT
    assert "Traceback" not in result.stderr
    assert "mmaas up" in result.stderr


def client(status: int, body: str) -> httpx.Client:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, text=body))
    return httpx.Client(base_url="http://here/v1/", transport=transport)


def test_chat_joins_the_deltas_of_a_stream() -> None:
    events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    events += [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo")] + [{"choices": []}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    assert "".join(chat.stream(client(200, body), {})) == "Hello"


def test_chat_shows_the_servers_own_message() -> None:
    with pytest.raises(PlatformError, match="no such model"):
        list(chat.stream(client(404, '{"error": {"message": "no such model"}}'), {}))
    with pytest.raises(PlatformError, match="replica died"):
        list(chat.stream(client(200, 'data: {"error": {"message": "replica died"}}\n\n'), {}))


def test_chat_says_when_nothing_answers() -> None:
    with httpx.Client(base_url="http://127.0.0.1:9/v1/") as nobody, pytest.raises(Unavailable, match="does not answer"):
        list(chat.stream(nobody, {}))


def test_chat_lets_no_answer_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert chat._print_all(iter(["a\x1b[2J", "b\n"])) == "a\x1b[2Jb\n"
    assert "\x1b" not in capsys.readouterr().out


def test_adapters_are_added_listed_and_removed(capsys: pytest.CaptureFixture[str], home: Path, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    directory = plain_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    with opened_store(settings.load()) as store:
        Desired(store).put(Deployment("chat", str(base)))
    assert run(["adapters", "add", "german", "--base", "chat", "--path", str(directory)]) == 0
    assert "chat:german" in capsys.readouterr().out
    assert run(["adapters", "list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["model"] == "chat:german"
    kept = home / "library" / "objects" / listed["address"] / "files"
    assert sorted(path.name for path in kept.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert run(["adapters", "remove", "german", "--base", "chat"]) == 0
    assert run(["adapters", "remove", "german", "--base", "chat"]) == 1
    capsys.readouterr()
    assert run(["adapters", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_an_adapter_that_does_not_fit_is_not_kept(capsys: pytest.CaptureFixture[str], home: Path, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    directory = plain_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_dora": true}')
    with opened_store(settings.load()) as store:
        Desired(store).put(Deployment("chat", str(base)))
    for name, of, path, reason in (
        ("german", "chat", str(directory), "use_dora"),
        ("german", "other", str(directory), "other"),
        ("german", "chat", str(tmp_path / "nowhere"), "no directory"),
    ):
        assert run(["adapters", "add", name, "--base", of, "--path", path]) == 1
        assert reason in capsys.readouterr().err
    assert not (home / "library").exists()
