"""Facts about the running Python's own standard library: real text that is on every machine.

A `Fact` is a name with what its documentation says first. This module reads docstrings and `pydoc_data.topics`; it knows nothing of
tokens, questions or models. The text belongs to CPython (PSF licence) and is read at run time, never copied into this repository.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import inspect
import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

Kind = Literal["method", "function", "class", "error", "module", "topic"]

LICENCE = "PSF-2.0"
CORE_TYPES = (str, list, dict, set, tuple, int, float)
OTHER_TYPES = (bytes, frozenset, complex, range, object, property, type)
# fmt: off
MODULES = (  # described, and every function and class of theirs
    "bisect", "collections", "copy", "csv", "functools", "glob", "heapq", "itertools", "json", "math", "os.path", "random", "re",
    "shutil", "statistics", "string", "time",
)
MENTIONED = (  # described
    "argparse", "array", "asyncio", "base64", "calendar", "concurrent.futures", "configparser", "contextlib", "dataclasses",
    "datetime", "decimal", "difflib", "enum", "fractions", "getpass", "gzip", "hashlib", "hmac", "html", "http.server", "inspect",
    "io", "ipaddress", "logging", "numbers", "operator", "os", "pathlib", "pickle", "platform", "pprint", "queue", "secrets",
    "shlex", "socket", "sqlite3", "struct", "subprocess", "sys", "tarfile", "tempfile", "textwrap", "threading", "traceback",
    "types", "unicodedata", "unittest", "urllib.parse", "uuid", "warnings", "weakref", "zipfile", "zlib",
)
CLASSES = ("collections.Counter", "collections.deque", "datetime.date", "pathlib.Path")
NAMES = (
    "os.chdir", "os.cpu_count", "os.getcwd", "os.getenv", "os.getpid", "os.kill", "os.listdir", "os.makedirs", "os.mkdir",
    "os.remove", "os.rename", "os.replace", "os.rmdir", "os.scandir", "os.stat", "os.walk", "pickle.dumps", "pickle.loads",
    "sys.exit", "sys.getsizeof", "logging.getLogger", "asyncio.run", "asyncio.gather", "asyncio.sleep", "inspect.signature",
    "operator.itemgetter", "decimal.Decimal", "enum.Enum", "argparse.ArgumentParser", "sqlite3.connect", "zipfile.ZipFile",
)
# fmt: on
MAX_ANSWER_CHARS = 180
MAX_SIGNATURE_CHARS = 100

_SIGNATURE_LINE = re.compile(r"^[\w.]+\(.*\)(?:\s*-+>\s*[\w\[\]|().-]+(?: [\w-]+){0,2})?:?$")
_LISTING_LINE = re.compile(r"^(?:\s|>>>|[-*|]\s|\.\.|[-=~*]{3,}$)")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+")


@dataclass(frozen=True, slots=True)
class Fact:
    """What the documentation says about one name. `core` facts (the built-in types and functions) are those a person asks first."""

    name: str
    kind: Kind
    answer: str
    signature: str | None = None
    core: bool = False


def facts() -> tuple[Fact, ...]:
    """Every fact, in one order that depends on nothing but the Python that runs. The first fact of a name wins."""
    found: dict[str, Fact] = {}
    for fact in (*_builtins(), *_modules(), *_topics()):
        found.setdefault(fact.name, fact)
    return tuple(found.values())


def _builtins() -> Iterator[Fact]:
    for owner in (*CORE_TYPES, *OTHER_TYPES):
        yield from _members(owner, owner.__name__, core=owner in CORE_TYPES)
    for name, value in _public(builtins):
        if callable(value) and name != "copyright":
            yield from _documented(name, value, core=not _is_error(value))


def _modules() -> Iterator[Fact]:
    for path in MODULES:
        module = importlib.import_module(path)
        yield from _documented(path, module)
        for name, value in _public(module):
            if callable(value) and _is_defined_in(value, module):
                yield from _documented(f"{path}.{name}", value)
    for path in MENTIONED:
        with contextlib.suppress(ImportError):  # a Python may be built without some of them
            yield from _documented(path, importlib.import_module(path))
    for path in CLASSES:
        yield from _members(_named(path), path)
    for path in NAMES:
        with contextlib.suppress(ImportError, AttributeError):
            yield from _documented(path, _named(path))


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _topics() -> Iterator[Fact]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for key in sorted(set(topics) & set(keyword.kwlist)):
        title, _, body = topics[key].strip().partition("\n")
        answer = _first_words(body.strip().lstrip("*=-~\n").replace("*", ""))
        if "statement" in title and answer:
            yield Fact(_one_line(title).replace('"', "").replace("The ", "the ", 1), "topic", answer)


def _members(owner: type, path: str, core: bool = False) -> Iterator[Fact]:
    for name in sorted(vars(owner)):
        value = getattr(owner, name, None)
        if not name.startswith("_") and callable(value):
            yield from _documented(f"{path}.{name}", value, core)


def _documented(name: str, value: Any, core: bool = False) -> Iterator[Fact]:
    # NOTE: an instance (re.A, string.ascii_letters) answers with the documentation of its type, which says nothing about the name.
    if not (inspect.isroutine(value) or isinstance(value, type | ModuleType)) or not isinstance(value.__doc__, str):
        return
    if isinstance(value, type) and any(value.__doc__ == base.__doc__ for base in value.__mro__[1:]):
        return
    if answer := _first_words(inspect.cleandoc(value.__doc__)):
        yield Fact(name, _kind(name, value), answer, _signature(name, value), core)


def _public(module: ModuleType) -> list[tuple[str, Any]]:
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    return [(name, getattr(module, name)) for name in sorted(set(names)) if not name.startswith("_") and hasattr(module, name)]


def _is_defined_in(value: Any, module: ModuleType) -> bool:
    """Is this the name's home? `os.path` is `posixpath` and C modules hide behind an underscore."""
    home: str = getattr(value, "__module__", None) or module.__name__
    return home.lstrip("_").split(".")[0] == module.__name__.lstrip("_").split(".")[0] or home in {"genericpath", "posix", "nt"}


