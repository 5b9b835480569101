"""HOME/quickstart.json (mode 0600): address, keys and model of the platform, for scripts and for `mmaas chat`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import SettingsError
from cluster.private_files import read_private, write_private
from cluster.settings import Settings


@dataclass(frozen=True)
class Quickstart:
    """`base_url` ends in /v1, as OpenAI's clients want it."""

    base_url: str
    api_key: str
    admin_key: str
    model: str

    @staticmethod
    def path(settings: Settings) -> Path:
        return settings.home / "quickstart.json"

    @classmethod
    def load(cls, settings: Settings) -> Quickstart:
        """Raises SettingsError when there is none, or when it isn't one."""
        path = cls.path(settings)
        try:
            return cls(**json.loads(read_private(path)))
        except FileNotFoundError:
            raise SettingsError(f"there is no {path}; run: mmaas up") from None
        except (ValueError, TypeError) as error:
            raise SettingsError(f"{path} is damaged ({error}); remove it and run: mmaas up") from None

    def save(self, settings: Settings) -> None:
        write_private(self.path(settings), (json.dumps(asdict(self), indent=2) + "\n").encode())
