"""Decision trees whose nodes lead anywhere but down are refused: scikit-learn follows a tree's indices without looking.

A tree that was trained has every child behind its parent, inside of the tree, and compares features that its rows have. A file may
say otherwise, and predicting with it would read other memory or never end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cluster.errors import ModelNotServable


def check(model: object) -> None:
    """Every tree of a model that skops has made. Raises ModelNotServable."""
    for owner in _objects(model):
        if (tree := vars(owner).get("tree_")) is not None:
            _check_tree(tree, int(getattr(owner, "n_features_in_", -1)))
        for part in _parts(vars(owner).get("estimators_")):
            if getattr(part, "tree_", None) is not None and part.n_features_in_ != getattr(owner, "n_features_in_", None):
                raise ModelNotServable("a tree of the forest takes other rows than the forest does")


def _check_tree(tree: Any, num_features: int) -> None:
    left, right, feature = tree.children_left, tree.children_right, tree.feature
    count = int(tree.node_count)
    is_leaf = left == -1
    places = np.arange(count)
    leads_down = (left > places) & (left < count) & (right > places) & (right < count)
    compares = (feature >= 0) & (feature < num_features)
    if not count or int(tree.n_features) != num_features or not (is_leaf | (leads_down & compares)).all():
        raise ModelNotServable("a decision tree of the model has nodes that lead out of it; the file is damaged or forged")


def _objects(model: object) -> Iterator[object]:
    """The model and all that it is made of, each once."""
    pending: list[Any] = [model]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if hasattr(one, "__dict__") and type(one).__module__.startswith("sklearn."):
            yield one
            pending.extend(vars(one).values())
        else:
            pending.extend(_parts(one))


def _parts(one: Any) -> list[Any]:
    if isinstance(one, dict):
        return list(one.values())
    if isinstance(one, (list, tuple, set)):
        return list(one)
    return list(one.ravel()) if isinstance(one, np.ndarray) and one.dtype == object else []