def _is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def _kind(name: str, value: Any) -> Kind:
    if isinstance(value, ModuleType):
        return "module"
    if isinstance(value, type):
        return "error" if _is_error(value) else "class"
    owner = name.rpartition(".")[0]
    return "method" if owner and owner not in MODULES else "function"


def _first_words(doc: str) -> str:
    """The leading paragraphs of prose, on one line: whole sentences up to `MAX_ANSWER_CHARS`."""
    words = ""
    for paragraph in re.split(r"\n\s*\n", doc):
        prose = _prose(paragraph, is_first=not words)
        if not prose and not words:
            continue  # signatures and headings stand before the prose
        if not prose or (words and len(words) + len(prose) + 1 > MAX_ANSWER_CHARS):
            break
        words = f"{words} {prose}".strip()
    return _cut(words)


def _prose(paragraph: str, is_first: bool) -> str:
    """One paragraph as whole sentences, without signatures and markup; empty for a listing or a heading's underline."""
    lines = paragraph.splitlines()
    while lines and _SIGNATURE_LINE.match(lines[0].strip()):
        lines.pop(0)
    if any(_LISTING_LINE.match(line) for line in lines):
        return ""
    text = _one_line(" ".join(lines).replace("`", ""))
    if not text.endswith(":"):
        return text if not text or text.endswith((".", "!", "?")) else f"{text}."
    # What ends with a colon leads to a listing that isn't here; alone at the beginning it still says something.
    *whole, lead = _SENTENCE_END.split(text)
    return " ".join(whole) or (lead.removesuffix(":") + "." if is_first else "")


def _cut(text: str) -> str:
    """Whole sentences only; empty when even the first is too long, for half a sentence is not worth learning."""
    kept = ""
    for sentence in _SENTENCE_END.split(text):
        if len(kept) + len(sentence) + 1 > MAX_ANSWER_CHARS:
            break
        kept = f"{kept} {sentence}".strip()
    return kept


def _signature(name: str, value: Any) -> str | None:
    try:
        text = str(inspect.signature(value)).replace("($self, /, ", "(").replace("(self, /, ", "(").replace("(self, /)", "()")
    except (ValueError, TypeError):
        return None
    text = re.sub(r"\((?:self|cls)(?:, )?", "(", text)
    # NOTE: a default shown as <object at 0x7f…> differs from process to process; a seed must give the same model.
    return None if len(text) > MAX_SIGNATURE_CHARS or "<" in text else name + text


def _one_line(text: str) -> str:
    return " ".join(text.split())
