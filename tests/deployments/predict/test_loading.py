"""Models as scikit-learn computes them, whatever they are batched with; and what is refused before or while it is loaded."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import InvalidRequest, ModelNotServable
from cluster.types import Tensor, TensorSpec
from deployments.predict import skops_file, trees
from deployments.predict.inspection import inspect, is_predictor
from deployments.predict.loading import Table, load
from deployments.predict.tensors import array_of
from tests.deployments.predict import tables
from tests.deployments.predict.tables import FLOWERS, PEOPLE, columns, flowers, right, tensor


def loaded(directory: Path) -> Table:
    return load(directory, inspect(directory))


def answers(table: Table, *tensors: Tensor) -> dict[str, Any]:
    wanted = table.signature.wanted(())
    found = table.signature.tensors(wanted, [right(result) for result in table.run(table.signature.blocks(tensors, wanted))])
    return {one.name: array_of(one) for one in found}


def test_labels_and_probabilities_are_scikit_learns(iris: Path) -> None:
    table, model = loaded(iris), tables.irises()
    found = answers(table, flowers(150))
    assert [name.decode() for name in found["predict"]] == model.predict(FLOWERS).tolist()
    np.testing.assert_allclose(found["predict_proba"], model.predict_proba(FLOWERS), rtol=1e-12)
    assert table.signature.outputs == (TensorSpec("predict", "BYTES", (-1,)), TensorSpec("predict_proba", "FP64", (-1, 3)))


def test_a_table_of_columns_with_texts_among_numbers(people: Path) -> None:
    table = loaded(people)
    assert [spec.datatype for spec in table.signature.inputs] == ["FP64", "BYTES", "INT64", "BOOL"]
    found = answers(table, *reversed(columns()))
    np.testing.assert_allclose(found["predict"], tables.people().predict(PEOPLE))
    upright = [Tensor(one.name, one.datatype, (*one.shape, 1), one.data) for one in columns()]
    np.testing.assert_array_equal(answers(table, *upright)["predict"], found["predict"])


def test_trees_and_forests(forest: Path, tmp_path: Path) -> None:
    np.testing.assert_array_equal(answers(loaded(forest), flowers(150))["predict"], tables.forest().predict(FLOWERS))
    saved = tables.saved(tables.trees(), FLOWERS[:, :3], tmp_path / "trees", trusted=[skops_file.TREE])
    found = answers(loaded(saved), tensor("input-0", "FP64", FLOWERS[:, :3]))
    np.testing.assert_allclose(found["predict"], tables.trees().predict(FLOWERS[:, :3]))


def test_rows_of_many_calls_in_one_step_each_get_their_own(iris: Path) -> None:
    table, model = loaded(iris), tables.irises()
    wanted = table.signature.wanted(("predict_proba",))
    asked = [[tensor("input-0", "FP64", FLOWERS[n : 2 * n + 1])] for n in range(20)]
    blocks = [block for tensors in asked for block in table.signature.blocks(tensors, wanted)]
    for n, result in enumerate(table.run(blocks)):
        np.testing.assert_allclose(right(result)["predict_proba"], model.predict_proba(FLOWERS[n : 2 * n + 1]), rtol=1e-12)
        assert set(right(result)) == {"predict_proba"}


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "INT32", "UINT8", "BOOL"])
def test_what_fits_without_loss_is_taken(iris: Path, datatype: str) -> None:
    given = np.round(FLOWERS[:4]).astype(bool) if datatype == "BOOL" else np.round(FLOWERS[:4])
    found = answers(loaded(iris), tensor("input-0", datatype, given))
    np.testing.assert_allclose(found["predict_proba"], tables.irises().predict_proba(given.astype(float)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "input-0' is missing"),
        ([flowers(), tensor("more", "FP64", [1.0])], "no input 'more'"),
        ([tensor("input-0", "BYTES", [["a"] * 4])], "takes FP64"),
        ([tensor("input-0", "FP64", [1.0] * 4)], r"takes \[-1, 4\]"),
        ([tensor("input-0", "FP64", [[1.0] * 3])], r"takes \[-1, 4\]"),
        ([tensor("input-0", "FP64", [[[1.0] * 4]])], r"takes \[-1, 4\]"),
        ([tensor("input-0", "FP64", np.empty((0, 4)))], "no row"),
        ([tensor("input-0", "FP64", [[1.0] * 4, [1.0, np.nan, 1.0, 1.0]])], "row 1 that is not finite"),
        ([tensor("input-0", "FP64", [[np.inf] * 4])], "row 0"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(iris: Path, given: list[Tensor], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        loaded(iris).signature.blocks(given, ())


def test_columns_that_do_not_fit_are_refused_by_name(people: Path) -> None:
    signature = loaded(people).signature
    for place, wrong, words in (
        (0, tensor("age", "FP64", [1.0]), "6 rows, 'age' has 1"),
        (1, Tensor("city", "BYTES", (6,), b"\1\0\0\0\xff" * 6), "not UTF-8"),
        (2, tensor("visits", "FP64", [1.0] * 6), "takes INT64"),
        (3, tensor("member", "INT64", [1] * 6), "takes BOOL"),
    ):
        given = columns()
        given[place] = wrong
        with pytest.raises(InvalidRequest, match=words):
            signature.blocks(given, ())


def test_what_the_model_cannot_take_is_the_error_of_whoever_sent_it(people: Path) -> None:
    table = loaded(people)
    stranger = PEOPLE.assign(city="Atlantis")
    wanted = table.signature.wanted(())
    blocks = [table.signature.blocks(columns(frame), wanted)[0] for frame in (PEOPLE, stranger, PEOPLE)]
    first, second, third = table.run(blocks)
    assert isinstance(second, InvalidRequest)
    assert "Atlantis" in second.message
    np.testing.assert_array_equal(right(first)["predict"], right(third)["predict"])


def test_numbers_too_large_for_the_model_are_a_refusal(iris: Path) -> None:
    table = loaded(iris)
    huge = table.signature.blocks([tensor("input-0", "FP64", [[1e308, -1e308, 1e308, -1e308]])], table.signature.wanted(()))
    normal = table.signature.blocks([flowers()], table.signature.wanted(()))
    refused, fine = table.run([*huge, *normal])
    assert isinstance(refused, InvalidRequest)
    assert right(fine)["predict"].tolist() == ["setosa"] * 3


def test_missing_numbers_are_taken_where_the_model_fills_them(tmp_path: Path) -> None:
    table = loaded(tables.saved(tables.filled(), FLOWERS, tmp_path / "filled", trusted=skops_file.TRUSTED))
    holes = FLOWERS[:3].copy()
    holes[1, 2] = np.nan
    np.testing.assert_array_equal(answers(table, tensor("input-0", "FP64", holes))["predict"], tables.filled().predict(holes))
    with pytest.raises(InvalidRequest, match="infinite"):
        table.signature.blocks([tensor("input-0", "FP64", [[-np.inf] * 4])], ())


def changed(source: Path, target: Path, *, described: Callable[[str], str] = str, schema: Callable[[str], str] = str) -> Path:
    """A copy with another MLmodel, and another schema in its skops file."""
    shutil.copytree(source, target)
    (target / "MLmodel").write_text(described((target / "MLmodel").read_text()))
    with zipfile.ZipFile(source / "model.skops") as old, zipfile.ZipFile(target / "model.skops", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, schema(content.decode()) if entry.filename == "schema.json" else content)
    return target


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("serialization_format: skops", "serialization_format: cloudpickle", "can run code"),
        ("code: null", "code: code", "never run"),
        ("pickled_model: model.skops", "pickled_model: ../model.skops", "none of this directory"),
        (r"sklearn_version: \S+", "sklearn_version: 0.24.2", "0.24.2"),
        ("  inputs: .*", "  inputs: null", "signature"),
        (r"\[-1, 4\]", "[-1, 4, 0]", "shape"),
        (r'"float64"', '"datetime64[ns]"', "type"),
        ("(?s).*", "[1, 2", "YAML"),
        ("(?s).*", "a", "no mapping"),
    ],
)
def test_a_description_that_cannot_be_followed_is_refused(iris: Path, tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(ModelNotServable, match=re.escape(words)):
        inspect(changed(iris, tmp_path / "other", described=lambda text: re.sub(old, new, text, count=1)))


def test_a_pickle_is_never_loaded(iris: Path, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    directory = changed(iris, tmp_path / "other")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (opened,)

    (directory / "model.skops").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelNotServable, match="no file of skops"):
        loaded(directory)
    assert not opened.exists()


FORBIDDEN = [
    {"__loader__": "FunctionNode", "__module__": "os", "__class__": "system"},
    {"__loader__": "FunctionNode", "__module__": "numpy", "__class__": "add"},
    {"__loader__": "TypeNode", "__module__": "subprocess", "__class__": "Popen"},
    {"__loader__": "TypeNode", "__module__": "numpy", "__class__": "ctypeslib.load_library"},
    {"__loader__": "ObjectNode", "__module__": "sklearn.neighbors._classification", "__class__": "KNeighborsClassifier"},
    {"__loader__": "ObjectNode", "__module__": "sklearn.datasets", "__class__": "load_files"},
    {"__loader__": "ConstructorFromReduceNode", "__module__": "sklearn.pipeline", "__class__": "Pipeline"},
    {"__loader__": "OperatorFuncNode", "__module__": "operator", "__class__": "methodcaller"},
    {"__loader__": "MethodNode", "__module__": "builtins", "__class__": "str"},
    {"__loader__": "PartialNode", "__module__": "functools", "__class__": "partial"},
    {"__loader__": "ListNode", "__module__": "builtins", "__class__": "exec"},
    {"__loader__": "SparseMatrixNode", "__module__": "os", "__class__": "path"},
    {"__loader__": "NewNode", "__module__": "builtins", "__class__": "list"},
    {"__loader__": None},
]


@pytest.mark.parametrize("node", FORBIDDEN, ids=lambda node: f"{node['__loader__']}-{node.get('__class__')}")
def test_what_is_not_on_the_list_is_not_loaded(iris: Path, tmp_path: Path, node: dict[str, Any]) -> None:
    def planted(schema: str) -> str:
        return json.dumps(json.loads(schema) | {"extra": [{"deep": node}]})

    with pytest.raises(ModelNotServable, match="not among the classes"):
        inspect(changed(iris, tmp_path / "other", schema=planted))


def test_files_that_unpack_to_too_much_are_refused(iris: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skops_file, "MAX_BYTES", 1000)
    with pytest.raises(ModelNotServable, match="unpacks"):
        inspect(iris)
    monkeypatch.undo()
    monkeypatch.setattr(skops_file, "MAX_SCHEMA_BYTES", 1000)
    with pytest.raises(ModelNotServable, match="schema"):
        inspect(iris)


@pytest.mark.parametrize("change", ["children_left", "feature", "cycle", "width"])
def test_a_tree_that_leads_out_of_itself_is_refused(change: str) -> None:
    model = tables.forest()
    trees.check(model)
    tree = model.estimators_[2].tree_
    if change == "children_left":
        tree.children_left[0] = tree.node_count + 1000
    elif change == "feature":
        tree.feature[0] = 10_000
    elif change == "cycle":
        tree.children_right[1 if tree.children_right[1] > 0 else 0] = 0
    else:
        model.estimators_[2].n_features_in_ = 3
    with pytest.raises(ModelNotServable, match="tree"):
        trees.check(model)


def test_a_directory_without_a_description_is_no_tabular_model(iris: Path, tmp_path: Path) -> None:
    assert is_predictor(iris)
    assert not is_predictor(tmp_path)
