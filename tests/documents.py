"""The repository's pages and what they name: code, files, tests, commands. Read by `test_readme.py` and `test_docs.py`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmaas", "cluster", "deployments", "training", "pipelines")
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))

_FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|md|yaml|toml|txt|sh)|(?:[\w.-]+/)+")
_STEP = re.compile(r"^\d+\. (?:\((\w+)\) )?`([^`]+\.py)` · `([\w.]+)`", re.MULTILINE)
_MAP_LINE = re.compile(r"^((?:  )*)(\S+) {2,}(\S.*)$")


def section(text: str, title: str) -> str:
    """What stands under a heading of the second rank."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section {title!r}"
    return found[1]


def blocks(text: str) -> list[str]:
    """The fenced blocks."""
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """The code between single backticks, outside of fenced blocks."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", outside)


def files(text: str) -> set[str]:
    """Every file or folder of this repository that a page names in backticks, without the name of a test behind `::`."""
    named = (span.partition("::")[0] for span in spans(text))
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()}
    return {name for name in named if _FILE.fullmatch(name) and "/" in name and name.partition("/")[0] in ours}


def links(text: str) -> set[str]:
    """Relative links, without their fragments."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return {target.partition("#")[0] for target in targets if not re.match(r"https?:|#", target)}


def file_map(text: str) -> dict[str, str]:
    """Path (folders end in `/`) to description, from the indented lines of a block."""
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in text.splitlines():
        if match := _MAP_LINE.match(line):
            indent, name, what = match.groups()
            folders = folders[: len(indent) // 2]
            found["".join(folders) + name] = what
            if name.endswith("/"):
                folders.append(name)
    return found


def commands(text: str, program: str) -> list[list[str]]:
    """The words of every call of a program, in spans and in blocks, up to where the shell or a remark takes over."""
    lines = [line.removeprefix("$ ").strip() for block in blocks(text) for line in block.splitlines()]
    called = [line for line in [*lines, *spans(text)] if line == program or line.startswith(program + " ")]
    return [re.split(r"\s+#|&&|;|\|", line)[0].split() for line in called]


def steps(text: str) -> list[tuple[str, str, str]]:
    """Caller, file and name of every numbered step of a walk; the caller is empty when an earlier step calls it."""
    return _STEP.findall(text)


def defined(path: Path) -> set[str]:
    """Functions, classes and `Class.method`s of a file."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{node.name}.")
            if isinstance(node, ast.Assign):
                yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))

    return set(walk(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def mentioned(path: Path) -> set[str]:
    """Every name that the code of a file uses or imports, and the words of its strings without spaces; no prose."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                found.add(name.rpartition(".")[2])
            case ast.Constant(value=str(value)) if id(node) not in prose and " " not in value:
                found |= set(re.findall(r"\w+", value))
    return found
