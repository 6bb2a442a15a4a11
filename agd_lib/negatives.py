"""Beyond the paper: negative prompts in one forward pass, by adapters that are told them.

    python -m agd_lib.negatives tiny-sd21 --run runs/negatives/tiny-sd21

Classifier-free guidance leads away from a negative prompt by giving it to the second pass. Adapters have no second pass;
these see the negative prompt's tokens instead, and are trained on trajectories with random negative prompts.

Whether it works can be counted. For every prompt CFG draws an image without a negative prompt. What that image shows and
the prompt leaves open (a colour, say) becomes the negative prompt, and from the same noise it is drawn again: is it gone,
and is everything still there that was asked for? Results go to ``data/results/<base>-negatives.json``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .attach import AdapterSet, default_card
from .attributes import AttributeFeatures, Reading, fulfils, readings
from .base_models import count_forwards, load_base
from .errors import AGDError
from .evaluation import default_extractor, endpoint_mse_ratio
from .guidance import AGD, CFG, Guidance, Unguided
from .influence import influence_of
from .project import DATA, display_path
from .recipes import SETTINGS, STEPS, largest_size
from .results import cell
from .sampling import endpoint, sample, sample_seed
from .scenes import Asked, AskedObject, asked, caption, draw_scene, in_words, read_caption, shown
from .storage import key_of, lock_folder, write_json
from .study import MEASURING_PROMPTS, PLANS, SEEDS, TRAINING_PROMPTS, in_parallel, provenance, rows_of, train_compiled
from .trajectories import CollectionPlan, TrajectoryStore, collect

BASES = ("tiny-sd21", "tiny-sdxl")
SHARE = 0.05
OTHERS_PROMPTS = 40
"""Seed of the scenes whose captions are negative prompts that have nothing to do with the prompt."""


# Negative prompts ------------------------------------------------------------------------------------------------------


def left_open(wanted: Asked, seen: Asked | Reading, rng: np.random.Generator) -> str | None:
    """One thing that is seen and that the prompt leaves open, as a prompt of its own; None if there is none.

    Such as ``"a red ring"`` for a prompt that asks for a ring of no colour. Objects are found by their shape.
    """
    found = []
    for item in wanted.objects:
        same = [other for other in seen.objects if other.shape == item.shape]
        if len(same) == 1 and item.colour is None:
            found.append(Asked((AskedObject(item.shape, same[0].colour, None),), None, None))
        if len(same) == 1 and item.size is None:
            found.append(Asked((AskedObject(item.shape, None, same[0].size),), None, None))
        if len(same) == 1 and wanted.background is None:
            found.append(Asked((AskedObject(item.shape, None, None),), None, seen.background))
    return in_words(found[int(rng.integers(len(found)))]) if found else None


def shows(reading: Reading, negative: Asked) -> bool:
    """Whether an image shows what a negative prompt of :func:`left_open` says."""
    (thing,) = negative.objects
    return negative.background in (None, reading.background) and any(
        thing.shape == item.shape and thing.colour in (None, item.colour) and thing.size in (None, item.size)
        for item in reading.objects
    )


def training_pairs(count: int, seed: int = TRAINING_PROMPTS) -> tuple[tuple[str, str], ...]:
    """Prompts with random negative prompts: by turns none, the caption of another scene, and what the prompt leaves open.

    Where the prompt leaves nothing open, the negative prompt is the caption of another scene again.
    """
    rng, pairs = np.random.default_rng(seed), []
    for index in range(count):
        scene, other = draw_scene(seed, index), caption(draw_scene(OTHERS_PROMPTS, index))
        negative = ("", other, left_open(asked(scene), shown(scene), rng) or other)[index % 3]
        pairs.append((caption(scene), negative))
    return tuple(pairs)


# Measuring -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NegativeRow:
    """One measurement.

    Attributes:
        guidance: ``"cfg"`` or ``"agd"``. adapter: kind of the adapters. told: whether the negative prompts were given.
        nfe: forward passes of the denoiser an image. n: images. seed: of prompts, noises and training.
        fulfilled, avoided, both: shares of the images that show all that was asked for, that do not show what the negative
            prompt says, and of which both is true.
        endpoint_error: MSE(this, CFG told the negative prompt) / MSE(unguided, the same) over final latents.
        adapter_parameters: count; None for CFG.
    """

    base: str
    guidance: str
    adapter: str | None
    told: bool
    scale: float
    steps: int
    nfe: float
    n: int
    seed: int
    fulfilled: float
    avoided: float
    both: float
    endpoint_error: float
    base_parameters: int
    adapter_parameters: int | None


def train_adapters(base_name: str, run: Path, kind: str, seed: int, num_steps: int) -> Path:
    """Train adapters that see negative prompts from one seed, unless that is done; returns their folder."""
    torch.set_num_threads(1)
    base, store = load_base(base_name), TrajectoryStore(run / "trajectories", check=False)
    adapters = largest_size(base, kind, SHARE, PLANS[base_name].guidance_range, seed, use_negative=True)
    settings = replace(SETTINGS, num_steps=num_steps, seed=seed)
    inputs = [asdict(adapters.config), asdict(settings), store.manifest["shards"], influence_of(base, store).tolist()]
    key = key_of(inputs)
    folder = run / "adapters" / key
    if not folder.exists():
        checkpoints = run / "checkpoints" / key
        train_compiled(base, adapters, store, settings, checkpoints, f"{kind} {seed}")
        adapters.save_pretrained(folder)
    return folder


def measure_negatives(
    base_name: str, run: Path, kinds: Sequence[str], scale: float, seed: int, n: int, num_steps: int
) -> list[NegativeRow]:
    """Draw with CFG, find negative prompts in what it drew, and draw again: by CFG and by every kind of adapters."""
    torch.set_num_threads(1)
    base = load_base(base_name)
    reader, _ = default_extractor(base, DATA)
    assert isinstance(reader, AttributeFeatures)

    def drawn(guidance: Guidance, conditions: Sequence[object], numbers: Sequence[int]) -> tuple[Tensor, float]:
        """Final latents from the noises with these numbers, and the forward passes for each."""
        latents = []
        with count_forwards(base) as meter:
            for start in range(0, len(numbers), 250):
                part = slice(start, start + 250)
                seeds = [sample_seed(seed, number) for number in numbers[part]]
                latents.append(endpoint(sample(base, base.encode(conditions[part]), guidance, STEPS, seeds=seeds)))
        return torch.cat(latents), meter.nfe(len(numbers))

    def read(latents: Tensor) -> list[Reading]:
        parts = latents.split(250)
        return [found for part in parts for found in readings(reader.model(base.decode(part) * 2 - 1).logits)]

    prompts = [caption(draw_scene(MEASURING_PROMPTS + seed, index)) for index in range(n)]
    first, first_nfe = drawn(CFG(scale), prompts, range(n))
    rng, wanted = np.random.default_rng(seed), [read_caption(prompt) for prompt in prompts]
    negatives = [left_open(*pair, rng) for pair in zip(wanted, read(first))]
    chosen = [index for index, negative in enumerate(negatives) if negative is not None]
    if not chosen:
        raise AGDError(f"got {n} prompts, none of which leaves anything open: take more")
    asked_for = [prompts[index] for index in chosen]
    pairs = [(prompts[index], negatives[index] or "") for index in chosen]
    unwanted = [read_caption(negative) for _, negative in pairs]
    plain, _ = drawn(Unguided(), asked_for, chosen)
    cfg, cfg_nfe = drawn(CFG(scale), pairs, chosen)

    def row(kind: str | None, told: bool, latents: Tensor, nfe: float, parameters: int | None) -> NegativeRow:
        seen = read(latents)
        there = [fulfils(reading, wanted[index]) for reading, index in zip(seen, chosen)]
        gone = [not shows(reading, negative) for reading, negative in zip(seen, unwanted)]
        fulfilled, avoided, both = (sum(found) / len(chosen) for found in (there, gone, map(all, zip(there, gone))))
        return NegativeRow(
            base=base_name,
            guidance="cfg" if kind is None else "agd",
            adapter=kind,
            told=told,
            scale=scale,
            steps=STEPS,
            nfe=nfe,
            n=len(chosen),
            seed=seed,
            fulfilled=fulfilled,
            avoided=avoided,
            both=both,
            endpoint_error=endpoint_mse_ratio(latents, plain, cfg),
            base_parameters=base.num_parameters(),
            adapter_parameters=parameters,
        )

    rows = [row(None, False, first[chosen], first_nfe, None), row(None, True, cfg, cfg_nfe, None)]
    for kind in kinds:
        adapters = AdapterSet.from_pretrained(train_adapters(base_name, run, kind, seed, num_steps)).attach(base)
        guidance = AGD(adapters, scale)
        for told, conditions in ((False, asked_for), (True, pairs)):
            rows.append(row(kind, told, *drawn(guidance, conditions, chosen), adapters.num_parameters()))
        adapters.remove()
    return rows


# Results ---------------------------------------------------------------------------------------------------------------


def read_negatives(path: Path) -> list[NegativeRow]:
    """The rows of a file that this module wrote.

    Raises:
        AGDError: if it is missing or malformed.
    """
    names, found = {field.name for field in fields(NegativeRow)}, []
    for number, value in enumerate(rows_of(path)):
        numbers = [value.get(name) for name in ("scale", "nfe", "fulfilled", "avoided", "both", "endpoint_error")]
        if value.keys() != names or not all(isinstance(each, int | float) for each in numbers):
            raise AGDError(f"{path}, row {number} is not a measurement of negative prompts: measure it again")
        found.append(NegativeRow(**value))
    return found


TABLE_NOTE = (
    "Mean ± standard deviation over seeds of training and noise. The negative prompt says what CFG's image without one shows and "
    "the prompt leaves open, so CFG avoids nothing as long as it is not told, by construction; adapters draw another image, which "
    "may avoid it by chance. Endpoint error is MSE(this, CFG told) / MSE(unguided, CFG told) over final latents."
)


def negatives_table(rows: Sequence[NegativeRow]) -> str:
    """The rows as a Markdown table, mean ± standard deviation over seeds."""
    lines = [
        "| method | negative prompt | w | NFE | fulfilled | avoided | both | endpoint error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, bool, float], list[NegativeRow]] = {}
    for row in rows:
        method = "CFG" if row.adapter is None else f"AGD {row.adapter}"
        groups.setdefault((method, row.told, row.scale), []).append(row)
    for (method, told, scale), group in groups.items():
        values = [[getattr(row, name) for row in group] for name in ("fulfilled", "avoided", "both", "endpoint_error")]
        means = [sum(column) / len(column) for column in values]
        spreads = [
            math.sqrt(sum((value - mean) ** 2 for value in column) / (len(column) - 1)) if len(column) > 1 else None
            for column, mean in zip(values, means)
        ]
        cells = [cell(mean, spread, 3) for mean, spread in zip(means, spreads)]
        lines.append(
            f"| {method} | {'told' if told else 'not told'} | {scale:g} | {group[0].nfe:g} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=None, help="by default data/results/<base>-negatives.json")
    parser.add_argument(
        "--ship", type=Path, default=None, help="folder for the first kind's adapters of the first seed"
    )
    parser.add_argument("--kinds", nargs="+", default=["modulated", "cross-attention"])
    parser.add_argument("--scales", nargs="+", type=float, default=[3.0, 5.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument(
        "--n", type=int, default=1_000, help="prompts for each seed; about a third leave something open that CFG draws"
    )
    parser.add_argument("--trajectories", type=int, default=8_000)
    parser.add_argument("--steps", type=int, default=2_000, help="gradient steps")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    start, run, name = time.perf_counter(), arguments.run, arguments.base
    path = arguments.results or DATA / "results" / f"{name}-negatives.json"
    base, parallel = load_base(name), functools.partial(in_parallel, arguments.workers)
    plan = CollectionPlan(
        training_pairs(arguments.trajectories),
        arguments.trajectories,
        PLANS[name].guidance_range,
        STEPS,
        trajectories_per_shard=1_000,
    )
    with lock_folder(run):
        influence_of(base, collect(base, plan, run / "trajectories"))  # once, before two workers want it
        trainings = itertools.product(arguments.kinds, arguments.seeds)
        folders = parallel("train", train_adapters, [(name, run, *which, arguments.steps) for which in trainings])
        at = itertools.product(arguments.scales, arguments.seeds)
        calls = [(name, run, arguments.kinds, *each, arguments.n, arguments.steps) for each in at]
        rows = list(itertools.chain(*parallel("measure", measure_negatives, calls)))
    command = "python -m agd_lib.negatives " + shlex.join(sys.argv[1:])
    write_json(path, provenance(command, time.perf_counter() - start) | {"rows": [asdict(row) for row in rows]})
    if arguments.ship:
        _ship(folders[0], rows, arguments.kinds[0], arguments.ship, path)
    print(negatives_table(rows))


def _ship(trained: Path, rows: Sequence[NegativeRow], kind: str, folder: Path, results: Path) -> None:
    """Copy the adapters with a model card that shows their results."""
    adapters = AdapterSet.from_pretrained(trained)
    mine = [row for row in rows if row.adapter in (None, kind)]
    seeds, counts = sorted({row.seed for row in mine}), sorted(row.n for row in mine)
    card = (
        default_card(adapters.config)
        + "\nThey also see negative prompts: `base.encode([(prompt, negative_prompt)])`, or `negative_prompt` in a pipeline.\n"
        f"\n## Results\n\n{TABLE_NOTE} {len(seeds)} seeds of {counts[0]} to {counts[-1]} prompts; the shipped adapters are those "
        f"of seed {seeds[0]}. Source: `{display_path(results.resolve())}`.\n\n{negatives_table(mine)}\n"
    )
    adapters.save_pretrained(folder, card)


if __name__ == "__main__":
    main()
