"""The engine benchmark with an engine that does nothing, in a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import bench.engine
from bench import models
from bench.engine import Work, main, measure
from bench.engines import Engine, Running, engines, rss_bytes, tree
from bench.harness import write
from bench.peers.protocol import ClosedLoop

PROTOCOL = Path(__file__).parents[2] / "bench" / "peers"
ECHO = """
import sys
sys.path.insert(0, {protocol!r})
from protocol import arguments, serve
def load():
    options = arguments()
    print("noise that libraries make")
    if {fail!r}:
        raise SystemExit("no such device")
    def generate(prompts, max_tokens, concurrency):
        times = {{"first_token_s": 1.0, "finished_s": 3.0, "token_times_s": [1.0, 1.5, 1.5, 3.0]}}
        return [{{"num_tokens": max_tokens - {short}, **times}} for _ in prompts]
    return generate
serve(load, ["pytest"])
"""


def echo(tmp_path: Path, *, fail: bool = False, short: int = 0) -> Engine:
    program = tmp_path / "echo.py"
    program.write_text(ECHO.format(protocol=str(PROTOCOL), fail=fail, short=short))
    return Engine("echo", str(program), Path(sys.executable))


@pytest.fixture
def no_models(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "directory", lambda name: tmp_path)


def test_an_engine_is_measured_at_every_concurrency(tmp_path, no_models):
    measured, versions = measure(echo(tmp_path), "S", [1, 4], Work(8, 2, 5, 9), threads=1)
    assert [m.concurrency for m in measured] == [1, 4]
    assert all(m.first_token_s.p50 == 1.0 and m.per_token_s.p99 == 2.0 / 8 for m in measured)
    assert all(m.gap_s.most == 1.5 and m.gap_s.p50 == 1.0 for m in measured)
    assert all(m.peak_rss_bytes > 1 << 20 and m.tokens_per_s > 0 for m in measured)
    assert versions.keys() == {"pytest"}


def test_an_engine_that_does_not_start_says_why(tmp_path, no_models):
    with pytest.raises(RuntimeError, match="no such device"):
        measure(echo(tmp_path, fail=True), "S", [1], Work(), threads=1)


def test_an_engine_that_answers_short_counts_for_nothing(tmp_path, no_models):
    with pytest.raises(RuntimeError, match="tokens"):
        measure(echo(tmp_path, short=1), "S", [1], Work(2, 2, 5, 9), threads=1)


def test_an_engine_that_is_not_installed_says_how_to(tmp_path):
    with pytest.raises(RuntimeError, match=r"install\.sh"):
        measure(Engine("x", "x.py", tmp_path / "python"), "S", [1], Work(), threads=1)


def test_its_process_ends_with_the_measurement(tmp_path):
    with Running(echo(tmp_path), tmp_path, threads=1, max_concurrency=1) as running:
        pid = running._process.pid
    assert not Path(f"/proc/{pid}").exists()


def test_every_engine_gets_the_same_work():
    work = Work()
    assert work.prompts(8, 100) == work.prompts(8, 100)
    assert (len(work.prompts(1, 100)), len(work.prompts(32, 100))) == (16, 64)
    assert {len(prompt) for prompt in work.prompts(8, 100)} == {128}


@pytest.fixture
def two_engines(tmp_path, no_models, monkeypatch) -> Path:
    """One that answers and one that doesn't start, results in a folder of the test's own."""
    known = {"echo": echo(tmp_path), "broken": Engine("broken", "x.py", tmp_path / "python")}
    monkeypatch.setattr("bench.engine.engines", lambda: known)
    monkeypatch.setattr("bench.engine.HERE", tmp_path)
    monkeypatch.setattr("bench.engine.write", partial(write, here=tmp_path))
    monkeypatch.setattr("bench.engine.bandwidth.measure", lambda num_bytes, threads: 1e9)
    (tmp_path / "README.md").write_text("<!-- engine: start --><!-- engine: end -->")
    return tmp_path / "results" / "engine.json"


WORDS = ["--concurrency", "1", "2", "--requests", "2", "--tokens", "4", "--threads", "1", "--models", "S", "M"]


def test_a_run_that_was_cut_goes_on_with_what_is_missing(two_engines, monkeypatch):
    whole = bench.engine.add

    def cut(run, engine, model):
        if model == "M":
            raise KeyboardInterrupt
        whole(run, engine, model)

    monkeypatch.setattr("bench.engine.add", cut)
    with pytest.raises(KeyboardInterrupt):
        main([*WORDS, "--engines", "echo"])
    before = json.loads(two_engines.read_text())
    assert [m["model"] for m in before["measurements"]] == ["S", "S"]
    assert not before["complete"]

    monkeypatch.setattr("bench.engine.add", whole)
    main(["--resume"])
    after = json.loads(two_engines.read_text())
    assert after["measurements"][:2] == before["measurements"]
    assert [m["model"] for m in after["measurements"]] == ["S", "S", "M", "M"]
    assert after["complete"]
    with pytest.raises(ValueError, match="complete"):
        main(["--resume"])


def test_an_engine_that_can_not_run_is_named_and_the_rest_is_measured(two_engines):
    main([*WORDS, "--engines", "broken", "echo"])
    content = json.loads(two_engines.read_text())
    assert content["left_out"].keys() == {"broken, S", "broken, M"}
    assert len(content["measurements"]) == 4
    assert content["complete"]
    page = two_engines.parents[1].joinpath("README.md").read_text()
    assert page.count("![") == 2 * 3
    assert "1.0 GB/s beyond the caches" in page


def test_a_closed_loop_keeps_as_many_running_as_asked():
    loop, running, order = ClosedLoop(5, 2), {}, []
    while loop.unfinished:
        for request in loop.admit():
            running[request] = 0
            order.append(request)
        assert len(running) <= 2
        for request in list(running):
            running[request] += 1
            finished = running[request] == 3
            loop.note(request, running[request], finished)
            if finished:
                del running[request]
    assert order == [0, 1, 2, 3, 4]
    assert [request["num_tokens"] for request in loop.results()] == [3] * 5
    assert [len(request["token_times_s"]) for request in loop.results()] == [3] * 5
    assert all(request["token_times_s"][0] == request["first_token_s"] for request in loop.results())
    assert all(0 <= request["first_token_s"] <= request["finished_s"] for request in loop.results())


def test_memory_counts_children():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in set(tree(os.getpid()))
        assert rss_bytes(child.pid) > 0
    assert rss_bytes(child.pid) == 0


def test_every_engine_has_its_program():
    assert all((PROTOCOL / engine.program).is_file() for engine in engines().values())


def test_a_model_is_built_once_and_can_be_served(tmp_path, monkeypatch):
    from cluster.types import Message
    from deployments.engine.checkpoint import inspect
    from deployments.engine.tokenizer import Tokenizer

    tiny = models.MODELS["S"] | {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    monkeypatch.setitem(models.MODELS, "S", tiny)
    monkeypatch.setattr(models, "_standard_library", lambda: iter(["def f(x):\n    return x + 1\n" * 50]))
    directory = models.directory("S", tmp_path)
    info = inspect(directory, tp=2, dtype="bfloat16")
    assert (info.vocab_size, info.num_layers, info.max_model_len) == (600, 2, 2048)
    assert Tokenizer.load(directory).render([Message("user", "hi")])
    monkeypatch.setattr(models, "_weights", None)
    assert models.directory("S", tmp_path) == directory


def test_the_models_are_of_the_sizes_they_claim():
    from transformers import AutoConfig

    for name, millions in (("S", 40.4), ("M", 387)):
        c = AutoConfig.for_model(**models.MODELS[name])
        width, kv = c.hidden_size, c.hidden_size // c.num_attention_heads * c.num_key_value_heads
        layer = 2 * width * (width + kv) + 3 * width * c.intermediate_size
        embeddings = c.vocab_size * width * (1 if c.tie_word_embeddings else 2)
        assert (c.num_hidden_layers * layer + embeddings) / 1e6 == pytest.approx(millions, rel=0.01)
