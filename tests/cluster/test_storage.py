"""Storage is judged by what a reader finds after the publisher died at any step, or after bytes went bad."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest, NotFound, PlatformError, StorageError
from cluster.manifest import Manifest
from cluster.storage import Storage


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


OLD = {"config.json": b"{}", "weights/part-1.bin": b"old" * 100}
NEW = {"config.json": b'{"a": 1}', "weights/part-1.bin": b"new" * 200, "weights/part-2.bin": b"more"}


def test_fetch_gives_exactly_what_was_published(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "root")
    manifest = storage.publish(folder(tmp_path / "in", NEW), "chat")
    assert contents(storage.fetch("chat")) == NEW
    assert storage.verify("chat") == manifest == Manifest.of(storage.fetch("chat"))
    assert storage.list() == ["chat"]


def test_a_new_root_is_its_users_alone_and_one_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o770)
    for root, mode in ((tmp_path / "own" / "root", 0o700), (shared, 0o770)):
        Storage(root)
        assert root.stat().st_mode & 0o777 == mode


def test_a_cache_that_others_may_enter_is_closed_before_files_are_fetched_into_it(tmp_path: Path) -> None:
    remote = Storage(f"mock://{tmp_path.name}/root", cache=tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    remote.publish(folder(tmp_path / "in", NEW), "chat")
    assert contents(remote.fetch("chat")) == NEW
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_same_bytes_have_the_same_address_and_are_stored_once(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "root")
    first = storage.publish(folder(tmp_path / "a", NEW), "one")
    second = storage.publish(folder(tmp_path / "b", NEW), "two")
    assert first.address == second.address
    assert storage.fetch("one") == storage.fetch("two")
    assert len(list((tmp_path / "root" / "objects").iterdir())) == 1


def test_publishing_under_a_name_again_replaces_it(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "root")
    storage.publish(folder(tmp_path / "old", OLD), "chat")
    storage.publish(folder(tmp_path / "new", NEW), "chat")
    assert contents(storage.fetch("chat")) == NEW


def test_content_without_a_name_is_named_by_its_address(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "root")
    manifest = storage.publish(folder(tmp_path / "in", NEW))
    assert storage.list() == [manifest.address[:32]]


@pytest.mark.parametrize("victim", [*NEW, "../manifest.json"])
def test_verify_and_fetch_raise_on_a_flipped_bit(tmp_path: Path, victim: str) -> None:
    storage = Storage(tmp_path / "root")
    storage.publish(folder(tmp_path / "in", NEW), "chat")
    path = storage.fetch("chat") / victim
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StorageError):
        storage.verify("chat")
    with pytest.raises(StorageError):
        storage.fetch("chat")


@pytest.mark.parametrize("victim", [*NEW, "../manifest.json"])
def test_verify_raises_on_a_missing_file(tmp_path: Path, victim: str) -> None:
    storage = Storage(tmp_path / "root")
    storage.publish(folder(tmp_path / "in", NEW), "chat")
    (storage.fetch("chat") / victim).unlink()
    with pytest.raises(StorageError):
        storage.verify("chat")


def test_publishing_the_same_bytes_again_heals_a_damaged_object(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "root")
    storage.publish(folder(tmp_path / "in", NEW), "chat")
    (storage.fetch("chat") / "config.json").write_bytes(b"rubbish")
    storage.publish(tmp_path / "in", "chat")
    assert contents(storage.fetch("chat")) == NEW


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/etc", "A", "a b", "%2e%2e", "a\0", ".hidden", "x" * 64, "a\n"])
def test_names_that_could_be_paths_are_refused(tmp_path: Path, name: str) -> None:
    storage = Storage(tmp_path / "root")
    with pytest.raises(InvalidRequest):
        storage.publish(folder(tmp_path / "in", OLD), name or "..")
    with pytest.raises(InvalidRequest):
        storage.fetch(name)


def test_unknown_names_are_not_found(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "root")
    for call in (storage.fetch, storage.verify, storage.delete, storage.object_uri):
        with pytest.raises(NotFound):
            call("nothing")


def test_links_and_empty_folders_are_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "root")
    source = folder(tmp_path / "in", OLD)
    (source / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(StorageError, match="link"):
        storage.publish(source, "chat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="no file"):
        storage.publish(tmp_path / "empty", "chat")
    assert storage.list() == []


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b", "a\\b", ".", "a//b"])
def test_a_manifest_with_a_path_that_leaves_its_folder_is_refused(name: str) -> None:
    text = b'{"files": {"%s": {"size": 1, "sha256": "0"}}}' % name.replace("\\", "\\\\").encode()
    with pytest.raises(StorageError):
        Manifest.parse(text)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_a_torn_manifest_is_a_storage_error_and_nothing_else(text: bytes) -> None:
    with pytest.raises(StorageError):
        Manifest.parse(text)


def test_sweep_frees_what_no_name_stands_for_and_nothing_else(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "root")
    storage.publish(folder(tmp_path / "old", OLD), "chat")
    storage.publish(folder(tmp_path / "new", NEW), "chat")
    folder(tmp_path / "root" / "staging" / "left-by-a-crash", OLD)
    assert storage.sweep(older_than_s=3600) == 0
    assert storage.sweep(older_than_s=0) == 2
    assert contents(storage.fetch("chat")) == NEW
    storage.delete("chat")
    assert storage.list() == []
    assert storage.sweep(older_than_s=0) == 1


def test_a_filesystem_that_is_not_local_is_read_through_a_verified_cache(tmp_path: Path) -> None:
    storage = Storage("mock:///bucket/root", cache=tmp_path / "cache")
    assert not storage.is_local
    storage.publish(folder(tmp_path / "in", NEW), "chat")
    fetched = storage.fetch("chat")
    assert contents(fetched) == NEW
    assert fetched.is_relative_to(tmp_path / "cache")
    (fetched / "config.json").write_bytes(b"rubbish")
    assert contents(storage.fetch("chat")) == NEW


class Crash(BaseException):
    """Stands for the death of the process: no handler of ours may catch it."""


class FailingStorage(Storage):
    """Dies before its N-th step. `lose_unsynced` also empties every file that wasn't fsynced, as a power cut may."""

    def __init__(self, root: Path, steps: int, lose_unsynced: bool = False, skip_sync: bool = False) -> None:
        self._left, self._lose, self._skip = steps, lose_unsynced, skip_sync
        self._unsynced: set[str] = set()
        super().__init__(root)

    def _step(self) -> None:
        if self._left == 0:
            if self._lose:
                for path in self._unsynced:
                    if os.path.isfile(path):
                        os.truncate(path, 0)
            raise Crash
        self._left -= 1

    def _write(self, path: str, *arguments: object) -> None:
        self._step()
        self._unsynced.add(self._path(path))
        super()._write(path, *arguments)  # type: ignore[arg-type]

    def _write_bytes(self, path: str, content: bytes) -> None:
        self._step()
        self._unsynced.add(self._path(path))
        super()._write_bytes(path, content)

    def _move(self, source: str, target: str) -> None:
        self._step()
        super()._move(source, target)
        old, new = self._path(source), self._path(target)
        self._unsynced = {new + path[len(old) :] if path.startswith(old) else path for path in self._unsynced}

    def _sync(self, path: str) -> None:
        self._step()
        if not self._skip:
            super()._sync(path)
            self._unsynced.discard(self._path(path))


