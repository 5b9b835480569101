"""Steps back in a process of its own: nobody can come forward again without a privilege."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from cluster.priority import BEHIND, put

PROGRAM = """
import json, os, threading
from pathlib import Path
from cluster import priority

def niceness():
    return sorted(os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path('/proc/self/task').iterdir())

done = threading.Event()
threading.Thread(target=done.wait).start()
before = niceness()
priority.step_back()
priority.step_back()
threading.Thread(target=done.wait).start()
print(json.dumps([before, niceness()]))
done.set()
"""


def test_every_thread_steps_back_and_those_that_they_start() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, after = json.loads(ended.stdout)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert before == [own, own]
    assert after == [BEHIND] * 3


def test_another_process_is_put_where_it_is_wanted() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        put(other.pid, BEHIND)
        assert os.getpriority(os.PRIO_PROCESS, other.pid) == BEHIND > os.getpriority(os.PRIO_PROCESS, 0)
    finally:
        other.communicate(b"")
