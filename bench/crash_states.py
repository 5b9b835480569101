"""What a disk may hold after a loss of power, from a trace of the calls that wrote to it.

A write is safe once its file was synced, a name's coming and going once its folder was. Everything else may be there or not. For a
moment all states are made in which each file either has all of its writes or only the safe ones, and the folder either all of its
changes or only the safe ones. Writes of one file that arrive in another order are not tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

Files = dict[str, bytes]

_LINE = re.compile(r"^(?:\d+\s+)?(\w+)\((.*)\)\s+= (-?\d+)")
_BEGUN = re.compile(r"^(\d*)\s*(\w+\(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d*)\s*<\.\.\. \w+ resumed>(.*)$")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True, slots=True)
class Call:
    """`fd` or `name` say of what; `result` is what the kernel returned."""

    verb: str
    fd: int
    name: str
    data: bytes
    number: int  # an offset, or a length for ftruncate
    result: int


@dataclass(slots=True)
class Disk:
    """The files of one folder: as programs see them, and as far as they are safe."""

    seen: dict[str, bytearray]
    safe: dict[str, bytes]  # contents, by the name under which a file was last synced
    listed: set[str]  # names that the folder holds safely
    folder: str
    files: dict[int, str] = field(default_factory=dict)
    said: bytearray = field(default_factory=bytearray)

    def apply(self, call: Call) -> None:
        if call.result < 0:
            return
        match call.verb:
            case "openat":
                self._open(call)
            case "close":
                self.files.pop(call.fd, None)
            case "unlink":
                self.seen.pop(Path(call.name).name, None)
            case "write" if call.fd not in self.files:
                self.said += call.data[: call.result]
            case _ if call.fd in self.files:
                self._change(call, self.files[call.fd])

    def _open(self, call: Call) -> None:
        self.files.pop(call.result, None)
        if call.name.rstrip("/") == self.folder:
            self.files[call.result] = "."
        elif call.name.startswith(self.folder + "/"):
            name = Path(call.name).name
            self.files[call.result] = name
            if name not in self.seen:
                self.seen[name] = bytearray()
                self.safe.pop(name, None) if name not in self.listed else None

    def _change(self, call: Call, name: str) -> None:
        if call.verb in ("fsync", "fdatasync"):
            if name == ".":
                self.listed = set(self.seen)
                self.safe = {name: content for name, content in self.safe.items() if name in self.listed}
            elif name in self.seen:
                self.safe[name] = bytes(self.seen[name])
            return
        content = self.seen.get(name, bytearray())
        if call.verb == "ftruncate":
            content[call.number :] = bytes(max(0, call.number - len(content)))
        elif call.verb == "pwrite64":
            content.extend(bytes(max(0, call.number - len(content))))
            content[call.number : call.number + call.result] = call.data[: call.result]

    def states(self) -> list[Files]:
        """Each once; the harshest first."""
        found: list[Files] = []
        for names in (sorted(self.listed), sorted(self.seen)):
            both = [(self.safe.get(name, b""), bytes(self.seen.get(name, self.safe.get(name, b"")))) for name in names]
            for contents in product(*(dict.fromkeys(pair) for pair in both)):
                files = dict(zip(names, contents, strict=True))
                if files not in found:
                    found.append(files)
        return found

    def words(self) -> list[str]:
        """What the process had said, in whole lines."""
        return bytes(self.said).decode().split("\n")[:-1]


def disk_of(before: Mapping[str, bytes], folder: Path) -> Disk:
    """A folder whose files have been there for long."""
    return Disk({name: bytearray(content) for name, content in before.items()}, dict(before), set(before), str(folder))


def parse(trace: str) -> list[Call]:
    """From what `strace -xx` wrote; calls that were cut off by the end are left out. One beside which something else happened is in
    two lines, and counts where it ended."""
    calls, begun = [], dict[str, str]()
    for line in trace.splitlines():
        if match := _BEGUN.match(line):
            begun[match[1]] = match[2]
            continue
        if match := _RESUMED.match(line):
            line = begun.pop(match[1], "") + match[2]
        if match := _LINE.match(line):
            calls.append(_call(match[1], match[2], int(match[3])))
    return calls


def _call(verb: str, arguments: str, result: int) -> Call:
    texts = [bytes.fromhex(text.replace("\\x", "")) for text in _TEXT.findall(arguments)]
    plain = [part.strip() for part in _TEXT.sub("", arguments).split(",")]
    text = texts[0] if texts else b""
    by_name = verb in ("openat", "unlink")
    fd = -1 if by_name else int(plain[0])
    number = int(plain[-1]) if verb in ("pwrite64", "ftruncate") else 0
    return Call(verb, fd, text.decode() if by_name else "", b"" if by_name else text, number, result)
