from __future__ import annotations

import json
import threading
from pathlib import Path

from training.journal import Failure, Happening, Journal, Progress, follow


def report(step: int, loss: float, pid: int) -> dict[str, object]:
    shared = {"step": step, "steps": 10, "learning_rate": 0.1, "tokens": 100 * step, "tokens_per_s": 50.0, "resumed_from": 0}
    return {**shared, "loss": loss, "pid": pid}


def test_a_follower_hears_everything_in_order_and_ends(tmp_path: Path) -> None:
    path, heard, ended = tmp_path / "events.jsonl", list[Happening](), threading.Event()
    follower = threading.Thread(target=follow, args=(path, ended, heard.append))
    follower.start()
    journal = Journal(str(path))
    journal.after_report(None, [report(1, 2.0, 11), report(1, 4.0, 12)], None)
    journal.after_exception(None, {1: RuntimeError("worker\ndied")})
    journal.after_report(None, [report(2, 1.0, 13), report(2, 1.0, 14)], None)
    ended.set()
    follower.join(10)
    assert heard == [
        Progress(1, 10, 3.0, 0.1, 100, 50.0, 0, (11, 12)),
        Failure({"1": "RuntimeError: worker"}),
        Progress(2, 10, 1.0, 0.1, 200, 50.0, 0, (13, 14)),
    ]


def test_a_line_that_is_still_being_written_is_heard_once_and_whole(tmp_path: Path) -> None:
    path, heard, ended = tmp_path / "events.jsonl", list[Happening](), threading.Event()
    line = json.dumps({"failure": {"errors": {"0": "x"}}}) + "\n"
    path.write_text(line[:7])
    follower = threading.Thread(target=follow, args=(path, ended, heard.append))
    follower.start()
    with path.open("a") as file:
        file.write(line[7:])
    ended.set()
    follower.join(10)
    assert heard == [Failure({"0": "x"})]
