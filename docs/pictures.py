"""The README's pictures: unguided sampling, CFG and AGD from the same noises, not chosen.

python docs/pictures.py          # two minutes on one core; writes docs/tiny-dit.png and docs/tiny-sd21.png
"""

from __future__ import annotations

import torch

from agd_lib import AGD, CFG, AdapterSet, Unguided, generate, load_base
from agd_lib.figures import image_grid
from agd_lib.guidance import Guidance
from agd_lib.project import DATA, ROOT
from agd_lib.prompts import scene_prompts
from agd_lib.shapes import SHAPES

COLUMNS, STEPS = 12, 20


def draw(name: str, scale: float) -> None:
    """One figure: three rows, one for each way to sample; a column is one noise and one class or prompt."""
    base = load_base(name)
    conditions = list(base.all_conditions())[:COLUMNS] if name == "tiny-dit" else scene_prompts(COLUMNS, seed=0)
    adapters = AdapterSet.from_pretrained(DATA / name / "adapters" / "modulated").attach(base)
    rows: dict[str, Guidance] = {
        "unguided, 20 passes": Unguided(),
        f"CFG, w = {scale:g}, 40 passes": CFG(scale),
        f"AGD, w = {scale:g}, 20 passes": AGD(adapters, scale),
    }
    latents = [torch.cat(list(generate(base, conditions, guidance, STEPS, seed=0))) for guidance in rows.values()]
    names = SHAPES[:COLUMNS] if name == "tiny-dit" else ()
    figure = image_grid(base.decode(torch.cat(latents)), COLUMNS, row_titles=list(rows), column_titles=names)
    figure.savefig(ROOT / "docs" / f"{name}.png", dpi=100, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    draw("tiny-dit", 3.0)
    draw("tiny-sd21", 5.0)
