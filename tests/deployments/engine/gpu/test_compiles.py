"""The kernels' source is one that Triton's compiler takes for an H100, though there is none."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

SHARED = 227 << 10
"""What a program may have on Hopper."""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels are Triton's, which is not installed")
def test_it_compiles_for_hopper_and_fits_its_shared_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.deployments.engine.gpu.compiles"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    decode, prompt, exact = json.loads(done.stdout)
    assert (decode["kind"], prompt["kind"]) == ("mma.sync", "wgmma"), "16 bits go through the matrix units"
    assert exact["kind"] == "fma", "float32 is not rounded to tf32"
    assert max(way["shared"] for way in (decode, prompt, exact)) <= SHARED
