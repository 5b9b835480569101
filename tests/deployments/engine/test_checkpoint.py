"""Admission of model directories: real ones pass with the right shape, every other gets a sentence."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import ModelNotServable
from deployments.engine.checkpoint import inspect
from deployments.engine.families import NOT_SERVABLE, NOT_SHARDABLE, NOT_SHARDABLE_WITH, SHARDABLE
from deployments.engine.model_config import check_runs_no_code
from tests.deployments.engine import texts
from tests.deployments.engine.tiny import build

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A model directory that is good."""
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def directory(whole, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def save(family: str, directory: Path, **options) -> Path:
    texts.byte_level(directory)
    build(family).save_pretrained(directory, **options)
    return directory


def change(directory: Path, **entries) -> None:
    """Other entries in config.json; None takes one out."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(directory: Path, tp: int = 1, **options) -> str:
    with pytest.raises(ModelNotServable) as error:
        inspect(directory, tp=tp, dtype=options.pop("dtype", "float32"), **options)
    return error.value.message


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_neox", "gpt2", "opt", "phi3", "mixtral"])
def test_shape_of_a_real_model(family, tmp_path):
    info = inspect(save(family, tmp_path), tp=1, dtype="bfloat16")
    model = build(family)
    assert info.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert info.weight_bytes == 2 * info.num_parameters
    assert (info.model_type, info.architecture) == (family, type(model).__name__)
    assert (info.num_layers, info.hidden_size, info.num_heads, info.head_dim) == (4, 64, 8, 8)
    assert info.num_kv_heads == (8 if family in {"gpt_neox", "gpt2", "opt"} else 4)
    assert (info.vocab_size, info.max_model_len) == (128, 256)
    assert info.kv_bytes_per_token == 2 * 4 * info.num_kv_heads * 8 * 2


def test_shards_count_as_one_file(tmp_path, whole):
    sharded = save("llama", tmp_path, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert inspect(sharded, tp=2, dtype="float32") == inspect(whole, tp=2, dtype="float32")


def test_the_width_of_a_head_shows_in_the_weights(tmp_path):
    directory = save("gemma", tmp_path)
    change(directory, head_dim=None, hidden_size=128)
    assert inspect(directory, tp=1, dtype="float32").head_dim == 8


def test_the_context_can_be_shortened_but_not_stretched(directory):
    assert inspect(directory, tp=1, dtype="float32", max_model_len=100).max_model_len == 100
    assert "256" in refused(directory, max_model_len=257)
    assert "256" in refused(directory, max_model_len=0)


def test_missing_files_are_named(directory, tmp_path):
    assert "not a directory" in refused(tmp_path / "nowhere")
    (directory / "tokenizer.json").rename(tmp_path / "t")
    assert "no tokenizer.json" in refused(directory)
    (directory / "config.json").unlink()
    assert "no config.json" in refused(directory)


@pytest.mark.parametrize(
    ("instead", "advice"),
    [
        ("pytorch_model.bin", "safe_serialization"),
        ("weights.pt", "safe_serialization"),
        ("adapter_model.safetensors", "merge"),
        ("model-00001-of-00002.safetensors", "index"),
        ("model.gguf", "GGUF"),
        ("README.md", "missing"),
    ],
)
def test_other_weights_are_refused_with_advice(directory, instead, advice):
    (directory / "model.safetensors").rename(directory / instead)
    assert advice in refused(directory)


def test_a_pickle_is_never_loaded(directory, tmp_path):
    """A pickle under the name of safetensors: the file that unpickling would write stays absent."""
    marker = tmp_path / "marker"
    (directory / "model.safetensors").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    assert "truncated or damaged" in refused(directory)
    assert not marker.exists()


def test_missing_shards_are_named(tmp_path):
    directory = save("llama", tmp_path, max_shard_size="50KB")
    lost = max(directory.glob("*.safetensors"))
    lost.unlink()
    assert lost.name in refused(directory)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 7, None, "", "a\n"])
def test_an_index_names_only_files_of_its_directory(directory, name):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert "no file name" in refused(directory)


@pytest.mark.parametrize("index", [{"weight_map": {}}, {"weight_map": 3}, {"x": 1}])
def test_an_index_needs_a_map(directory, index):
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map" in refused(directory)


def test_an_index_that_places_a_tensor_wrongly_is_refused(directory):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"no.such": "model.safetensors"}}))
    assert "no.such" in refused(directory)


@pytest.mark.parametrize(
    "entries",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
        {"trust_remote_code": True},
        {"_attn_implementation_internal": "someone/kernel"},
        {"attn_implementation": "sdpa"},
        {"experts_implementation": "x"},
        {"text_config": {"deep": [{"auto_map": {}}]}},
        {"_anything": 1},
        {"custom_generate": "x"},
        {"use_kernels": True},
        {"backbone": "someone/model"},
        {"hidden_act": ["a/b:fn"]},
    ],
)
def test_keys_that_can_run_code_are_refused(directory, entries):
    change(directory, **entries)
    assert "remove it" in refused(directory)


def test_where_a_model_came_from_is_no_code(directory):
    change(directory, _name_or_path="someone/model")
    assert inspect(directory, tp=1, dtype="float32")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"model_type": None}, "model_type"),
        ({"model_type": 3}, "model_type"),
        ({"architectures": None}, "causal"),
        ({"architectures": ["BertForSequenceClassification"]}, "causal"),
        ({"is_encoder_decoder": True}, "decoder"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_attention_heads": "8"}, "num_attention_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(directory, entries, says):
    change(directory, **entries)
    assert says in refused(directory)


def test_shards_must_divide_every_layer(directory):
    message = refused(directory, tp=3)
    assert "4 (key/value heads)" in message
    assert message.endswith("these values work: 1, 2, 4")
    assert "8 (attention heads)" not in refused(directory, tp=8)
    assert "at least 1" in refused(directory, tp=0)
    change(directory, intermediate_size=97)
    assert refused(directory, tp=2).endswith("these values work: 1")


@pytest.mark.parametrize("family", sorted(NOT_SERVABLE))
def test_families_without_paged_attention_are_refused(directory, family):
    change(directory, model_type=family)
    assert NOT_SERVABLE[family] in refused(directory)


@pytest.mark.parametrize("family", sorted(NOT_SHARDABLE))
def test_families_that_can_not_be_sharded_are_served_whole(directory, family):
    change(directory, model_type=family)
    assert "use tp=1" in refused(directory, tp=2)
    assert inspect(directory, tp=1, dtype="float32")


@pytest.mark.parametrize(("family", "switch"), NOT_SHARDABLE_WITH.items())
def test_a_switch_can_forbid_sharding(directory, family, switch):
    change(directory, model_type=family)
    assert inspect(directory, tp=2, dtype="float32")
    change(directory, **{switch: True})
    assert switch in refused(directory, tp=2)


def test_unknown_families_are_served_whole_only(directory):
    change(directory, model_type="newcomer")
    assert inspect(directory, tp=1, dtype="float32")
    message = refused(directory, tp=2)
    assert "untested" in message
    assert all(family in message for family in SHARDABLE)


def test_dtypes_are_named(directory):
    assert "bfloat16" in refused(directory, dtype="int8")


def test_every_truncation_of_a_model_is_refused(directory):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    header = struct.unpack("<Q", content[:8])[0] + 8
    for size in [*range(0, header, 41), header, header + 1, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        assert "truncated or damaged" in refused(directory)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_configuration_is_accepted_or_refused(whole, tmp_path, data):
    """Values of every kind at every key: a ModelInfo or ModelNotServable, never another exception."""
    config = json.loads((whole / "config.json").read_text())
    keys = data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3))
    config |= {key: data.draw(JSON) for key in keys} | data.draw(st.dictionaries(st.text(max_size=8), JSON, max_size=2))
    for name in ("model.safetensors", "tokenizer.json"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(whole / name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(ModelNotServable):
        assert inspect(tmp_path, tp=data.draw(st.integers(-1, 3)), dtype="float32").num_layers > 0


@given(
    key=st.sampled_from(["auto_map", "trust_remote_code", "_attn_implementation_internal", "_attn_implementation", "Auto_Map"]),
    depth=st.integers(0, 30),
    value=JSON,
    inside_list=st.booleans(),
)
def test_no_depth_hides_a_key_that_can_run_code(key, depth, value, inside_list):
    config = {key: value}
    for _ in range(depth):
        config = {"text_config": [config] if inside_list else config}
    with pytest.raises(ModelNotServable):
        check_runs_no_code(config)
