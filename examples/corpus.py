"""Real text that needs no download: the source of Python's own standard library, as token blocks."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor


def standard_library_files() -> list[Path]:
    """Every module of the standard library but its tests, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "idle_test", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def load_tokenizer(cache: Path, vocabulary: int) -> Tokenizer:
    """A byte-level BPE trained on the standard library; trained once per output folder."""
    path = cache / f"tokenizer-{vocabulary}.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((read(path) for path in standard_library_files()), trainer)
    cache.mkdir(parents=True, exist_ok=True)
    # Processes that start together write the same file; a rename never shows a half of it.
    partial = path.with_suffix(f".{id(tokenizer)}")
    tokenizer.save(str(partial))
    partial.replace(path)
    return tokenizer


def token_blocks(tokenizer: Tokenizer, length: int, blocks: int) -> Tensor:
    """The first blocks of a shuffled corpus, each one token longer than the sequences they train. # (B, L + 1)"""
    files = standard_library_files()
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    needed, tokens = blocks * (length + 1), []
    for index in order:
        tokens += tokenizer.encode(read(files[index])).ids
        if len(tokens) >= needed:
            return torch.tensor(tokens[:needed]).view(blocks, length + 1)
    raise ValueError(f"the corpus has {len(tokens)} tokens, fewer than the {needed} of {blocks} blocks of {length}")
