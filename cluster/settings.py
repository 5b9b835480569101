"""One typed, frozen tree of settings, read once at the edge of a process.

Sources, strongest first: keyword arguments, `MMAAS_` environment (`MMAAS_GATEWAY__PORT=8000`), the YAML file named by
`MMAAS_CONFIG` or `HOME/settings.yaml`, the defaults below. Every field is documented here and nowhere else; `docs/settings.md` is
made from this file. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from cluster.errors import SettingsError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RaySettings(_Section):
    address: str | None = None
    """Address of a running cluster to use (`auto` on a node of one). None: `mmaas up` starts a local one."""
    gcs_port: int = Field(default=6379, ge=1024, le=65535)
    """Port of the local cluster's control store, on loopback."""
    dashboard_port: int = Field(default=8265, ge=1024, le=65535)
    """Port of Ray's dashboard and job API, on loopback, behind the cluster's token."""
    client_port: int = Field(default=10001, ge=1024, le=65535)
    """Port of Ray Client's server, on loopback; `ray start` offers no way to leave it off."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of the local node; None: the machine's cores."""
    object_store_bytes: int = Field(default=256 << 20, ge=80 << 20)
    """Shared memory for Ray's object store on the local node. Tokens and batches never pass through it, so it is small."""


class MlflowSettings(_Section):
    tracking_uri: str | None = None
    """URI of an MLflow server to use. None: `mmaas up` starts one on loopback with SQLite under HOME."""
    port: int = Field(default=5000, ge=1024, le=65535)
    """Port of the MLflow server that `mmaas up` starts."""


class GatewaySettings(_Section):
    port: int = Field(default=8000, ge=1024, le=65535)
    """The one port that callers use."""
    host: str = "127.0.0.1"
    """Address that the gateway's port binds."""
    names: tuple[str, ...] = ()
    """Names by which callers may call the gateway (the Host header, without its port); others get 421. Empty: any name."""
    internal_port: int = Field(default=30000, ge=1024, le=65436)
    """First of 100 ports where the gateway's replicas listen inside, behind HAProxy."""
    replicas: int = Field(default=1, ge=1, le=64)
    """Gateway replicas; more than one needs Postgres (SQLite has one writer)."""
    haproxy: bool = True
    """Put Serve's HAProxy in front (several times the Python proxy, docs/adr/0001-ingress.md); False: Python proxy."""
    max_body_bytes: int = Field(default=4 << 20, ge=1024, le=1 << 30)
    """Longest request body, counted on the bytes received."""
    max_json_depth: int = Field(default=64, ge=4, le=512)
    """Deepest nesting of a JSON body."""
    max_stream_s: float = Field(default=600.0, gt=0, le=86400)
    """Longest life of one answer. Draining and HAProxy's hard stop wait at least this long."""
    max_ongoing: int = Field(default=512, ge=1, le=100_000)
    """Requests that one gateway replica works on at once; more get 503 with Retry-After."""
    requests_per_minute: int | None = Field(default=None, ge=0, lt=1_000_000_000)
    """What a project without a limit of its own may ask for in a minute, over all models and keys; None: no limit."""
    tokens_per_minute: int | None = Field(default=None, ge=0, lt=1_000_000_000)
    """Tokens, in and out, of such a project in a minute; None: no limit."""
    streams: int | None = Field(default=None, ge=0, lt=1_000_000_000)
    """Streams of such a project at once; None: no limit."""
    cache_bytes: int = Field(default=0, ge=0)
    """Memory of one gateway replica for answers that it keeps, to give them again for exactly the same call of the same tenant to
    the same version of the model; 0: none are kept."""
    cache_tenant_bytes: int = Field(default=16 << 20, ge=0)
    """Of that, the most that one tenant's answers may take."""
    cache_s: float = Field(default=3600.0, gt=0)
    """How long an answer is kept."""
    idempotency_answer_bytes: int = Field(default=1 << 20, ge=0, le=64 << 20)
    """Longest answer to a call with an `Idempotency-Key` that is stored for a day; a longer one isn't, and doesn't run again."""
    idempotency_tenant_bytes: int = Field(default=64 << 20, ge=0)
    """Such answers that are stored for one project; the oldest give way."""
    kept_queue_bytes: int = Field(default=32 << 20, ge=0)
    """Inputs and outputs that may wait in memory to be kept, of projects that consented; more are dropped and counted."""


