"""The tables of the README and of ``docs/results.md``, made from the files in ``data/results``: ``python -m agd_lib.pages``
renews them.

A table stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``; its file is ``data/results/NAME.json``, but for the
headline, which is made from the studies' files.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .ablations import interval_table, read_ablation, sampler_table, strength_table
from .errors import AGDError
from .negatives import TABLE_NOTE, negatives_table, read_negatives
from .project import DATA, ROOT, display_path
from .recipes import read_variants, variant_table
from .results import Row, at_best_scales, cell, markdown_table
from .rivals import comparison_table, read_comparison
from .storage import read_json, writing
from .strength import DEFAULT_BELOW
from .study import PLANS, read_study
from .transfer import gain_kept

RESULTS = DATA / "results"


class PageError(AGDError):
    """A page has no place for a table, or a file of results is damaged."""


def spent(rows: Iterable[Row], trainings: Iterable[float] = ()) -> str:
    """What a study's images took, and its trainings (seconds), where those are known: processes of a study have a thread each."""
    minutes = [sum(row.n * row.seconds_per_image for row in rows) / 60, sum(trainings) / 60]
    what = f"Its images took {minutes[0]:.0f} minutes of one core"
    return what + (f", its trainings {minutes[1]:.0f}." if minutes[1] else ".")


def source(path: Path, rows: Iterable[Row], trainings: Iterable[float] = ()) -> str:
    """The command that a file of results came from, where it is kept, and what it took."""
    command, place = read_json(path, PageError, "study")["command"], display_path(path)
    return f"`{command}`, kept in [`{place}`]({place}). {spent(rows, trainings)}"


def results_table(path: Path) -> str:
    """What a study measured (:mod:`agd_lib.study`)."""
    about, rows = read_json(path, PageError, "study"), read_study(path)
    row = rows[0]
    endpoint = (
        "Endpoint error is MSE(this, CFG) / MSE(unguided, CFG) over final latents from the same noise: 0 is CFG itself, 1 is "
        "no better than no guidance. "
        if any(row.endpoint_mse_ratio is not None for row in rows)
        else ""
    )
    return (
        f"{Path(row.base).name}, {row.steps} sampler steps, mean ± standard deviation over seeds. FD is a Frechet distance in "
        f"the features of {row.extractor}, not an FID. {endpoint}Every row comes from "
        f"`{about['command']}` and is kept in [`{display_path(path)}`]({display_path(path)}). {spent(rows)}\n\n"
        f"{markdown_table(rows)}"
    )


def headline_table(path: Path) -> str:
    """Every method of every study at its own best scale, and the adapters with their strength restored, where that was
    measured; the files lie beside ``path``."""
    rows: list[Row] = []
    for name in PLANS:
        rows += read_study(path.with_name(f"{name}.json")) + restored_rows(path.with_name(f"{name}-strength.json"))
    return (
        "Each method at the measured scale where its own FD is lowest, mean ± standard deviation over three seeds of training and noise (*: the "
        "shipped adapters, of one training, with three seeds of noise). All scales: [docs/results.md](docs/results.md).\n\n"
        f"{markdown_table(at_best_scales(rows))}"
    )


def restored_rows(path: Path) -> list[Row]:
    """The rows of adapters with their strength restored at low noise, everywhere and in an interval; none without a file."""
    if not path.is_file():
        return []
    found = []
    for each in read_ablation(path):
        if each.row.guidance == "agd" and each.variant.strengthened == DEFAULT_BELOW:
            interval = each.variant.interval
            where = "" if interval is None else f", guided at t from {interval[0]} to {interval[1]}"
            found.append(replace(each.row, adapter=f"{each.row.adapter}, strength restored{where} *"))
    return found


def speed_table(path: Path) -> str:
    """What ``make bench`` measured (``tests/benchmarks``): AGD beside CFG, and the store beside the plain way."""
    about = read_json(path, PageError, "record of benchmarks")
    cpu, found = about["machine_info"]["cpu"], [benchmark["extra_info"] for benchmark in about["benchmarks"]]
    lines = [
        f"Medians over rounds, timed in turn in one run of `make bench`, on {cpu['count']} cores of {cpu['brand_raw']} with torch "
        f"{about['machine_info']['torch']}; kept in [`{display_path(path)}`]({display_path(path)}). The limit is 2 / (1 + the "
        "adapters' share of the counted operations); CFG / unguided is what one pass of the model without any adapters reaches.",
        "",
        "| model | adapters | share of parameters | batch | CFG, ms a step and image | AGD | CFG / AGD | CFG / unguided | limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['base']} | {row['adapter']} | {row['adapter_share']:.1%} | {row['batch_size']} "
        f"| {1000 * row['cfg_seconds_per_image']:,.1f} | {1000 * row['agd_seconds_per_image']:,.1f} | {row['ratio']:.2f} "
        f"| {row['unguided_ratio']:.2f} | {row['ratio_limit']:.2f} |"
        for row in found
        if "adapter" in row
    ]
    lines += ["", "| | unit | the plain way | this library | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['what']} | {row['unit']} | {row['other_per_second']:,.0f} | {row['per_second']:,.0f} | {row['ratio']:.1f} |"
        for row in found
        if "what" in row
    ]
    return "\n".join(lines)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The power with which costs grow over sizes: the slope of the straight line through both logarithms."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    return statistics.linear_regression(x, y).slope


