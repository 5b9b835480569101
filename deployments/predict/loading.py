"""From an admitted directory to a model that computes blocks of rows.

Only what `skops_file.py` lists is made, and trees are checked before one is followed. A step that fails is tried again block by
block, so that what the library refuses is the error of whoever sent it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.errors import InvalidRequest, ModelError, ModelNotServable, PlatformError
from cluster.types import TensorSpec
from deployments.predict import skops_file, trees
from deployments.predict.inspection import PredictorInfo
from deployments.predict.signature import Block, Signature
from deployments.predict.tensors import BYTES, DTYPES, Array

log = logging.getLogger(__name__)

Results = Mapping[str, Array]

Fate = Literal["filled", "passed", "refused"]
_FILLERS = frozenset({"SimpleImputer", "OneHotEncoder"})

_CALLERS_FAULT = (ValueError, TypeError, ArithmeticError, LookupError)
"""What scikit-learn raises for values that it can't take: a category that it never saw, a number too large."""


class Table:
    """A model of scikit-learn with its signature."""

    def __init__(self, model: Any, info: PredictorInfo) -> None:
        self._model, self._info = model, info
        self.signature = Signature(info.inputs, info.by_column, _outputs(model, info), _fate_of_nan(model) != "refused")

    def run(self, blocks: Sequence[Block]) -> list[Results | PlatformError]:
        """What each block gets."""
        try:
            return self._compute(blocks)
        except Exception as error:
            if len(blocks) > 1:
                return [result for block in blocks for result in self.run([block])]
            return [_told(error)]

    def _compute(self, blocks: Sequence[Block]) -> list[Results | PlatformError]:
        wanted = frozenset().union(*(block.wanted for block in blocks))
        rows = self._rows(blocks)
        results: dict[str, Array] = {}
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            for output in self.signature.outputs:
                if output.name in wanted:
                    results[output.name] = _shaped(np.asarray(getattr(self._model, output.name)(rows)), output)
        ends = np.cumsum([block.num_rows for block in blocks]).tolist()
        starts = [0, *ends[:-1]]
        cut = [{name: values[start:end] for name, values in results.items()} for start, end in zip(starts, ends, strict=True)]
        return [_finite(block, part) for block, part in zip(blocks, cut, strict=True)]

    def _rows(self, blocks: Sequence[Block]) -> Any:
        columns = [np.concatenate(parts) for parts in zip(*(block.columns for block in blocks), strict=True)]
        if not self._info.by_column:
            return columns[0]
        import pandas

        return pandas.DataFrame({spec.name: column for spec, column in zip(self._info.inputs, columns, strict=True)})


def load(directory: Path, info: PredictorInfo) -> Table:
    """Raises ModelNotServable."""
    import skops.io

    file = directory / info.file
    skops_file.check(file)
    try:
        model = skops.io.load(file, trusted=skops_file.TRUSTED)
    except Exception as error:
        raise ModelNotServable(f"{info.file} can't be loaded: {str(error)[:300]}") from error
    trees.check(model)
    num_columns = len(info.inputs) if info.by_column else info.inputs[0].shape[1]
    if not hasattr(model, "predict") or getattr(model, "n_features_in_", num_columns) != num_columns:
        raise ModelNotServable(f"the model predicts nothing, or takes other than the {num_columns} columns of its signature")
    return Table(model, info)


def _fate_of_nan(model: Any) -> Fate:
    """What becomes of a missing number in it: a gap that is filled, one that is passed on, or a refusal."""
    if type(model).__name__ in _FILLERS:
        return "filled"
    if hasattr(model, "steps"):
        fates = [_fate_of_nan(step) for _, step in model.steps if hasattr(step, "__sklearn_tags__")]
        return next((fate for fate in fates if fate != "passed"), "passed")
    if hasattr(model, "transformers_"):
        fates = [_fate_of_nan(part) for _, part, *_ in model.transformers_ if hasattr(part, "__sklearn_tags__")]
        return next((fate for fate in ("filled", "passed") if fate in fates), "refused")
    return "passed" if model.__sklearn_tags__().input_tags.allow_nan else "refused"


def _outputs(model: Any, info: PredictorInfo) -> tuple[TensorSpec, ...]:
    """`predict`, and `predict_proba` of a classifier: a column for each of its classes, in their order."""
    classes = getattr(model, "classes_", None)
    if not hasattr(model, "predict_proba") or not isinstance(classes, np.ndarray) or classes.ndim != 1:
        return (info.predicted,)
    return info.predicted, TensorSpec("predict_proba", "FP64", (-1, len(classes)))


def _shaped(values: Array, output: TensorSpec) -> Array:
    """Raises ModelError where the model gives other than its signature says, of which it is the model's to be right."""
    fits = values.ndim == len(output.shape) and all(size in (-1, own) for size, own in zip(output.shape, values.shape, strict=True))
    dtype = DTYPES.get(output.datatype)
    kind = values.dtype.kind
    if not fits or (kind not in "OUST" if output.datatype == BYTES else dtype is None or kind not in "biuf"):
        raise ModelError(
            f"The model's {output.name} has the shape {values.shape} and the type {values.dtype}, not its signature's."
        )
    return values if dtype is None else values.astype(dtype, copy=False)


def _finite(block: Block, results: Mapping[str, Array]) -> Results | PlatformError:
    for name in block.wanted:
        values = results[name]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return InvalidRequest(
                "The model has no finite answer for these inputs: their numbers are too large for it.", param="inputs"
            )
    return results


def _told(error: Exception) -> PlatformError:
    if isinstance(error, PlatformError):
        return error
    if isinstance(error, _CALLERS_FAULT):
        first = (str(error).splitlines() or [""])[0][:200]
        return InvalidRequest(f"The model can't compute with these inputs: {first}", param="inputs")
    log.error("a step failed", exc_info=error)
    return ModelError(f"The model failed on these inputs ({type(error).__name__}).")