class MailSettings(_Section):
    host: str | None = None
    """SMTP server that takes the platform's mails, which are those of spend alerts. None: nothing is mailed; alerts are recorded,
    logged and shown all the same."""
    port: int = Field(default=587, ge=1, le=65535)
    """Port of the SMTP server."""
    security: Literal["starttls", "tls", "none"] = "starttls"
    """How the connection is encrypted; the server's certificate must be valid. none: only for a server on this machine."""
    sender: str = Field(default="mmaas@localhost", max_length=254, pattern=r"^[^\s@]+@[^\s@]+$")
    """Address that mails come from."""
    user: str | None = None
    """Name to log in with; None: no login."""
    password_file: Path | None = None
    """File with the password, which others can't read."""


class EngineSettings(_Section):
    block_size: int = Field(default=16, ge=1, le=256)
    """Tokens in one block of the KV cache."""
    kv_cache_bytes: int = Field(default=512 << 20, ge=1 << 16)
    """KV cache of one replica, over all its ranks."""
    max_sequences: int = Field(default=64, ge=1, le=4096)
    """Sequences that run in one step."""
    max_batch_tokens: int = Field(default=256, ge=16, le=1 << 20)
    """Token budget of one step: what doesn't fit waits for the next, longer prompts enter in chunks. More at once compute no faster
    on a CPU, and everybody in a step waits for all of it; a GPU wants 2048 or more."""
    step_target_ms: float = Field(default=400.0, ge=0)
    """What a step should take while prompts enter beside running answers; a prompt's chunk is cut to it. Less keeps answers more
    even, more lets first words come sooner where a step of `max_batch_tokens` takes longer than this. A large model may take twice
    its own step, and any twice the target while more wait for their first token than read. 0: chunks are cut by `max_batch_tokens`
    alone."""
    max_queued: int = Field(default=128, ge=0, le=100_000)
    """Requests that may wait in one replica beyond the running ones; more get 503 with Retry-After."""
    stream_interval_s: float = Field(default=0.02, ge=0, le=1)
    """A stream sends its first token at once and then at most so often, with all that came meanwhile: an item costs the same with
    one token as with ten. Many streams stretch it up to 0.1 s; 0 sends every token by itself."""
    step_deadline_s: float = Field(default=10.0, gt=0)
    """A rank that makes no progress for so long is taken for lost, and its whole group is replaced. A slow step is progress: every
    layer counts."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long `mmaas sleep` and a swap of weights let running answers go on. What runs longer is computed again after waking; for
    it, new weights are brought by a restart beside the old ones instead."""
    sleep_after_s: float = Field(default=0.0, ge=0)
    """A model that nobody has asked for so long gives its memory back, and loads again with the next request. 0: never."""
    start_deadline_s: float = Field(default=600.0, gt=0)
    """Longest time for a group to load its model."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads of one rank; None: the machine's cores over the ranks on it. Where they are as many as the cores that its
    process may use, each is bound to one."""
    cpus_per_shard: float = Field(default=0.5, ge=0)
    """Logical CPUs that one shard reserves in Ray: below one, so that serving and training fit side by side on a small machine."""
    shared_memory: bool = True
    """Let the ranks of one host talk through memory that they share, where it can be compiled on first use; else gloo."""
    native: bool | None = None
    """Run the model through our compiled decoder. None: where the model, the machine and a proof at load allow it, else through
    torch; true: refuse a model that it can't run; false: never."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where shards compute. auto: on GPUs where there are enough for all shards of a model, else on CPUs; cuda: on GPUs alone."""
    gpus_per_shard: float = Field(default=1.0, gt=0, le=1)
    """GPUs that one shard reserves in Ray when it computes on one: below one, small models share it (lower `gpu_memory` then)."""
    gpu_memory: float = Field(default=0.9, gt=0, lt=1)
    """Share of a GPU's memory that may be filled; on GPUs all that weights and the largest step leave of it becomes KV cache,
    and `kv_cache_bytes` counts for nothing."""
    cuda_graphs: bool | None = None
    """Record decode steps as CUDA graphs. None: where the model allows it; true: refuse a model that doesn't; false: never."""
    runner: Literal["auto", "torch", "fastgen"] = "auto"
    """What runs a model. auto: our decoder on CPUs, our attention kernel and CUDA graphs on GPUs; torch: the readable form, on
    either; fastgen: DeepSpeed inference v2, on a GPU, for the few families that it knows, without prefix cache and guesses."""
    cache: Path = Field(default=Path("~/.cache/mmaas"), validate_default=True)
    """Where a node keeps what can be made again: compiled kernels and weights that are cut already. Mode 0700."""
    speculation: int = Field(default=8, ge=0, le=64)
    """Tokens of one sequence that a step may guess from the sequence itself and verify (prompt lookup); 0: none. How many it does
    guess, and whether, follows from measured times. Answers stay the same."""
    cut_weights_bytes: int = Field(default=64 << 30, ge=0)
    """Disk that a node's ranks may fill, in `cache`, with weights that are cut and converted already, so that a second start reads
    only those; models that were not used for longest go first. 0: none are kept."""
    max_adapters: int = Field(default=64, ge=0, le=4096)
    """LoRA adapters that a replica holds at once; one that nobody uses makes room for another. 0: none are served."""
    adapter_bytes: int = Field(default=1 << 30, ge=0)
    """Memory for their numbers in one replica, over all its ranks, as far as they are cut."""
    tool_formats: dict[str, Literal["hermes", "llama", "mistral", "mistral-named"]] = {}
    """How served models write calls of tools, by their names, where it is another way than their chat template tells."""
    prefix_cache: bool = True
    """Keep the KV blocks of finished prompts and share them with later prompts of the same tenant that start alike."""

    @pydantic.field_validator("cache")
    @classmethod
    def _expanded(cls, value: Path) -> Path:
        return value.expanduser().absolute()


