"""What the decoder must know about a model, read off the transformers module itself: shapes from its (already cut) weights,
scales and windows from the calls that its attention makes, rotary positions from its own table.

Nothing here is trusted: at load the decoder's logits are compared with the module's (`decoder.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.attention import AttentionCall
from deployments.engine.native.build import NativeUnavailable

MAX_INT8_INPUTS = 65536
"""Each adds at most 255 * 127 to a sum of 32 bits."""
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}


@dataclass(frozen=True)
class Family:
    """How a family departs from Llama."""

    norm_offset: float = 0.0  # what a norm adds to its weight
    sandwich: bool = False  # attention and MLP have a norm behind them as well
    scaled_embeddings: bool = False


FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "granite"), Family()),
    "gemma": Family(norm_offset=1.0, scaled_embeddings=True),
    "gemma2": Family(norm_offset=1.0, scaled_embeddings=True, sandwich=True),
}
"""By `model_type`. Others run through torch."""


@dataclass
class LayerDescription:
    """The weights of one layer as the module has them; `clear` gives their memory back once they are packed."""

    attention: Any
    mlp: Any
    input_norm: Tensor
    attention_norm: Tensor | None
    mlp_input_norm: Tensor
    mlp_norm: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    call: AttentionCall

    @property
    def qkv(self) -> list[Any]:
        """One fused linear, or queries, keys and values."""
        fused = getattr(self.attention, "qkv_proj", None)
        return [fused] if fused is not None else [getattr(self.attention, f"{name}_proj") for name in "qkv"]

    @property
    def gate_up(self) -> list[Tensor]:
        """Weights of the gates and of what they gate."""
        fused = getattr(self.mlp, "gate_up_proj", None)
        return list(fused.weight.chunk(2)) if fused else [self.mlp.gate_proj.weight, self.mlp.up_proj.weight]

    @property
    def gate_up_bias(self) -> list[Tensor] | None:
        fused = getattr(self.mlp, "gate_up_proj", None)
        if fused:
            return None if fused.bias is None else list(fused.bias.chunk(2))
        return None if self.mlp.gate_proj.bias is None else [self.mlp.gate_proj.bias, self.mlp.up_proj.bias]

    @property
    def gate_up_scales(self) -> list[Tensor] | None:
        """Of weights in eight bits."""
        fused = getattr(self.mlp, "gate_up_proj", None)
        if getattr(fused or self.mlp.gate_proj, "scales", None) is None:
            return None
        return list(fused.scales.chunk(2)) if fused else [self.mlp.gate_proj.scales, self.mlp.up_proj.scales]

    @property
    def outputs(self) -> tuple[Any, Any]:
        """The last linear of attention and of the MLP, whose results are summed over ranks."""
        return self.attention.o_proj, self.mlp.down_proj


@dataclass
class Description:
    """A model, or one stage of it, in the decoder's terms. Sizes are this rank's."""

    layers: list[LayerDescription]
    first_layer: int  # its number in the whole model
    dtype: torch.dtype
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    rotary_size: int
    max_positions: int
    vocabulary: int
    activation: int
    eps: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float
    embeddings: Tensor | None  # in the first stage
    cosines: Tensor
    sines: Tensor
    final_norm: Tensor | None  # in the last, as is the head
    head: Any
    head_offset: int


def recognise(config: Any) -> tuple[Family, int]:
    """Family and activation of a model. Raises NativeUnavailable for what the decoder doesn't know."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise NativeUnavailable(f"the decoder doesn't know models of type {config.model_type!r}")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise NativeUnavailable(f"the decoder has no activation {activation!r}")
    return family, ACTIVATIONS[activation]


