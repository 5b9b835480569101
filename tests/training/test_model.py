"""The model and its loss, on one small model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from training.config import ModelConfig
from training.corpus import facts
from training.data import IGNORED, texts
from training.evaluate import Student, is_near
from training.model import Learner, build, product_dtype
from training.tokenizer import train_tokenizer

CONFIG = ModelConfig.of_depth(1)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(texts(facts()[:20]), 400, 512)


def model(seed: int = 0, attention: str = "eager") -> LlamaForCausalLM:
    return build(CONFIG, tokenizer(), seed, attention)


def batch(positions: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 300, (2, len(positions)), generator=generator)
    labels = ids.clone()
    labels[:, : len(positions) // 2] = IGNORED
    return ids, labels, torch.tensor([positions, positions])


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, same, other = (model(seed).state_dict()["model.layers.0.mlp.up_proj.weight"] for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_loss_is_the_cross_entropy_of_the_learnt_tokens() -> None:
    ids, labels, positions = batch(list(range(12)))
    net = model()
    expected = net(input_ids=ids, position_ids=positions, labels=labels).loss
    assert Learner(net, torch.float32)(ids, labels, positions).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_conversation_sees_nothing_of_the_one_before(attention: str) -> None:
    net = model(attention=attention)
    torch.nn.init.normal_(net.model.layers[0].self_attn.o_proj.weight)  # zero at first, and then nothing could be seen at all
    learner = Learner(net, torch.float32)
    ids, labels, positions = batch([*range(6), *range(6)])
    labels[:, 6] = IGNORED
    together = learner(ids, labels, positions)
    alone = learner(ids[:, 6:], labels[:, 6:], positions[:, 6:])
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    joined = learner(ids, labels, torch.arange(12).expand(2, -1))
    assert joined.item() != pytest.approx(alone.item(), rel=1e-5)


def test_bfloat16_rounds_products_and_keeps_weights() -> None:
    learner = Learner(model(), torch.bfloat16)
    loss = learner(*batch(list(range(12))))
    loss.backward()
    assert loss.dtype == torch.float32
    assert {parameter.dtype for parameter in learner.parameters()} == {torch.float32}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learner.parameters())


def test_auto_is_a_type_that_this_machine_multiplies() -> None:
    assert product_dtype("float32", torch.device("cpu")) == torch.float32
    assert product_dtype("auto", torch.device("cpu")) in {torch.float32, torch.bfloat16}


def test_a_saved_model_answers_many_as_it_answers_one(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    student = Student(tmp_path)
    questions = ["What does str.split do?", "Hi", "What is the signature of str.join?"]
    assert student.answer(questions) == [student.answer([question])[0] for question in questions]


def test_near_means_nearly_the_same_words() -> None:
    assert is_near("Return a copy of the string.", "Return a copy of the string.")
    assert is_near("Return a copy of the strings.", "Return a copy of the string.")
    assert not is_near("Return True if the string is empty.", "Return a copy of the string.")
