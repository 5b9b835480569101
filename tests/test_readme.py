"""README.md says what is there and nothing else: files, commands, targets, dependencies, and tests that prove the features."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from typing import Any

import pytest
import typer

from mmaas.cli import app
from tests.documents import PACKAGES, PAGES, ROOT, commands, defined, file_map, section, spans

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = file_map(section(README, "Where things are"))
MAPPED = ("bench", "examples", "docs")  # beside the packages: every file of these is in the map, of tests every one that is no test


def in_the_tree() -> set[str]:
    """Files and folders that the map must have."""
    roots = [ROOT / name for name in (*PACKAGES, *MAPPED, "tests")]
    paths = chain.from_iterable([root, *root.rglob("*")] for root in roots)
    return {named for path in paths if (named := path.relative_to(ROOT).as_posix() + "/" * path.is_dir()) and _counts(named)}


def _counts(named: str) -> bool:
    folder, name = named.rstrip("/").rpartition("/")[::2]
    if "__pycache__" in named or name == "__init__.py" or named.startswith(("tests/data/", "bench/results/")):
        return named == "tests/data/"
    if named.startswith("tests/") and folder != "tests" and name.startswith("test_"):
        return False  # a test beside the thing that it tests
    return named.endswith(("/", ".py", ".sh", ".md"))


def test_the_map_has_every_file_and_no_other() -> None:
    there = in_the_tree()
    assert len(there) > 150, "the walk found too little to prove anything"
    assert sorted(there - MAP.keys()) == [], "missing in README's map"
    assert sorted(name for name in MAP if not (ROOT / name).exists()) == [], "in README's map, but not there"


def test_a_line_of_the_map_is_three_to_ten_words() -> None:
    assert {name: what for name, what in MAP.items() if not 3 <= len(what.split()) <= 10} == {}


def test_every_target_of_make_is_listed_and_no_other() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    listed = set(re.findall(r"^\| `make (\S+)`", section(README, "Commands"), re.MULTILINE))
    assert listed == targets
    for page in PAGES:
        called = chain.from_iterable(words[1:] for words in commands(page.read_text(), "make"))
        assert {word for word in called if "=" not in word} <= targets | {".venv"}, page.name


def test_every_direct_dependency_is_explained_and_no_other() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}  # type: ignore[index]
    rows = re.findall(r"^\| (`.*?`) \|", section(README, "What each dependency is for"), re.MULTILINE)
    assert set(chain.from_iterable(map(spans, rows))) == names


def test_every_command_exists_with_its_options_and_is_listed() -> None:
    root = typer.main.get_command(app)
    for page in PAGES:
        for words in commands(page.read_text(), "mmaas"):
            assert unknown(root, words[1:]) is None, f"{page.name}: {' '.join(words)}"
    listed = {" ".join(words[1:]) for words in commands(section(README, "Commands"), "mmaas")}
    assert set(leaves(root)) <= listed


def leaves(command: Any, *path: str) -> list[str]:
    """Every command that does something, `keys create` for one in a group."""
    if not (children := getattr(command, "commands", {})):
        return [" ".join(path)]
    return [leaf for name, child in children.items() for leaf in leaves(child, *path, name)]


def unknown(command: Any, words: list[str]) -> str | None:
    """The first word that the command line would refuse. What stands for something else is written in capitals."""
    for word in words:
        children = getattr(command, "commands", {})
        if children and not word.startswith("-"):
            if word not in children and not word.isupper():
                return word
            command = children.get(word, command)
        elif word.startswith("--") and word not in {"--help", *chain.from_iterable(option.opts for option in command.params)}:
            return word
    return None


def test_every_named_test_exists() -> None:
    proofs = [span for span in spans(README) if "::" in span]
    assert len(proofs) > 40
    absent = [proof for proof in proofs if proof.partition("::")[2] not in defined(ROOT / proof.partition("::")[0])]
    assert absent == []


def test_every_row_of_features_has_a_test() -> None:
    rows = re.findall(r"^\| (.*) \|$", section(README, "What works, and the test that proves it"), re.MULTILINE)
    features = [row for row in rows if not row.endswith("| test") and not set(row) <= set("-| ")]
    assert [row for row in features if not re.search(r"\| `tests/\S+::\w+`$", row)] == []


@pytest.mark.parametrize(
    ("words", "bad"), [("up --tp 2", None), ("up --shards 2", "--shards"), ("keys make", "make"), ("X -h", None)]
)
def test_the_check_of_commands_can_fail(words: str, bad: str | None) -> None:
    assert unknown(typer.main.get_command(app), words.split()) == bad


def test_the_reader_of_the_map_sees_what_it_should() -> None:
    text = "a/        one two three\n  b/      one two three\n    c.py  what it is\n  d.py    and this\nno\ne.txt     a file\n"
    assert list(file_map(text)) == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e.txt"]
