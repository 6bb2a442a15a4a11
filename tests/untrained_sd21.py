"""The small Stable Diffusion 2.1 that the repository ships, before any training: for what is trained on top of it."""

from __future__ import annotations

from pathlib import Path

import torch

from agd_lib.tiny import new_vae
from agd_lib.tiny_text import SD21Denoiser, new_tokenizer


def write_untrained_sd21(folder: Path) -> Path:
    """Save it as a pipeline folder; returns the folder."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    SD21Denoiser(tokenizer).pipeline(new_vae(), tokenizer).save_pretrained(folder)
    return folder
