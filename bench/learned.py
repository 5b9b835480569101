"""A small model that has learned something, for what random weights can't tell: trained on the source text of Python's own library.

A few minutes on two cores, once: the directory is kept beside the other models of the benchmarks. The text is read from the Python
that runs; every twelfth file is held out.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import ModelConfig, OptimisationConfig

if TYPE_CHECKING:
    from torch import Tensor

MODEL = ModelConfig(hidden_size=256, intermediate_size=768, num_layers=4, vocab_size=2048)
OPTIMISATION = OptimisationConfig(global_rows=8)
STEPS = 300
WINDOW = 256
"""Tokens of a training row, and of a row whose perplexity is measured."""
HELD_OUT = 12
GLIMPSE = 2000
"""Characters of each held-out file, so that many are seen."""
LONGEST = 8000
"""Characters of each file that is learned from."""
TOKENIZER_FILES = 300
SKIPPED = {"site-packages", "test", "tests", "encodings", "pydoc_data"}


def directory() -> Path:
    """The model's Hugging Face directory, trained unless it is there from last time."""
    cache = Path(os.environ.get("MMAAS_BENCH_CACHE") or Path(tempfile.gettempdir()) / "mmaas-bench")
    key = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode()).hexdigest()[:12]
    target = cache / f"learned-{key}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        try:
            _train(unfinished)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def held_out(model: Path, rows: int) -> Tensor:
    """`rows x WINDOW` token ids that were never trained on."""
    from transformers import AutoTokenizer

    return _rows((text[:GLIMPSE] for text in _files(held_out=True)), AutoTokenizer.from_pretrained(model), rows)


def _train(target: Path) -> None:
    import torch

    from training.model import Learner, build, product_dtype
    from training.tokenizer import train_tokenizer
    from training.worker import learning_rate

    texts = [text[:LONGEST] for text in _files(held_out=False)]
    tokenizer = train_tokenizer(texts[:TOKENIZER_FILES], MODEL.vocab_size, MODEL.max_position_embeddings)
    rows = _rows(texts, tokenizer, STEPS * OPTIMISATION.global_rows)
    model = build(MODEL, tokenizer, seed=0, attention="eager")
    learner = Learner(model, product_dtype("auto", torch.device("cpu")))
    optimizer = torch.optim.AdamW(learner.parameters(), betas=OPTIMISATION.betas, weight_decay=OPTIMISATION.weight_decay)
    positions = torch.arange(WINDOW).expand(OPTIMISATION.global_rows, -1)
    for step, batch in enumerate(rows.split(OPTIMISATION.global_rows)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, OPTIMISATION)
        loss = learner(batch, batch, positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), OPTIMISATION.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"learning, step {step} of {STEPS}: loss {loss.item():.3f}", file=sys.stderr)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _rows(texts: Any, tokenizer: Any, count: int) -> Tensor:
    """The texts one behind the other, cut into rows."""
    import torch

    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        if len(ids) >= count * WINDOW:
            return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
    raise ValueError(f"the library's text has {len(ids)} tokens, not {count * WINDOW}")


def _files(*, held_out: bool) -> Iterator[str]:
    """In an order that mixes the packages, the same every time."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not SKIPPED & set(path.parts)]
    mixed = sorted(paths, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())
    for number, path in enumerate(mixed):
        if (number % HELD_OUT == 0) == held_out:
            yield path.read_text(encoding="utf-8", errors="ignore")