def growth_table(path: Path) -> str:
    """How costs grow with the work, as ``tests/growth.py`` measured it."""
    about = read_json(path, PageError, "record of growth")
    lines = [
        f"`{about['command']}`; kept in [`{display_path(path)}`]({display_path(path)}). A power of 1 is growth in proportion, of 0 none.",
        "",
        "| | from ... to | seconds | power | MiB | power |",
        "|---|---|---|---|---|---|",
    ]
    for row in about["rows"]:
        sizes, seconds, memory = row["sizes"], row["seconds"], row["mebibytes"]
        lines.append(
            f"| {row['what']} | {sizes[0]:,} to {sizes[-1]:,} {row['size']} | {seconds[0]:.3f} to {seconds[-1]:.3f} "
            f"| {exponent(sizes, seconds):.2f} | {memory[0]:.0f} to {memory[-1]:.0f} | {exponent(sizes, memory):.2f} |"
        )
    return "\n".join(lines)


def intervals_table(path: Path) -> str:
    """What guidance in an interval of noise levels gains (:mod:`agd_lib.ablations`)."""
    found = read_ablation(path)
    rows = [each.row for each in found]
    return (
        f"{rows[0].base}, {len({row.seed for row in rows})} seeds of {rows[0].n:,} images; {source(path, rows)}\n\n"
        f"{interval_table(found)}"
    )


def strengths_table(path: Path) -> str:
    """The adapters with their strength restored (:mod:`agd_lib.strength`), beside themselves and CFG."""
    found = read_ablation(path)
    row, rows = found[0].row, [each.row for each in found]
    return (
        f"{row.base}, {row.steps} sampler steps, mean ± standard deviation over {len({each.seed for each in rows})} seeds of "
        f"{row.n:,} images, with the shipped adapters. {source(path, rows)}\n\n{strength_table(found)}"
    )


def scales_table(path: Path) -> str:
    """CFG and the shipped adapters at scales between and beyond those of the study (:mod:`agd_lib.ablations`)."""
    rows = [each.row for each in read_ablation(path)]
    return (
        f"{rows[0].base}, {rows[0].steps} sampler steps, mean ± standard deviation over {len({row.seed for row in rows})} seeds of noise, with "
        f"the shipped adapters. {source(path, rows)}\n\n{markdown_table(rows)}"
    )


def samplers_table(path: Path) -> str:
    """CFG and the shipped adapters under other samplers and with other numbers of steps (:mod:`agd_lib.ablations`)."""
    found = read_ablation(path)
    rows = [each.row for each in found]
    scale = max(row.scale for row in rows)
    return (
        f"{rows[0].base}, w = {scale:g}, mean ± standard deviation over {len({row.seed for row in rows})} seeds of noise, "
        f"{rows[0].n:,} images each, with the shipped adapters (trained on DDIM with 20 steps). The endpoint error is against CFG with the same "
        f"sampler and steps. {source(path, rows)}\n\n{sampler_table(found)}"
    )


def rivals_table(path: Path) -> str:
    """Other ways to one pass beside AGD's adapters (:mod:`agd_lib.rivals`)."""
    outcomes, others = read_comparison(path)
    row, rates = others[0], {each.row.adapter: each.settings.learning_rate for each in outcomes}
    chosen = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    trainings = {(each.row.adapter, each.row.seed): each.train_seconds for each in outcomes}
    rows = [*others, *(each.row for each in outcomes)]
    return (
        f"{Path(row.base).name}, {row.steps} sampler steps, mean ± standard deviation over {len({each.seed for each in others})} seeds "
        f"of {row.n:,} images; each student {min(each.operations for each in outcomes):.3g} operations of training, with the best of "
        f"three learning rates ({chosen}). {source(path, rows, trainings.values())} "
        "(The learning rates were tried in trainings of a quarter of the steps, which are not counted.)\n\n"
        f"{comparison_table(outcomes, others)}"
    )


