from __future__ import annotations

import subprocess
import sys

from training import corpus
from training.corpus import Fact, facts


def by_name() -> dict[str, Fact]:
    return {fact.name: fact for fact in facts()}


def test_str_split_answers_with_the_first_sentence_of_its_docstring() -> None:
    fact = by_name()["str.split"]
    first_line = (str.split.__doc__ or "").splitlines()[0]
    assert fact.answer.startswith(first_line)
    assert fact.signature == "str.split(sep=None, maxsplit=-1)"
    assert fact.core


def test_the_names_that_people_ask_first_are_there() -> None:
    missing = {"print", "len", "list.append", "dict.get", "range", "math.sqrt", "json.dumps", "re.sub", "ValueError"} - set(
        by_name()
    )
    assert not missing


def test_answers_are_whole_sentences_on_one_bounded_line() -> None:
    for fact in facts():
        assert 0 < len(fact.answer) <= corpus.MAX_ANSWER_CHARS, fact
        assert fact.answer == " ".join(fact.answer.split()), fact
        assert fact.signature is None or "<" not in fact.signature, fact


def test_core_facts_are_a_small_part() -> None:
    core = [fact for fact in facts() if fact.core]
    assert 100 < len(core) < len(facts()) / 3


def test_another_process_reads_the_same_facts_in_the_same_order() -> None:
    code = "from training.corpus import facts; import hashlib; print(hashlib.sha256(repr(facts()).encode()).hexdigest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
