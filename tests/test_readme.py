"""The README's ten lines of code, run as they stand there but for their sizes."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from agd_lib.project import ROOT


def test_the_readmes_code_runs(dit_folder: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for given, small in (
        ("path/to/my-pipeline", str(dit_folder)),
        ("runs/mine", str(tmp_path)),
        ("num_trajectories=2000", "num_trajectories=6"),
        ("num_steps=2000", "num_steps=2"),
        ("num_inference_steps=20", "num_inference_steps=2"),
        ("hidden_size=32", "hidden_size=4"),
    ):
        assert given in code
        code = code.replace(given, small)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["images"].shape == (3, 3, 32, 32)
    assert names["images"].min() >= 0 and names["images"].max() <= 1
