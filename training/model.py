"""The model: a plain Llama of transformers with random weights, and the loss that it learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from training.config import ModelConfig
from training.data import IGNORED

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def build(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int, attention: str) -> LlamaForCausalLM:
    """Random weights that follow from the seed alone. `attention`: transformers' name of an attention function."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation=attention,
        )
    )
    _initialise(model)
    return model


def _initialise(model: LlamaForCausalLM) -> None:
    """Start so that a token is told apart from its neighbours at once, for the run is only some hundred steps long.

    With transformers' 0.02 everywhere the average over the context drowns the token's own embedding. Here embeddings are wide,
    matrices keep the size of what passes through them, and each layer adds nothing at first, which it then learns to.
    """
    width = model.config.hidden_size
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2 and "lm_head" not in name:
            nn.init.normal_(parameter, std=width**-0.5)


class Learner(nn.Module):
    """A causal language model with its loss. Logits are made only where something is learnt: the vocabulary is the widest layer.

    Weights stay float32; with bfloat16 only the matrix products are rounded, so nothing small is lost in an update.
    """

    def __init__(self, model: LlamaForCausalLM, product_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.product_dtype = product_dtype

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats of the next token over all learnt tokens of [N, T] rows."""
        with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=self.product_dtype == torch.bfloat16):
            hidden = self.model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
            targets = labels[:, 1:]
            learnt = targets != IGNORED
            logits = self.model.lm_head(hidden[:, :-1][learnt])
        return functional.cross_entropy(logits.float(), targets[learnt])


def product_dtype(asked: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it, else float32, for emulation would be slower than either."""
    if asked != "auto":
        chosen: Any = getattr(torch, asked)
        assert isinstance(chosen, torch.dtype)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_units else torch.float32