def describe(model: nn.Module, calls: dict[int, AttentionCall], rank: int, max_positions: int) -> Description:
    """`calls` are those of every layer's attention. Raises NativeUnavailable for a model that the decoder doesn't know, with the
    reason."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    family, activation = recognise(config)
    body: Any = model.model
    layers = [_layer(body.layers[index], calls[index], family) for index in sorted(calls)]
    call = layers[0].call
    cosines, sines = _rotary(body.rotary_emb, max_positions)
    head: Any = model.lm_head if hasattr(model.lm_head, "weight") else None
    embeddings = getattr(body.embed_tokens, "weight", None)
    found = Description(
        layers=layers,
        first_layer=min(calls),
        dtype=(dtype := next(model.parameters()).dtype),
        hidden=config.hidden_size,
        heads=call.heads,
        kv_heads=call.kv_heads,
        head_size=call.head_size,
        rotary_size=2 * cosines.shape[1],
        max_positions=max_positions,
        vocabulary=config.vocab_size if head is None else head.weight.shape[0],
        activation=activation,
        eps=config.rms_norm_eps,
        embedding_scale=_embedding_scale(config, family, dtype),
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logit_scale=1.0 / getattr(config, "logits_scaling", 1.0),
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        embeddings=embeddings,
        cosines=cosines,
        sines=sines,
        final_norm=None if head is None else _norm(body.norm, family),
        head=head,
        head_offset=0 if head is None else _head_offset(head, rank, config.hidden_size),
    )
    _require_shapes(found)
    return found


def _layer(layer: Any, call: AttentionCall, family: Family) -> LayerDescription:
    attention = layer.self_attn
    after = layer.post_attention_layernorm
    return LayerDescription(
        attention=attention,
        mlp=layer.mlp,
        input_norm=_norm(layer.input_layernorm, family),
        attention_norm=_norm(after, family) if family.sandwich else None,
        mlp_input_norm=_norm(layer.pre_feedforward_layernorm if family.sandwich else after, family),
        mlp_norm=_norm(layer.post_feedforward_layernorm, family) if family.sandwich else None,
        query_norm=_norm(attention.q_norm, family) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm, family) if hasattr(attention, "k_norm") else None,
        call=call,
    )


def _norm(module: Any, family: Family) -> Tensor:
    weight: Tensor = module.weight.detach().float() + family.norm_offset
    return weight.contiguous()


def _rotary(module: Any, max_positions: int) -> tuple[Tensor, Tensor]:
    """`max_positions x rotary/2` cosines and sines. A table that changes with the length of the text can't be one."""
    if module.rope_type not in {"default", "linear", "llama3", "yarn"}:
        raise NativeUnavailable(f"the decoder has no rotary positions of type {module.rope_type!r}")
    cosines, sines = module(torch.zeros(1, dtype=torch.float32), torch.arange(max_positions)[None])
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()


def _embedding_scale(config: Any, family: Family, dtype: torch.dtype) -> float:
    """As the models were trained: Gemma's scale is rounded to the weights' type."""
    scale = config.hidden_size**0.5 if family.scaled_embeddings else getattr(config, "embedding_multiplier", 1.0)
    return float(torch.tensor(scale, dtype=dtype))


def _head_offset(head: Any, rank: int, hidden: int) -> int:
    """Where this rank's inputs of the head begin: DeepSpeed gives each rank a part of them, not all parts of one size."""
    return 0 if head.weight.shape[1] == hidden else sum(head._partition_sizes[:rank])


def _require_shapes(found: Description) -> None:
    """The decoder works on whole vectors."""
    shapes = {(layer.call.heads, layer.call.kv_heads, layer.call.head_size) for layer in found.layers}
    if len(shapes) > 1:
        raise NativeUnavailable("the decoder needs the same heads in every layer")
    odd = {
        "head size": found.head_size % 32,
        "rotary size": found.rotary_size % 32,
        "hidden size": found.hidden % 16,
        "part of the head": 0 if found.head is None else found.head.weight.shape[1] % 16 + found.head_offset % 2,
        "heads over key/value heads": found.heads % found.kv_heads,
    }
    if wrong := [name for name, rest in odd.items() if rest]:
        raise NativeUnavailable(f"the decoder can't cut this {' or '.join(wrong)} into vectors")
    weights = [module.weight for layer in found.layers for module in layer.outputs]
    if any(weight.dtype is torch.float8_e4m3fn for weight in weights):
        raise NativeUnavailable("the decoder has no fp8")
    if any(weight.dtype is torch.int8 and weight.shape[1] > MAX_INT8_INPUTS for weight in weights):
        raise NativeUnavailable(f"the decoder's int8 sums hold no more than {MAX_INT8_INPUTS} inputs")
    if found.dtype not in (torch.float32, torch.bfloat16):
        raise NativeUnavailable(f"the decoder has no {found.dtype}")
