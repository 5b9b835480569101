"""Writes docs/settings.md from the settings tree: `python -m cluster.settings_page > docs/settings.md`. A test compares them."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.settings import Settings

_HEAD = """# Settings

Made from `cluster/settings.py` by `python -m cluster.settings_page > docs/settings.md`; a test fails when they differ.

Sources, strongest first: environment variables, the YAML file that `MMAAS_CONFIG` names or else `HOME/settings.yaml`, the defaults.
A key of a section is written `MMAAS_SECTION__KEY=value` in the environment and as a mapping in YAML:

```yaml
log_level: INFO
gateway:
  port: 8000
```

A key that does not exist is an error that names the nearest one that does.
"""


def page() -> str:
    """The whole page in Markdown."""
    return _HEAD + "".join(_section(name, model, text) for name, model, text in _sections())


def _sections() -> Iterator[tuple[str, type[BaseModel], str]]:
    yield "", Settings, "The platform as a whole."
    for name, field in Settings.model_fields.items():
        if _is_section(field):
            assert isinstance(field.annotation, type)
            yield name, field.annotation, field.description or ""


def _section(name: str, model: type[BaseModel], text: str) -> str:
    rows = [_row(name, key, field) for key, field in model.model_fields.items() if not _is_section(field)]
    heading = f"\n## {name or 'Top level'}\n\n{text}\n\n"
    return heading + "| key | type | default | |\n|---|---|---|---|\n" + "".join(rows)


def _row(section: str, key: str, field: FieldInfo) -> str:
    dotted = f"{section}.{key}" if section else key
    limits = " ".join(filter(None, map(_limit, field.metadata)))
    kind = f"{_type(field.annotation)} {limits}".strip().replace("|", "\\|")
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{dotted}` | {kind} | `{_default(field)}` | {text} |\n"


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    return str(value) if isinstance(value, (str, Path, int, float)) else "none"


def _type(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        return " or ".join("none" if part is type(None) else _type(part) for part in get_args(annotation))
    return str(getattr(annotation, "__name__", annotation))


def _limit(constraint: object) -> str:
    signs = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}
    for kind, sign in signs.items():
        if isinstance(constraint, kind):
            return f"{sign} {getattr(constraint, kind.__name__.lower())}"
    pattern = getattr(constraint, "pattern", None)
    return f"`{pattern}`" if pattern else ""


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


if __name__ == "__main__":
    sys.stdout.write(page())
