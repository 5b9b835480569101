from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.library.lineage import code_version, lineage


def test_code_version_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sample_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = code_version("sample_package")
    assert code_version("sample_package") == first
    (package / "part.py").write_text("A = 2\n")
    assert code_version("sample_package") != first
    assert len(first) == 16


def test_code_version_refuses_what_is_not_a_package() -> None:
    with pytest.raises(ModuleNotFoundError):
        code_version("no_such_package")


def test_lineage_says_data_code_base_and_versions() -> None:
    tags = lineage(dataset_sha256="d", dataset="docs", licence="PSF-2.0", run_id="r", base_model="none", code="c")
    assert tags["dataset_sha256"] == "d"
    assert tags["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "deepspeed", "licence", "format", "base_model", "code_version", "run_id"} <= set(tags)
