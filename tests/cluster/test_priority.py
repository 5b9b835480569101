"""Steps back in a process of its own: nobody can come forward again without a privilege."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from cluster.priority import BEHIND

PROGRAM = """
import json, os, threading
from cluster import priority

def niceness():
    return sorted(os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in priority.TASKS.iterdir())

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
