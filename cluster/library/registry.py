"""Models, versions and aliases: MLflow keeps the records, our storage keeps the files.

Weights never pass through MLflow's server. A version's `source` is `library:///ADDRESS`, a scheme of our own: a `file:` source is
refused by MLflow's server unless it lies among a run's artifacts, and it would tie the record to one machine's paths.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import Conflict, InvalidRequest, NotFound
from cluster.storage import Storage, name_of
from cluster.types import NAME, ModelRef

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SCHEME = "library:///"


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One registered version. `path` is a local directory with the verified files, empty in a listing, which reads no weights."""

    name: str
    version: int
    path: str
    tags: Mapping[str, str]
    run_id: str | None
    aliases: tuple[str, ...] = ()

    @property
    def ref(self) -> ModelRef:
        return ModelRef(self.name, self.version)


class Registry:
    """MLflow's model registry at `tracking_uri` (http, sqlite or postgresql) over the files of `library`."""

    def __init__(self, tracking_uri: str, library: Storage) -> None:
        self._uri = tracking_uri
        self._library = library

    def register(
        self,
        name: str,
        directory: str | Path,
        *,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> ModelVersion:
        """Store the files, then record a version of them, then let `alias` point to it; a crash leaves at most files without a
        record. Raises InvalidRequest for a name that can't be referred to later."""
        _check(name, alias)
        manifest = self._library.publish(directory)
        self._create_model(name)
        created = self._client.create_model_version(
            name,
            source=_SCHEME + manifest.address,
            run_id=run_id,
            tags={**(tags or {}), "sha256": manifest.address, "size_bytes": str(manifest.size_bytes)},
            await_creation_for=0,  # a version of files that are already there is ready at once
        )
        if alias:
            self.set_alias(name, alias, int(created.version))
        return self.resolve(ModelRef(name, int(created.version)))

    def resolve(self, ref: ModelRef) -> ModelVersion:
        """The version that a reference means now, its files verified byte by byte.

        Raises NotFound, naming what there is instead, and StorageError when the files are missing or damaged.
        """
        record = self._record(ref)
        stored = name_of(record.source.removeprefix(_SCHEME))
        return _version(record, path=str(self._library.fetch(stored)), aliases=tuple(record.aliases))

    def list(self) -> builtins.list[ModelVersion]:
        """Every version of every model, by name and the newest first."""
        models = sorted(_pages(self._client.search_registered_models), key=lambda model: model.name)
        return [version for model in models for version in self._versions(model.name)]

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias (`champion`, `challenger`, …) to a version. Raises NotFound when there is no such version."""
        _check(name, alias)
        self._record(ModelRef(name, version))
        self._client.set_registered_model_alias(name, alias, str(version))

    @property
    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def _create_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _record(self, ref: ModelRef) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            if ref.version is not None:
                record = self._client.get_model_version(ref.name, str(ref.version))
            else:
                record = self._client.get_model_version_by_alias(ref.name, ref.alias or "champion")
        except MlflowException as error:
            # An alias that isn't there is RESOURCE_DOES_NOT_EXIST over HTTP and INVALID_PARAMETER_VALUE from the store.
            if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                raise
            raise NotFound(f"{ref} is not in the library; {self._what_exists(ref.name)}", param="model") from error
        if not (record.source or "").startswith(_SCHEME):
            raise Conflict(f"{ref} was not registered through this library: its files are at {record.source!r}")
        return record

    def _what_exists(self, name: str) -> str:
        versions = self.list()
        known = [version for version in versions if version.name == name]
        if known:
            return "there is " + ", ".join(_describe(version) for version in known[:10])
        names = sorted({version.name for version in versions})
        return f"known models: {', '.join(names[:20])}" if names else "the library holds no model yet"

    def _versions(self, name: str) -> Iterator[ModelVersion]:
        # NOTE: a search leaves the aliases of versions empty, the registered model has them.
        aliases = self._client.get_registered_model(name).aliases
        records = _pages(self._client.search_model_versions, filter_string=f"name='{name}'")
        for record in sorted(records, key=lambda found: -int(found.version)):
            named = sorted(alias for alias, version in aliases.items() if int(version) == int(record.version))
            yield _version(record, path="", aliases=tuple(named))


def _version(record: Any, path: str, aliases: tuple[str, ...]) -> ModelVersion:
    # NOTE: `version` is an int from a SQL store and a str over HTTP; a run id that isn't there is None or "".
    return ModelVersion(record.name, int(record.version), path, dict(record.tags), record.run_id or None, tuple(sorted(aliases)))


def _pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    page = search(**arguments)
    yield from page
    while page.token:
        page = search(**arguments, page_token=page.token)
        yield from page


def _describe(version: ModelVersion) -> str:
    return str(version.ref) + "".join(f" (@{alias})" for alias in version.aliases)


def _check(name: str, alias: str | None) -> None:
    if NAME.match(name) is None:
        raise InvalidRequest(f"{name!r} is not a model name", param="name")
    try:
        ModelRef.parse(f"models:/{name}@{alias or 'champion'}")
    except ValueError:
        raise InvalidRequest(
            f"{alias!r} is not an alias: lower case, digits, _ and -, at most 64 characters", param="alias"
        ) from None
