"""The short form of `bench/ledger_kills.py`, and proof that each of its checks can fail."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import cluster.store
from bench import crash_states
from bench.ledger_kills import (
    CALLER,
    Report,
    audited,
    check,
    killed_at_a_call,
    killed_at_any_time,
    lose_power,
    prepare,
    refuse_after_a_failed_sync,
    with_tracer,
    write,
)
from cluster.store import Store
from cluster.tenancy.ledger import Ledger

strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


def test_a_writer_that_is_killed_at_any_time_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    url, report, rng = prepare(tmp_path), Report(), random.Random(1)
    for number in range(40):
        audited(url, killed_at_any_time(url, f"t{number}", rng), "killed", report)
    assert report.is_clean, report
    assert report.said > 40, "the writers were killed before they had said anything"


@strace
def test_a_writer_that_is_killed_at_a_write_or_sync_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    url, report = prepare(tmp_path), Report()
    for number in range(7, 400, 13):
        audited(url, killed_at_a_call(url, f"c{number}", number), "killed", report)
    assert report.is_clean, report
    assert report.said > 30


@strace
def test_what_was_said_survives_a_loss_of_power_at_any_write(tmp_path: Path) -> None:
    report = Report()
    lose_power(tmp_path, report, requests=2, step=7)
    assert report.is_clean, report
    assert report.said > 50


def unsynced(url: str, name: str, said: int, requests: int) -> None:
    """A writer whose database does not wait for the disk."""

    prepared = cluster.store._prepare_sqlite

    def lax(connection: Any, record: object) -> None:
        prepared(connection, record)
        connection.execute("PRAGMA synchronous=OFF")

    cluster.store._prepare_sqlite = lax  # in this process alone, which ends with the run
    write(url, name, said, requests)


@strace
def test_a_writer_that_does_not_sync_is_found_out(tmp_path: Path) -> None:
    report = Report()
    lose_power(tmp_path, report, requests=2, step=11, run=unsynced)
    assert not report.is_clean


@strace
def test_after_a_failed_sync_the_writer_stops(tmp_path: Path) -> None:
    url, report = prepare(tmp_path), Report()
    options = ("-o", "/dev/null", "-e", "inject=fdatasync,fsync:error=EIO:when=9")
    said = with_tracer(url, "eio", *options, requests=50, run=refuse_after_a_failed_sync)
    assert said[-3:] == ["refused"] * 3
    audited(url, said[:-3], "failed sync", report)
    assert report.is_clean, report


def test_what_was_said_and_is_not_there_is_lost(tmp_path: Path) -> None:
    store, report = Store(prepare(tmp_path)), Report()
    ledger = Ledger(store)
    ledger.reserve(CALLER, "r1", "chat", 10)
    ledger.settle("r1", None, "finished")
    check(store, ["reserve r1", "settle r1 0", "reserve r2", "settle r1 7"], report)
    assert (report.lost, report.doubled, report.wrong) == (["reserve r2"], ["settle r1 7"], [])
    store.close()


def test_a_call_that_others_happened_beside_is_one_in_two_lines() -> None:
    trace = [
        '7  pwrite64(4, "\\x31", 1, 5 <unfinished ...>',
        "8  fsync(9 <unfinished ...>",
        "8  <... fsync resumed>)              = 0",
        "7  <... pwrite64 resumed>)           = 1",
        "7  fsync(4 <unfinished ...>",
    ]
    first, second = crash_states.parse("\n".join(trace))
    assert (first.verb, first.fd, first.result) == ("fsync", 9, 0)
    assert (second.verb, second.fd, second.data, second.number, second.result) == ("pwrite64", 4, b"1", 5, 1)


def test_a_disk_keeps_only_what_was_synced() -> None:
    trace = "\n".join(
        [
            'openat(AT_FDCWD, "\\x2f\\x64\\x2f\\x61", O_RDWR|O_CREAT, 0600) = 4',  # /d/a
            'pwrite64(4, "\\x31\\x32", 2, 0) = 2',
            "fdatasync(4) = 0",
            'pwrite64(4, "\\x39", 1, 3) = 1',
            'write(1, "\\x6f\\x6b\\x0a", 3) = 3',
            'openat(AT_FDCWD, "\\x2f\\x64", O_RDONLY) = 5',  # /d
            "fsync(5) = 0",
            "ftruncate(4, 1) = 0",
            'unlink("\\x2f\\x64\\x2f\\x61") = 0',
            'pwrite64(4, "\\x31", 1, 0 <unfinished ...>',
        ]
    )
    calls = crash_states.parse(trace)
    assert len(calls) == 9

    def after(count: int) -> list[dict[str, bytes]]:
        disk = crash_states.disk_of({}, Path("/d"))
        for call in calls[:count]:
            disk.apply(call)
        assert disk.words() == ["ok"] * (count > 4)
        return disk.states()

    assert after(4) == [{}, {"a": b"12"}, {"a": b"12\x009"}]
    assert after(7) == [{"a": b"12"}, {"a": b"12\x009"}]
    assert after(8) == [{"a": b"12"}, {"a": b"1"}]
    assert after(9) == [{"a": b"12"}, {}]
