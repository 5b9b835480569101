"""How the suite is dealt out when it runs in several processes (`pytest -n`): by file, so that fixtures are made once. And what the
programs that it starts must not inherit."""

from __future__ import annotations

import signal

import pytest

ALONE = {"tests/e2e": "platform", "tests/e2e/clients": "platform"}
"""Folders whose files share what a session starts, and so a process."""


def pytest_configure() -> None:
    """A shell that runs us in the background has us ignore Ctrl-C, and so would all that we start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist names the tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(ALONE.get(file.rpartition("/")[0], file)))
    # Files that start a platform take longest and mostly wait: first, so that none of them is left over at the end.
    starts = {group(item) for item in items if item.get_closest_marker("e2e")}
    items.sort(key=lambda item: group(item) not in starts)


def group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker, "every item has been given one"
    return str(marker.args[0])
