"""What a skops file may hold: the allow-list, checked on the file's own schema before anything of it is loaded.

skops has a list of its own, which trusts every estimator of scikit-learn and asks about the rest; ours is shorter and comes first.
It has no function, no method, no partial and no constructor call, so nothing in a file is called but the classes below.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from cluster.errors import ModelNotServable

MAX_ENTRIES = 20_000
MAX_BYTES = 4 << 30
MAX_SCHEMA_BYTES = 64 << 20

ESTIMATORS = frozenset(
    {
        "sklearn.cluster._kmeans.KMeans",
        "sklearn.cluster._kmeans.MiniBatchKMeans",
        "sklearn.compose._column_transformer.ColumnTransformer",
        "sklearn.compose._target.TransformedTargetRegressor",
        "sklearn.decomposition._pca.PCA",
        "sklearn.decomposition._truncated_svd.TruncatedSVD",
        "sklearn.discriminant_analysis.LinearDiscriminantAnalysis",
        "sklearn.ensemble._forest.ExtraTreesClassifier",
        "sklearn.ensemble._forest.ExtraTreesRegressor",
        "sklearn.ensemble._forest.RandomForestClassifier",
        "sklearn.ensemble._forest.RandomForestRegressor",
        "sklearn.feature_selection._univariate_selection.SelectKBest",
        "sklearn.impute._base.MissingIndicator",
        "sklearn.impute._base.SimpleImputer",
        "sklearn.linear_model._base.LinearRegression",
        "sklearn.linear_model._coordinate_descent.ElasticNet",
        "sklearn.linear_model._coordinate_descent.Lasso",
        "sklearn.linear_model._huber.HuberRegressor",
        "sklearn.linear_model._logistic.LogisticRegression",
        "sklearn.linear_model._ridge.Ridge",
        "sklearn.linear_model._ridge.RidgeClassifier",
        "sklearn.mixture._gaussian_mixture.GaussianMixture",
        "sklearn.naive_bayes.BernoulliNB",
        "sklearn.naive_bayes.GaussianNB",
        "sklearn.naive_bayes.MultinomialNB",
        "sklearn.pipeline.FeatureUnion",
        "sklearn.pipeline.Pipeline",
        "sklearn.preprocessing._data.MaxAbsScaler",
        "sklearn.preprocessing._data.MinMaxScaler",
        "sklearn.preprocessing._data.Normalizer",
        "sklearn.preprocessing._data.PowerTransformer",
        "sklearn.preprocessing._data.QuantileTransformer",
        "sklearn.preprocessing._data.RobustScaler",
        "sklearn.preprocessing._data.StandardScaler",
        "sklearn.preprocessing._discretization.KBinsDiscretizer",
        "sklearn.preprocessing._encoders.OneHotEncoder",
        "sklearn.preprocessing._encoders.OrdinalEncoder",
        "sklearn.preprocessing._function_transformer.FunctionTransformer",  # of columns passed through: it can hold no function
        "sklearn.preprocessing._label.LabelBinarizer",
        "sklearn.preprocessing._label.LabelEncoder",
        "sklearn.preprocessing._polynomial.PolynomialFeatures",
        "sklearn.tree._classes.DecisionTreeClassifier",
        "sklearn.tree._classes.DecisionTreeRegressor",
        "sklearn.tree._classes.ExtraTreeClassifier",
        "sklearn.tree._classes.ExtraTreeRegressor",
    }
)
"""Classes of scikit-learn that are loaded."""

TREE = "sklearn.tree._tree.Tree"
"""Its indices are followed without a check, so `trees.py` checks them; skops leaves that to whoever loads."""

TRUSTED = [TREE, "numpy.dtype"]
"""What skops doesn't trust by itself, and is checked here and there."""

_OF_A_KIND: dict[str, frozenset[str]] = {
    "ObjectNode": ESTIMATORS,
    "TreeNode": frozenset({TREE}),
    "DictNode": frozenset({"builtins.dict", "collections.OrderedDict"}),
    "ListNode": frozenset({"builtins.list"}),
    "TupleNode": frozenset({"builtins.tuple"}),
    "SetNode": frozenset({"builtins.set"}),
    "SliceNode": frozenset({"builtins.slice"}),
    "JsonNode": frozenset({"builtins.str"}),
    "RandomStateNode": frozenset({"numpy.random.mtrand.RandomState"}),
    "CachedNode": frozenset(),  # another reference to what is there already
}
_TYPES = frozenset({"builtins.int", "builtins.float", "builtins.str", "builtins.bool", "builtins.slice"})
_SPARSE = "scipy.sparse."


def check(path: Path) -> None:
    """Raises ModelNotServable that names the first thing in the file that isn't allowed."""
    try:
        with ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES or sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise ModelNotServable(f"{path.name} unpacks to more than {MAX_BYTES >> 30} GiB or {MAX_ENTRIES} parts")
            if archive.getinfo("schema.json").file_size > MAX_SCHEMA_BYTES:
                raise ModelNotServable(f"{path.name}: its schema has more than {MAX_SCHEMA_BYTES >> 20} MiB")
            schema = json.loads(archive.read("schema.json"))
    except (OSError, BadZipFile, KeyError, ValueError, RecursionError, NotImplementedError, RuntimeError) as error:
        raise ModelNotServable(f"{path.name} is no file of skops: {type(error).__name__}") from None
    for node in _nodes(schema):
        kind, named = str(node["__loader__"]), f"{node.get('__module__')}.{node.get('__class__')}"
        if kind != "CachedNode" and not _is_allowed(kind, named):
            raise ModelNotServable(
                f"{path.name} holds {named!r:.120} ({kind:.40}), which is not among the classes that are loaded; "
                "deployments/predict/skops_file.py lists them"
            )


def _is_allowed(kind: str, named: str) -> bool:
    if kind in _OF_A_KIND:
        return named in _OF_A_KIND[kind]
    if kind in ("NdArrayNode", "DTypeNode", "TypeNode"):
        module, _, name = named.rpartition(".")
        return (module == "numpy" and name.isidentifier()) or (kind == "TypeNode" and named in _TYPES)
    return kind == "SparseMatrixNode" and named.startswith(_SPARSE)


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object that skops would make something of, at any depth."""
    pending = [schema]
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            if "__loader__" in one:
                yield one
            pending.extend(one.values())
        elif isinstance(one, list):
            pending.extend(one)