def recipe_table(path: Path) -> str:
    """The training with one part exchanged (:mod:`agd_lib.recipes`)."""
    rows, cfg = read_variants(path)
    row, variant = rows[0].row, rows[0].variant
    trainings = {(each.variant, each.row.seed): each.train_seconds for each in rows}
    return (
        f"{Path(row.base).name}, {row.steps} sampler steps, trainings of {variant.num_steps:,} steps, mean ± standard deviation over "
        f"{len({each.row.seed for each in rows})} seeds of {row.n:,} images. "
        f"{source(path, [*cfg, *(each.row for each in rows)], trainings.values())}\n\n"
        f"{variant_table(rows, cfg)}"
    )


def negative_prompts_table(path: Path) -> str:
    """What a study of negative prompts measured (:mod:`agd_lib.negatives`)."""
    about, rows = read_json(path, PageError, "study"), read_negatives(path)
    return (
        f"{rows[0].base}, {rows[0].steps} sampler steps, {len({row.seed for row in rows})} seeds of "
        f"{min(row.n for row in rows)} to {max(row.n for row in rows)} prompts. {TABLE_NOTE} Source: `{about['command']}`, kept in "
        f"[`{display_path(path)}`]({display_path(path)}).\n\n{negatives_table(rows)}"
    )


def transfer_table(path: Path) -> str:
    """The shipped adapters on weights that they were not trained on (:mod:`agd_lib.transfer`)."""
    about, rows = read_json(path, PageError, "study"), read_study(path)
    lines = ["| model | weights moved | w | AGD keeps of CFG's gain in accuracy |", "|---|---|---|---|"]
    for model, by_scale in gain_kept(rows).items():
        moved = about["weights_moved"].get(model, 0)
        for scale, kept in by_scale.items():
            spread = statistics.stdev(kept) if len(kept) > 1 else None
            lines.append(f"| {model} | {moved:.1%} | {scale:g} | {cell(statistics.fmean(kept), spread, 2)} |")
    return f"{results_table(path)}\n\n" + "\n".join(lines)


PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"headline": headline_table, "speed": speed_table, "growth": growth_table},
    "docs/results.md": {
        **dict.fromkeys(PLANS, results_table),
        "tiny-dit-scale": scales_table,
        "tiny-dit-sampler": samplers_table,
        "tiny-sd21-scale": scales_table,
        "tiny-sdxl-scale": scales_table,
        "tiny-dit-rivals": rivals_table,
        "tiny-sd21-rivals": rivals_table,
        "tiny-dit-strength": strengths_table,
        "tiny-sd21-strength": strengths_table,
        "tiny-sdxl-strength": strengths_table,
        "tiny-dit-interval": intervals_table,
        "tiny-sd21-interval": intervals_table,
        "tiny-sdxl-interval": intervals_table,
        "tiny-sd21-search": intervals_table,
        "tiny-sdxl-search": intervals_table,
        "tiny-sd21-negatives": negative_prompts_table,
        "tiny-dit-thrift": recipe_table,
        "tiny-sd21-collection": recipe_table,
        "tiny-dit-states": recipe_table,
        "tiny-dit-size": recipe_table,
        "tiny-dit-smallest": recipe_table,
        "tiny-dit-weighting": recipe_table,
        "tiny-dit-noisiest": recipe_table,
        "tiny-sd21-sites": recipe_table,
        "tiny-sdxl-sites": recipe_table,
        "tiny-dit-inputs": recipe_table,
        "tiny-sd21-transfer": transfer_table,
    },
}
"""The tables of each page, in their order there, and how each is made of its file."""


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a table."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def with_tables(text: str, page: str, results: Path = RESULTS) -> str:
    """A page's text with everything between the marks of each of its tables replaced by that table.

    Args:
        text: what the page says now.
        page: its path in the repository, one of :data:`PAGES`; a table's links are made to lead on from there.

    Raises:
        PageError: if the marks of a table are not there, once each and in order, or its file is damaged.
    """
    to_root = "../" * page.count("/")
    for name, table in PAGES[page].items():
        begin, end = marks(name)
        if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
            raise PageError(f"{page} must hold {begin} and {end}, once each and in this order")
        before, rest = text.split(begin)
        path = results / f"{name}.json"
        try:
            made = table(path).replace("](data/", f"]({to_root}data/")
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise PageError(f"{path} is not what {table.__name__} reads: {error!r}") from error
        text = f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    """The command line; returns the exit code."""
    try:
        for page in PAGES:
            path = ROOT / page
            text = with_tables(path.read_text(encoding="utf-8"), page)
            with writing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except AGDError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
