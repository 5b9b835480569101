"""A model without weights, on the meta device, and how stored tensors get into it. The only module that reaches into transformers'
loader: renamed keys, experts that are stacked while they load, tied weights and computed buffers stay transformers' business.

Knows nothing of files, ranks or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.errors import ModelNotServable
from deployments.engine import attention


def build(directory: Path, dtype: torch.dtype) -> nn.Module:
    """Modules and shapes from config.json alone. Raises ModelNotServable for one that transformers can't build."""
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False
            )
    except (KeyError, ValueError) as error:
        raise ModelNotServable(f"{directory.name}: transformers can't build this model with paged attention: {error!r}") from error
    return model.eval()  # type: ignore[no-any-return]


def ties(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one, by name."""
    return dict(model.all_tied_weights_keys)  # type: ignore[arg-type]


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """From now on these have a tensor of their own."""
    for name in names:
        del model.all_tied_weights_keys[name]  # type: ignore[operator, union-attr]


def types_apart(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Patterns of parameters that transformers keeps in a wider type than `dtype`."""
    return dict(model._get_dtype_plan(dtype))  # type: ignore[operator]


def destinations(model: nn.Module, stored: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """For each stored tensor: the parameter it goes to (perhaps one that the model lacks), and whether transformers computes that
    parameter from it (and perhaps from others) instead of taking it as it is."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping, state = _mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for name in stored:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        found[name] = (target, pattern is not None)
    return found


def fill(
    model: nn.Module,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    apart: Mapping[str, torch.dtype],
    device: torch.device = attention.CPU,
    *,
    renamed: bool = False,
) -> None:
    """Put tensors into the model; each is taken with `[...]` when its turn comes. Afterwards all is on `device`, nothing on meta.
    `renamed`: they have the names of the model's own parameters, not those of its files.

    Raises ModelNotServable when tensors are missing or have other shapes.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    mapping = [] if renamed else _mapping(model)
    config = LoadStateDictConfig(dtype=dtype, dtype_plan=dict(apart), weight_mapping=mapping, device_map={"": device})
    found, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    name = type(model).__name__
    if found.mismatched_keys:
        parameter, stored, wanted = min(found.mismatched_keys)
        raise ModelNotServable(f"{name}: {parameter} has the shape {tuple(stored)} in the weights, not {tuple(wanted)}")
    if found.conversion_errors:
        raise ModelNotServable(f"{name}: transformers can't read the weights: {next(iter(found.conversion_errors.values()))}")
    found = model._finalize_model_loading(model, config, found)  # type: ignore[operator]
    if missing := sorted(found.missing_keys):
        raise ModelNotServable(f"{name}: the weights lack {', '.join(missing[:5])} ({len(missing)} tensors in all)")


def _mapping(model: nn.Module) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))
