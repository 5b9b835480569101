"""Which way of writing calls a model was trained on, told from its chat template: templates render earlier calls, and say to the
model how to write new ones. What is known is tried in this order:

* `[TOOL_CALLS]` in the template: Mistral's; with `[ARGS]` in it the newer of the two forms.
* `<tool_call>` without `<function=` or `<arg_key>`, which are other models' XML: Hermes and Qwen.
* `"parameters"` and `<|python_tag|>` or the role `ipython`: Llama 3.1 to 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from cluster.errors import ModelNotServable
from cluster.types import Constraint, Tool, ToolChoice
from deployments.engine.tokenizer import Tokenizer
from deployments.tools.grammar import Offer
from deployments.tools.hermes import Hermes
from deployments.tools.llama import Llama
from deployments.tools.marks import Marks
from deployments.tools.mistral import Mistral
from deployments.tools.source import Reading, Source
from deployments.tools.stream import CallStream

FormatName = Literal["hermes", "llama", "mistral", "mistral-named"]


class Family(Protocol):
    """A way of writing calls: how to read them, and the grammar that forces them."""

    def read(self, source: Source) -> Reading[None]: ...
    def grammar(self, offer: Offer) -> str: ...


@dataclass(frozen=True)
class ToolFormat:
    """`shown`: what stands in the text for special tokens that mark calls; `stop_ids`: tokens that end a turn of calls."""

    name: FormatName
    family: Family
    shown: Mapping[int, str]
    stop_ids: frozenset[int] = frozenset()

    def stream(self, tools: Sequence[Tool], choice: ToolChoice) -> CallStream:
        """A reader for one choice of an answer."""
        names = frozenset(choice.names or (tool.name for tool in tools))
        return CallStream(self.family.read, names, parallel=choice.parallel)

    def constraint(self, tools: Sequence[Tool], choice: ToolChoice, answer: Constraint | None) -> Constraint | None:
        """The form of an answer, where there are calls that must be made or must be right. `answer`: the form of one without
        calls. Raises InvalidRequest for a form that can't stand beside calls."""
        offer = Offer.of(tools, choice, answer)
        return Constraint("grammar", self.family.grammar(offer), param="tools") if offer.needs_grammar(len(tools)) else None


def find_format(tokenizer: Tokenizer, name: str | None = None) -> ToolFormat | None:
    """The format of a model's calls, or the one of that name; none for a template that knows no tools, or writes calls in a way
    that isn't known here. Raises ModelNotServable for a name that isn't one."""
    name = name or _told_by(tokenizer.tool_template or "")
    if name is None or not tokenizer.knows_tools:
        return None
    marks = Marks(tokenizer)
    family: Family
    match name:
        case "hermes":
            family = Hermes.of(marks)
        case "llama":
            family = Llama.of(marks)
        case "mistral":
            family = Mistral.of(marks, "list")
        case "mistral-named":
            family = Mistral.of(marks, "named")
        case _:
            raise ModelNotServable(f"there is no format {name!r} of tool calls; there are {', '.join(get_args(FormatName))}")
    end = tokenizer.token_id("<|eom_id|>")  # "end of message": Llama's word for a turn that awaits a result
    return ToolFormat(name, family, marks.shown, frozenset() if end is None else frozenset({end}))


def _told_by(template: str) -> FormatName | None:
    if "[TOOL_CALLS]" in template:
        return "mistral-named" if "[ARGS]" in template else "mistral"
    if "<tool_call>" in template and not ("<function=" in template or "<arg_key>" in template):
        return "hermes"
    if '"parameters"' in template and ("<|python_tag|>" in template or "ipython" in template):
        return "llama"
    return None
