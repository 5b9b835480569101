"""What a training run is made of: frozen, with the demonstration as the defaults and one dial for size.

A run is described by one `Recipe`, and everything in it is a plain number, so that it can be logged to MLflow and hashed. The
machine (workers, CPUs) is no part of it: that stands in `cluster.settings.TrainingSettings`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a Llama-architecture model. Heads and key/value heads divide by four, so that up to four shards can serve it."""

    hidden_size: int = 512
    intermediate_size: int = 1536
    num_layers: int = 2
    num_heads: int = 8
    num_kv_heads: int = 4
    max_position_embeddings: int = 512
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must divide by num_heads {self.num_heads} "
                f"and that by num_kv_heads {self.num_kv_heads}"
            )

    @classmethod
    def of_depth(cls, depth: int) -> ModelConfig:
        """The dial: a model of `depth` layers with the demonstration's proportions (depth 2; parameters grow with its cube)."""
        return cls(hidden_size=256 * depth, intermediate_size=768 * depth, num_layers=depth)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """How often a fact is asked and how dialogues are packed."""

    core_repeats: int = 36
    """Dialogues about each built-in type, method and function."""
    other_repeats: int = 16
    """Dialogues about every other name."""
    max_facts: int | None = None
    """Use only the first facts; None: all of them."""
    row_tokens: int = 256
    """Length of one packed row."""


@dataclass(frozen=True, slots=True)
class OptimisationConfig:
    """AdamW under DeepSpeed ZeRO with a linear warm-up and a cosine decay to zero."""

    learning_rate: float = 2e-3
    warmup_share: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    global_rows: int = 4
    """Rows of one optimiser step over all workers; must divide by their number. Few, for what is learnt in a short run follows
    the number of steps more than that of tokens."""
    zero_stage: Literal[1, 2] = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; `auto`: bfloat16 where the processor multiplies it in hardware. Weights are always float32."""
    checkpoint_every: int = 150
    """Optimiser steps between two checkpoints."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole run. The same recipe, seed, worker count and machine give the same weights, bit for bit."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    seed: int = 0

    @classmethod
    def demonstration(cls, workers: int) -> Recipe:
        """The demonstration for a number of workers: each gets as many rows of a step, at least one."""
        return cls(optimisation=OptimisationConfig(global_rows=workers * max(1, 4 // workers)))

    def flat(self) -> dict[str, Any]:
        """`{"model.hidden_size": 384, …}`: the form that MLflow logs."""
        return {
            f"{section}.{key}" if isinstance(values, dict) else section: value
            for section, values in asdict(self).items()
            for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        }