class EncoderSettings(_Section):
    step_target_ms: float = Field(default=40.0, gt=0, le=10_000)
    """What a step of an encoder should take: who comes waits for at most one before its rows take their turn."""
    max_queued_tokens: int = Field(default=1 << 20, ge=1)
    """Tokens that may wait in one replica; more get 503 with Retry-After, the tenant that has most first."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads of one replica; None: the machine's cores."""
    cpus: float = Field(default=0, ge=0)
    """Logical CPUs that one replica reserves in Ray. None by default, so that a small encoder takes no place from what is placed by
    reservations; set it where encoders do most of the work."""


class PredictorSettings(_Section):
    step_target_ms: float = Field(default=20.0, gt=0, le=10_000)
    """What a step of a tabular model should take: who comes waits for at most one before its rows take their turn."""
    max_queued_rows: int = Field(default=1 << 18, ge=1)
    """Rows that may wait in one replica; more get 503 with Retry-After, the tenant that has most first. A row counts once more for
    every 256 bytes that it has, so this bounds memory, too."""
    threads: int = Field(default=1, ge=1)
    """Compute threads of one replica. More pay for large forests and wide tables alone."""
    cpus: float = Field(default=0, ge=0)
    """Logical CPUs that one replica reserves in Ray."""


class TrainingSettings(_Section):
    workers: int = Field(default=2, ge=1, le=4096)
    """Ray Train workers of the demonstration."""
    cpus_per_worker: float = Field(default=0.5, ge=0)
    """Logical CPUs that one training worker reserves in Ray."""
    max_failures: int = Field(default=3, ge=0)
    """Times that a run resumes from its last checkpoint after losing a worker."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="MMAAS_", env_nested_delimiter="__", frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    home: Path = Path(".mmaas")
    """Where all state lives: database, library, secrets, logs. Mode 0700."""
    database_url: str | None = None
    """SQLAlchemy URL of the platform's store; None: SQLite in HOME."""
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    """Lowest level that is logged."""
    ray: RaySettings = RaySettings()
    """The Ray cluster."""
    mlflow: MlflowSettings = MlflowSettings()
    """Experiment tracking and model registry."""
    gateway: GatewaySettings = GatewaySettings()
    """The HTTP entrance."""
    mail: MailSettings = MailSettings()
    """The way of mails out of the platform."""
    engine: EngineSettings = EngineSettings()
    """The language-model engine: defaults for every deployment."""
    encoder: EncoderSettings = EncoderSettings()
    """Encoders: embeddings, reranking, classification. `engine.native`, `engine.cache` and `engine`'s deadlines count here, too."""
    predictor: PredictorSettings = PredictorSettings()
    """Tabular models. `engine`'s deadlines count here, too."""
    training: TrainingSettings = TrainingSettings()
    """Training jobs."""

    @pydantic.field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.gateway.replicas > 1 and not (self.database_url or "").startswith("postgresql"):
            raise ValueError("gateway.replicas > 1 needs Postgres: set database_url=postgresql+psycopg://…")
        return self

    @property
    def store_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'mmaas.db'}"

    @property
    def mlflow_uri(self) -> str:
        return self.mlflow.tracking_uri or f"http://127.0.0.1:{self.mlflow.port}"

    @property
    def base_url(self) -> str:
        return f"http://{self.gateway.host}:{self.gateway.port}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = _file(init_settings().get("home"))
        return init_settings, env_settings, *([YamlConfigSettingsSource(settings_cls, file)] if file else [])


