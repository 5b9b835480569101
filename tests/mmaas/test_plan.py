"""`mmaas plan` as it is typed: from a config.json alone, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmaas.cli import run
from tests.deployments.engine.test_census import LLAMA_405B, QWEN25_72B


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")


def model(tmp_path: Path, entries: dict) -> str:
    (tmp_path / "config.json").write_text(json.dumps(entries))
    return str(tmp_path)


def test_a_table_with_the_best_layout_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--nodes", "4", "--gpus-per-node", "8", "--memory-per-gpu", "80GiB"]
    assert run(["plan", model(tmp_path, LLAMA_405B), *where]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("llama, 405.85 billion parameters")
    (best,) = (line for line in lines if line.startswith("best") and "GiB" in line)
    assert best.split()[1:4] == ["8", "2", "2"]
    assert any(line.startswith("best: the fewest ranks that fit (16)") for line in lines)
    assert "key/value heads" in " ".join(lines), "refused numbers of ranks are explained"
    assert "not served" not in " ".join(lines), "what is planned can be had"


def test_json_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"{model(tmp_path, QWEN25_72B)}/config.json"
    command = ["plan", path, "--gpus-per-node", "8", "--memory", "80G", "--sequences", "32", "--max-model-len", "4096", "--json"]
    assert run([*command, "--tp", "8", "--pp", "1"]) == 0
    (layout,) = json.loads(capsys.readouterr().out)["layouts"]
    assert (layout["tp"], layout["pp"], layout["nodes"]) == (8, 1, 1)
    assert layout["kv_bytes"] == 2 * 80 * 1 * 128 * 2 * 32 * 4096
    assert layout["rank_bytes"] == layout["weight_bytes"] + layout["kv_bytes"] + layout["activation_bytes"]


def test_quantised_weights_take_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", model(tmp_path, QWEN25_72B), "--gpus-per-node", "8", "--memory", "80G", "--tp", "8", "--pp", "1", "--json"]
    sizes = []
    for more in ([], ["--quantization", "int8"]):
        assert run([*command, *more]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["layouts"][0]["weight_bytes"])
    whole = 2 * 152064 * 8192 * (1 + 1 / 8)  # embeddings on every rank and its part of the output, at 16 bits
    assert sizes[1] - whole == pytest.approx((sizes[0] - whole) / 2, rel=0.01)


def test_fp8_is_planned_for_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """That are described, or that the settings promise."""
    command = ["plan", model(tmp_path, QWEN25_72B), "--quantization", "fp8", "--json"]
    assert run([*command, "--gpus-per-node", "8", "--memory", "80G"]) == 0
    assert json.loads(capsys.readouterr().out)["load"]["quantization"] == "fp8"
    monkeypatch.setenv("MMAAS_ENGINE__DEVICE", "cuda")
    run(command)
    assert json.loads(capsys.readouterr().out)["load"]["quantization"] == "fp8"


def test_nothing_that_fits_is_status_1_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", model(tmp_path, QWEN25_72B), "--memory", "24GiB"]) == 1
    assert "nothing fits" in capsys.readouterr().out


def test_without_a_cluster_this_machine_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = LLAMA_405B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    assert run(["plan", model(tmp_path, small), "--max-model-len", "512"]) == 0
    assert "this machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "4"], "need --memory"),
        (["--memory", "much"], "is no size"),
        (["--dtype", "int3"], "dtype must be one of"),
        (["--quantization", "int3"], "not one of int8, fp8"),
        (["--quantization", "fp8"], "engine.device=cuda; use int8"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(["plan", model(tmp_path, QWEN25_72B), *arguments]) == 1
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_model_that_is_not_here_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "/nowhere/model"]) == 1
    assert "is not here" in capsys.readouterr().err
