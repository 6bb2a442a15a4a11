"""The README's code, run as it stands there but for its sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from small_text_models import build_sdxl_pipeline

from agd_lib import AdapterSet, base_from_pipeline
from agd_lib.project import ROOT


def run_with(number: int, replaced: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The names that a piece of the README's code leaves behind."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[number]
    for given, small in replaced:
        assert given in code
        code = code.replace(given, small)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_code_for_a_model_of_ones_own(dit_folder: Path, tmp_path: Path) -> None:
    sizes = (
        ("path/to/my-pipeline", str(dit_folder)),
        ("runs/mine", str(tmp_path)),
        ("num_trajectories=2000", "num_trajectories=6"),
        ("num_steps=2000", "num_steps=2"),
        ("num_inference_steps=20", "num_inference_steps=2"),
        ("hidden_size=32", "hidden_size=4"),
    )
    images = run_with(0, sizes)["images"]
    assert images.shape == (3, 3, 32, 32)
    assert images.min() >= 0 and images.max() <= 1


def test_the_code_for_a_pipeline_of_ones_own(tmp_path: Path) -> None:
    pipeline = build_sdxl_pipeline(tmp_path)
    pipeline.save_pretrained(tmp_path / "pipeline")
    adapters = AdapterSet.create(base_from_pipeline(pipeline), "cross-attention", 8, guidance_range=(1, 12))
    adapters.save_pretrained(tmp_path / "adapters")
    names = run_with(
        1,
        (
            ("path/to/sdxl", str(tmp_path / "pipeline")),
            ("path/to/adapters", str(tmp_path / "adapters")),
            ("guidance_scale=7.5", "guidance_scale=7.5, num_inference_steps=2"),
        ),
    )
    plain = pipeline("a red star", guidance_scale=1.0, num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
    guided = names["pipe"]("a red star", num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
    assert names["image"].size == plain.size
    assert guided.tobytes() == plain.tobytes()  # untrained adapters change nothing: one pass, the conditional one
