"""Adapters on weights that they were not trained on: under a LoRA, and on a fine-tuned descendant of their base model.

    python -m agd_lib.transfer --run runs/transfer

The paper says that adapters carry over to other checkpoints of the same base. Here the small Stable Diffusion 2.1 is taught the
style of faded photographs (:mod:`agd_lib.tiny_style`), by the LoRA that is shipped and by training all weights of its UNet,
and the shipped adapters are put on either. How many prompts are fulfilled (read after the fading is undone) without guidance,
by CFG and by AGD, and how far are the images from the style's own data? Results go to ``data/results/tiny-sd21-transfer.json``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attach import AdapterSet
from .attributes import AttributeFeatures
from .base_models import BaseModel, base_from_pipeline, load_base
from .evaluation import evaluate, reference_from_features
from .guidance import AGD, CFG, Unguided
from .project import DATA
from .results import Row, markdown_table
from .scenes import caption, make_scenes
from .storage import lock_folder, write_json, writing
from .study import SEEDS, Unit, in_parallel, measuring_conditions, provenance
from .tiny import REFERENCE_SEED, TRAIN_SEED, to_unit
from .tiny_style import faded, train_in_style, unfaded

BASE = "tiny-sd21"
ORIGINAL, WITH_LORA, FINE_TUNED = MODELS = (BASE, f"{BASE}-lora", f"{BASE}-fine-tuned")
"""The models as results name them."""
KIND = "modulated"


class StyleFeatures:
    """The reader of scenes for faded pictures: features of them as they are, prompts read after the fading is undone."""

    def __init__(self, reader: AttributeFeatures) -> None:
        self.reader = reader
        self.name = f"{reader.name}-faded"
        self.feature_dim = reader.feature_dim

    def __call__(self, images: Tensor, conditions: Sequence[str] | None = None) -> tuple[Tensor, Tensor | None]:
        """See :class:`~agd_lib.evaluation.FeatureExtractor`."""
        return self.reader(images)[0], self.reader(unfaded(images), conditions)[1]


def fine_tune(run: Path, steps: int) -> None:
    """Train all weights of the UNet on the style into ``run / "fine-tuned-<steps>"``, unless that is done."""
    folder = run / f"fine-tuned-{steps}"
    if folder.exists():
        return
    base = load_base(BASE)
    images, scenes = make_scenes(TRAIN_SEED, 2_000)
    captions = [caption(scene) for scene in scenes]
    torch.manual_seed(0)
    base.denoiser.requires_grad_(True)
    unet: Any = train_in_style(base, base.denoiser, images, captions, steps, learning_rate=5e-4)
    with writing(folder) as temporary:
        unet.save_pretrained(temporary)


def load_model(name: str, run: Path, steps: int) -> BaseModel:
    """One of :data:`MODELS`."""
    base = load_base(BASE)
    if name == ORIGINAL:
        return base
    if name == WITH_LORA:
        base.pipeline.load_lora_weights(DATA / "tiny-sd21-faded", use_safetensors=True)
        base.pipeline.fuse_lora()
        base.pipeline.unload_lora_weights()
    else:
        folder = run / f"fine-tuned-{steps}"
        base.pipeline.register_modules(
            unet=type(base.denoiser).from_pretrained(folder, use_safetensors=True, local_files_only=True)
        )
    return base_from_pipeline(base.pipeline, name)


def weights_moved(run: Path, name: str, steps: int) -> float:
    """How far a model's denoiser is from the original's, as a share of the norm of the latter's weights."""
    original, other = (load_model(which, run, steps).denoiser.state_dict() for which in (ORIGINAL, name))
    moved = sum((other[key] - value).square().sum().item() for key, value in original.items())
    return float((moved / sum(value.square().sum().item() for value in original.values())) ** 0.5)


def measure_model(name: str, run: Path, steps: int, unit: Unit, n: int) -> Row:
    """Sample and measure a model with one kind of guidance; what was measured before is read."""
    torch.set_num_threads(1)
    base, reader = load_model(name, run, steps), AttributeFeatures(DATA / "scenes" / "extractor")
    extractor: Any = reader if name == ORIGINAL else StyleFeatures(reader)
    pictures = to_unit(make_scenes(REFERENCE_SEED, 5_000)[0])
    if name != ORIGINAL:
        pictures = faded(pictures)
    features = torch.cat([extractor(part)[0] for part in pictures.split(500)])
    measured = functools.partial(
        evaluate,
        base,
        reference=reference_from_features(extractor.name, features),
        extractor=extractor,
        n=n,
        seed=unit.seed,
        progress=False,
        keep=run / "rows" / f"{name}-{steps}",
        conditions=measuring_conditions(base, n, unit.seed),
    )
    unguided = measured(Unguided())
    if unit.kind == "unguided":
        return unguided.row
    cfg = measured(CFG(unit.scale))
    if unit.kind == "cfg":
        return cfg.row
    adapters = AdapterSet.from_pretrained(DATA / BASE / "adapters" / unit.kind).attach(base)
    guidance = AGD(adapters, unit.scale)
    return measured(guidance, unguided_latents=unguided.latents, cfg_latents=cfg.latents).row


def gain_kept(rows: Sequence[Row]) -> dict[str, dict[float, tuple[float, ...]]]:
    """What AGD keeps of CFG's gain in fulfilled prompts: model -> scale -> (AGD - unguided) / (CFG - unguided) of each seed."""
    share = {(row.base, row.guidance, row.scale, row.seed): row.condition_accuracy or 0.0 for row in rows}
    kept: dict[str, dict[float, tuple[float, ...]]] = {}
    for model, scale in dict.fromkeys((row.base, row.scale) for row in rows if row.guidance == "agd"):
        values = []
        for seed in sorted({row.seed for row in rows}):
            unguided, cfg = share[model, "unguided", 1.0, seed], share[model, "cfg", scale, seed]
            values.append((share[model, "agd", scale, seed] - unguided) / (cfg - unguided))
        kept.setdefault(model, {})[scale] = tuple(values)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=DATA / "results" / f"{BASE}-transfer.json")
    parser.add_argument("--scales", nargs="+", type=float, default=[2.0, 5.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of noises and prompts")
    parser.add_argument("--n", type=int, default=1_000, help="images for each measurement")
    parser.add_argument("--steps", type=int, default=400, help="gradient steps of the fine-tuned model")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    start, run, steps = time.perf_counter(), arguments.run, arguments.steps
    at = list(itertools.product(arguments.scales, arguments.seeds))
    kinds = {"unguided": [(1.0, seed) for seed in arguments.seeds], "cfg": at, KIND: at}
    rows: list[Row] = []
    with lock_folder(run):
        fine_tune(run, steps)
        for kind, units in kinds.items():  # AGD's endpoint errors need those before
            calls = [(name, run, steps, Unit(kind, *unit), arguments.n) for name in MODELS for unit in units]
            rows += in_parallel(arguments.workers, kind, measure_model, calls)
        moved = {name: weights_moved(run, name, steps) for name in MODELS[1:]}
    command = "python -m agd_lib.transfer " + shlex.join(sys.argv[1:])
    about = provenance(command, time.perf_counter() - start)
    write_json(arguments.results, about | {"weights_moved": moved, "rows": [asdict(row) for row in rows]})
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
