from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from cluster import doctor, settings
from cluster.ports import Listener

GIB = 1 << 30


def test_pins_are_those_of_the_project_file() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    pinned = {
        re.split(r"[\[=]", line)[0]: line.split("==")[1].removesuffix(".*") for line in project["dependencies"] if "==" in line
    }
    assert pinned == doctor.PINS


def test_an_old_python_fails() -> None:
    assert doctor.check_python((3, 10, 2)).status == "fail"
    assert doctor.check_python((3, 11, 0)).status == "ok"


def test_missing_and_other_versions_are_told_apart() -> None:
    versions = {
        "ray": "2.60.1",
        "torch": "2.13.0+cpu",
        "deepspeed": "0.190",
        "transformers": None,
        "mlflow": "3.17.2",
        "scikit-learn": "1.9.0",
    }
    found = {check.name.removeprefix("package "): check.status for check in doctor.check_packages(versions.get)}
    assert found == {"ray": "ok", "torch": "ok", "deepspeed": "warn", "transformers": "fail", "mlflow": "ok", "scikit-learn": "ok"}


def test_a_missing_compiler_explains_what_is_lost() -> None:
    check = doctor.check_compiler({"ninja": "/usr/bin/ninja"}.get)
    assert check.status == "warn"
    assert "g++" in check.seen
    assert "gloo" in check.advice
    assert doctor.check_compiler({"c++": "/usr/bin/c++"}.get).status == "ok"


def test_a_home_that_others_can_enter_fails(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert doctor.check_home(home).status == "ok"
    home.mkdir(mode=0o755)
    assert "chmod 700" in doctor.check_home(home).advice
    home.chmod(0o700)
    (home / "secrets").mkdir(mode=0o700)
    (home / "secrets" / "pepper").touch(mode=0o644)
    assert "pepper" in doctor.check_home(home).seen
    (home / "secrets" / "pepper").chmod(0o600)
    assert doctor.check_home(home).status == "ok"


@pytest.mark.parametrize(("free", "status"), [(1, "fail"), (5, "warn"), (50, "ok")])
def test_disk_is_judged_by_what_is_free(free: int, status: str) -> None:
    assert doctor.check_disk(free * GIB).status == status


def test_little_memory_warns() -> None:
    assert [doctor.check_memory(GIB).status, doctor.check_memory(8 * GIB).status] == ["warn", "ok"]


def test_the_fallback_of_the_ingress_is_explained() -> None:
    assert "slower" in doctor.check_ingress(True, None).advice
    assert doctor.check_ingress(False, Path("/h")).status == "warn"
    assert doctor.check_ingress(True, Path("/h")).status == "ok"


def test_ray_without_token_fails() -> None:
    assert doctor.check_token(200).status == "fail"
    assert doctor.check_token(401).status == "ok"


def test_only_the_gateway_may_be_reachable_from_outside(tmp_path: Path) -> None:
    inside, gateway = Listener("127.0.0.1", 6379, 1, "gcs"), Listener("0.0.0.0", 8000, 2, "haproxy")
    private, public = settings.load(home=tmp_path), settings.load(home=tmp_path, gateway={"host": "0.0.0.0"})
    assert doctor.check_listeners([inside], private).status == "ok"
    assert doctor.check_listeners([inside, gateway], private).status == "fail"
    assert doctor.check_listeners([inside, gateway], public).status == "ok"
    assert doctor.check_listeners([Listener("0.0.0.0", 9101, 2, "haproxy")], public).status == "fail"