def survivors(tmp_path: Path, *, lose_unsynced: bool, skip_sync: bool) -> list[str]:
    """What a reader finds after a crash before each step: `old`, `new` or `torn`; the last entry is a publish that ended well."""
    found: list[str] = []
    old, new = folder(tmp_path / "old", OLD), folder(tmp_path / "new", NEW)
    for steps in range(200):
        root = tmp_path / f"root-{steps}"
        Storage(root).publish(old, "chat")
        try:
            FailingStorage(root, steps, lose_unsynced, skip_sync).publish(new, "chat")
            ended = True
        except Crash:
            ended = False
        try:
            found.append({str(OLD): "old", str(NEW): "new"}.get(str(contents(Storage(root).fetch("chat"))), "torn"))
        except PlatformError:
            found.append("torn")
        if ended:
            Storage(root).sweep(older_than_s=0)
            return found
        assert contents_after_retry(root, new) == NEW
    raise AssertionError("publishing never ended")


def contents_after_retry(root: Path, new: Path) -> dict[str, bytes]:
    storage = Storage(root)
    storage.publish(new, "chat")
    storage.sweep(older_than_s=0)
    assert not list((root / "staging").iterdir())
    return contents(storage.fetch("chat"))


@pytest.mark.parametrize("lose_unsynced", [False, True])
def test_a_crash_before_any_step_leaves_the_old_or_the_whole_new_thing(tmp_path: Path, lose_unsynced: bool) -> None:
    found = survivors(tmp_path, lose_unsynced=lose_unsynced, skip_sync=False)
    assert set(found) == {"old", "new"}
    assert found == sorted(found, reverse=True), "once new, a later crash can't bring the old one back"
    assert len(found) > 10


def test_the_power_cut_check_catches_a_storage_that_never_syncs(tmp_path: Path) -> None:
    assert "torn" in survivors(tmp_path, lose_unsynced=True, skip_sync=True)


def _publish_then_die(root: str, source: str, steps: int) -> None:
    try:
        FailingStorage(Path(root), steps).publish(source, "chat")
    except Crash:
        os.kill(os.getpid(), 9)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 8, 11])
def test_a_killed_publisher_leaves_the_old_or_the_whole_new_thing(tmp_path: Path, steps: int) -> None:
    root, new = tmp_path / "root", folder(tmp_path / "new", NEW)
    Storage(root).publish(folder(tmp_path / "old", OLD), "chat")
    process = multiprocessing.get_context("spawn").Process(target=_publish_then_die, args=(str(root), str(new), steps))
    process.start()
    process.join(120)
    assert contents(Storage(root).fetch("chat")) in (OLD, NEW)
    assert contents_after_retry(root, new) == NEW


def _publish(root: str, source: str, times: int) -> None:
    storage = Storage(root)
    for _ in range(times):
        storage.publish(source, "chat")


@pytest.mark.slow
def test_a_reader_beside_two_publishers_never_sees_a_mixture(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    sources = [folder(tmp_path / "old", OLD), folder(tmp_path / "new", NEW)]
    Storage(root).publish(sources[0], "chat")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_publish, args=(root, str(source), 40)) for source in sources]
    for process in processes:
        process.start()
    reads = 0
    while any(process.is_alive() for process in processes):
        assert contents(Storage(root).fetch("chat")) in (OLD, NEW)
        reads += 1
    assert [process.exitcode for process in processes] == [0, 0]
    assert reads > 5
