"""Adapters with random numbers, made by peft for the tiny models, and what peft's merged model answers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def linears(family: str) -> list[str]:
    return FUSED if family == "phi3" else LINEARS


def build_adapter(base: Path, directory: Path, *, targets: list[str], rank: int = 8, seed: int = 1, **options: Any) -> Path:
    """Strong enough to change what a model says."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        _loaded(base), LoraConfig(r=rank, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", **options)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.15, generator=generator)
    model.save_pretrained(directory)
    return directory


def plain_adapter(base: Path, directory: Path, *, targets: list[str], rank: int = 8, seed: int = 1) -> Path:
    """The same files, made without peft, which takes seconds to import."""
    from safetensors.torch import save_file

    from deployments.engine.adapter_files import base_shapes

    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, (outputs, inputs) in base_shapes(base).items():
        if module.rpartition(".")[2] in targets:
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                name = f"base_model.model.{module}.lora_{part}.weight"
                tensors[name] = torch.empty(shape).normal_(0, 0.15, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 12, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merged_answers(base: Path, adapter: Path | None, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy, in float32, one prompt at a time, through transformers alone."""
    from peft import PeftModel

    model = _loaded(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return [_answer(model, prompt, num_tokens) for prompt in prompts]


def _answer(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def _loaded(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 288, (length,), generator=generator).tolist() for length in (3, 17, 30, 9, 40, 21)]
