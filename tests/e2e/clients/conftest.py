"""What other people's clients talk to: one platform with a model that calls tools, an encoder and a classifier."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deployments.encode import encoders
from tests.deployments.engine import families
from tests.deployments.tools.chats import CHATS
from tests.e2e.platform import RunningPlatform


@dataclass(frozen=True)
class Served:
    platform: RunningPlatform
    taste: dict[str, int]
    """A `logit_bias` for the caller. Its weights are random and it would write a string for ever. Biased so, it ends what may end:
    strings are empty, numbers are 3, one call is enough. Text that may be anything is mostly quotes."""

    @property
    def base_url(self) -> str:
        return self.platform.quickstart["base_url"]

    @property
    def api_key(self) -> str:
        return self.platform.quickstart["api_key"]


@pytest.fixture(scope="package")
def served(platform: RunningPlatform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("clients")
    platform.mmaas("deploy", "caller", "--model", str(caller(root / "caller")), "--tp", "2")
    platform.mmaas("deploy", "embedder", "--model", str(encoders.build("bert", root / "embedder")))
    platform.mmaas("deploy", "judge", "--model", str(encoders.build_classifier("bert", root / "judge")))
    vocabulary = families.build_tokenizer().get_vocab()
    taste = {'"': 50, "<|end|>": 40, "}": 30, "3": 20}
    yield Served(platform, {str(vocabulary[token]): bias for token, bias in taste.items()})
    for name in ("caller", "embedder", "judge"):
        platform.mmaas("undeploy", name)


def caller(directory: Path) -> Path:
    families.build("llama", directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    (directory / "chat_template.jinja").write_text(CHATS["hermes"].template)
    return directory
