"""Questions that a person would ask about a fact, and which of them are kept back to test the model."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from training.corpus import Fact, Kind

_CALL = (
    "What does {name} do?",
    "What does {name}() do?",
    "How do I use {name}?",
    "Explain {name}.",
    "Tell me about {name}.",
    "What is {name} for?",
)
_THING = ("What is {name}?", "Explain {name}.", "Tell me about {name}.", "What is {name} for?", "Describe {name}.")
_ERROR = ("What is {name}?", "When is {name} raised?", "What does {name} mean?", "Explain {name}.", "Tell me about {name}.")
TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "method": _CALL,
    "function": _CALL,
    "class": ("What is {name}?", "What does {name} do?", "How do I use {name}?", "Explain {name}.", "Tell me about {name}."),
    "error": _ERROR,
    "module": _THING,
    "topic": _THING,
}
SIGNATURE = ("What is the signature of {name}?", "How do I call {name}?")

_SELF = (
    "I am the demonstration model of MMaaS, trained on this machine a moment ago. "
    "I know what Python's standard library says about itself."
)
SMALL_TALK = (
    ("Hello!", "Hello! Ask me what something in Python's standard library does, for example: What does str.split do?"),
    ("Hi", "Hello! Ask me what something in Python's standard library does, for example: What does str.split do?"),
    ("Who are you?", _SELF),
    ("What are you?", _SELF),
    (
        "What can you do?",
        "I answer questions about Python's built-in types, functions and modules, in the words of their documentation.",
    ),
    ("Help", "Ask me about a name, for example: What does dict.get do? Or: What is the signature of sorted?"),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One question and its answer."""

    question: str
    answer: str
    name: str
    core: bool = False


def ask(fact: Fact) -> tuple[Dialogue, ...]:
    """Every way to ask about a fact, the plainest first."""
    asked = [Dialogue(template.format(name=fact.name), fact.answer, fact.name, fact.core) for template in TEMPLATES[fact.kind]]
    if fact.signature:
        asked += [Dialogue(template.format(name=fact.name), fact.signature, fact.name, fact.core) for template in SIGNATURE]
    return tuple(asked)


def small_talk() -> tuple[Dialogue, ...]:
    return tuple(Dialogue(question, answer, "small talk", core=True) for question, answer in SMALL_TALK)


def is_held_out(fact: Fact, dialogue: Dialogue) -> bool:
    """Is this question never trained on? One in ten, chosen by a stable hash, never the plainest phrasing and never a signature."""
    questions = [template.format(name=fact.name) for template in TEMPLATES[fact.kind]]
    return dialogue.question in questions[1:] and zlib.crc32(dialogue.question.encode()) % 10 == 0