_NOT_SETTINGS = frozenset({"MMAAS_CONFIG", "MMAAS_API_KEY"})  # the second is the client's


def load(**overrides: Any) -> Settings:
    """Read, merge and check every source. Raises SettingsError that names the offending keys and what to write instead."""
    for variable in os.environ:
        if variable.startswith("MMAAS_") and variable not in _NOT_SETTINGS:
            _check(variable.removeprefix("MMAAS_").lower().replace("__", "."), f"environment variable {variable}")
    if file := _file(overrides.get("home")):
        _check_tree(_read_yaml(file), str(file))
    _check_tree(overrides, "argument")
    try:
        return Settings(**overrides)
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise SettingsError(f"settings are not valid: {problems}") from None


def _file(home: str | Path | None) -> Path | None:
    """The YAML file that applies, if there is one."""
    named = os.environ.get("MMAAS_CONFIG")
    path = Path(named) if named else Path(home or os.environ.get("MMAAS_HOME") or ".mmaas") / "settings.yaml"
    if named and not path.is_file():
        raise SettingsError(f"MMAAS_CONFIG names {path}, which is not a file")
    return path if path.is_file() else None


@cache
def known_keys() -> frozenset[str]:
    """Every dotted key, sections included."""
    return frozenset(_walk(Settings, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _walk(field.annotation, f"{prefix}{name}.")


def _check_tree(tree: Mapping[str, Any], origin: str, prefix: str = "") -> None:
    for key, value in tree.items():
        _check(f"{prefix}{key}", origin)
        if isinstance(value, Mapping):
            _check_tree(value, origin, f"{prefix}{key}.")


def _check(dotted: str, origin: str) -> None:
    if dotted not in known_keys():
        near = difflib.get_close_matches(dotted, sorted(known_keys()), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "docs/settings.md lists all of them"
        raise SettingsError(f"{origin}: {dotted!r} is not a setting; {hint}", param=dotted)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} can't be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: the top level must be a mapping of settings")
    return tree
