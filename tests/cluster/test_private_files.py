from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import SettingsError
from cluster.private_files import Secrets, private_directory, read_private, write_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def _open_umask() -> object:
    before = os.umask(0)
    yield
    os.umask(before)


def test_secrets_are_private_stay_the_same_and_differ(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path)
    found = [secrets.pepper, secrets.prefix_cache, secrets.ray_token_path.read_bytes()]
    again = Secrets(tmp_path)
    assert found == [again.pepper, again.prefix_cache, again.ray_token_path.read_bytes()]
    assert len(set(found)) == 3
    assert all(len(bytes.fromhex(secret.decode())) == 32 for secret in found)
    assert mode(tmp_path / "secrets") == 0o700
    assert {mode(path) for path in (tmp_path / "secrets").iterdir()} == {0o600}


def test_a_secret_that_others_could_read_is_refused(tmp_path: Path) -> None:
    path = Secrets(tmp_path).ray_token_path
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="mode 0640"):
        _ = Secrets(tmp_path).ray_token_path


def test_processes_that_start_at_once_agree_on_the_secret(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from cluster.private_files import Secrets; print(Secrets(Path(sys.argv[1])).pepper)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    started = [subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE) for _ in range(4)]
    assert len({process.communicate()[0] for process in started}) == 1
    assert [path.name for path in (tmp_path / "secrets").iterdir()] == ["pepper"]


def test_writing_replaces_whole_files_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    write_private(path, b"new")
    assert read_private(path) == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_made_private_even_if_it_was_open(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o777)
    assert mode(private_directory(tmp_path / "home")) == 0o700


def test_a_link_to_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(SettingsError, match="not a directory of user"):
        private_directory(tmp_path / "link")
