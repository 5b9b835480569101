"""The pages under docs/ are true: files and names exist, walks go the way of the code, and all metrics and settings are there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase

from cluster import metrics
from cluster.settings import known_keys
from tests.documents import PACKAGES, PAGES, ROOT, commands, defined, files, links, mentioned, section, spans, steps

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
NO_SETTINGS = {"config", "api_key", "section.key", "mlflow.db"}  # two variables that are none, an example, a file
WALKS = ("Walk one: a chat request", "Walk two: the demonstration")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [name for name in files(text) if not (ROOT / name).exists()] == []
    assert [target for target in links(text) if not (page.parent / target).exists()] == []


def test_pages_name_enough_files_to_prove_anything() -> None:
    assert len(files(ARCHITECTURE)) > 50


@pytest.mark.parametrize("walk", WALKS)
def test_every_step_of_a_walk_is_defined_where_it_is_said_to_be(walk: str) -> None:
    found = steps(section(ARCHITECTURE, walk))
    assert len(found) > 20
    assert [f"{file} {name}" for _, file, name in found if name not in defined(ROOT / file)] == []


@pytest.mark.parametrize("walk", WALKS)
def test_every_step_of_a_walk_is_called_from_one_before_it(walk: str) -> None:
    found = steps(section(ARCHITECTURE, walk))
    assert out_of_order(found) == []
    assert sum(bool(caller) for caller, _, _ in found) < 5, "what others call proves nothing about the order"


def out_of_order(found: list[tuple[str, str, str]]) -> list[str]:
    """Steps whose name the code of no earlier step's file uses."""
    lost, known = [], mentioned(ROOT / found[0][1])
    for caller, file, name in found[1:]:
        if not caller and name.rpartition(".")[2] not in known:
            lost.append(f"{file} {name}")
        known |= mentioned(ROOT / file)
    return lost


def test_the_check_of_the_order_can_fail() -> None:
    there = [("", "mmaas/up.py", "up"), ("", "pipelines/demonstration.py", "run"), ("", "training/trainer.py", "fit")]
    assert out_of_order(there) == []
    assert out_of_order(there[::-1]) == ["mmaas/up.py up"]


def test_the_table_of_metrics_is_the_modules() -> None:
    table = re.findall(r"^\| `(mmaas_\w+)` \| (\w+) \| ([\w, ]*) \| (.+) \|$", section(OPERATIONS, "Metrics"), re.MULTILINE)
    assert [tuple(map(str.strip, row)) for row in table] == declared_metrics()


def declared_metrics() -> list[tuple[str, str, str, str]]:
    """Name, type, labels and text, as a scraper sees them."""
    rows = []
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            family = next(iter(metric.describe()))
            rows.append((family.name, family.type, ", ".join(metric._labelnames), family.documentation))
    for kind, name, text in metrics.ENGINE.values():
        family = kind(name, text, labels=("model",))
        rows.append((family.name, family.type, "model", text))
    return [(name + "_total" * (kind == "counter"), kind, labels, text) for name, kind, labels, text in rows]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page: Path) -> None:
    sections = "|".join(sorted(key for key in known_keys() if any(other.startswith(f"{key}.") for other in known_keys())))
    text = page.read_text(encoding="utf-8")
    dotted = {span for span in spans(text) if re.fullmatch(rf"(?:{sections})\.[a-z_]+", span)}
    variables = {name.lower().replace("__", ".") for name in re.findall(r"MMAAS_([A-Z_]+[A-Z])", text)}
    assert (dotted | variables) - known_keys() - NO_SETTINGS == set()


def test_everything_that_the_code_puts_into_home_is_in_the_table() -> None:
    sources = [path.read_text(encoding="utf-8") for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    put = {name for source in sources for name in re.findall(r'home / "([\w.-]+)"', source)}
    secrets = set(re.findall(r'_made\("([\w-]+)"\)', (ROOT / "cluster" / "private_files.py").read_text()))
    assert {"mmaas.db", "library"} <= put
    assert "pepper" in secrets
    listed = set(spans(section(OPERATIONS, "Files")))
    named = {entry.partition("/")[0] for entry in listed} | {entry.rpartition("/")[2] for entry in listed}
    assert (put | secrets) - named == set()


def test_the_changelog_has_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_reader_of_pages_sees_what_it_should() -> None:
    page = "`cluster/log.py` and `a b` and [x](docs/y.md#z) and `mmaas up`\n"
    page += "\n1. `cluster/log.py` · `bind`: it\n\n```\n$ mmaas down  # now\n```\n"
    assert files(page) == {"cluster/log.py"}
    assert links(page) == {"docs/y.md"}
    assert steps(page) == [("", "cluster/log.py", "bind")]
    assert commands(page, "mmaas") == [["mmaas", "down"], ["mmaas", "up"]]
