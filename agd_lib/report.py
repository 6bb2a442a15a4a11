"""What came of a run, for reading: a page of one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser, math_to_image
from nbconvert.filters import markdown2html
from nbformat import NotebookNode

from .errors import AGDError
from .figures import COLOURS
from .results import Row, Summary, best_scale, markdown_table, summarise
from .storage import read_json, writing


class ReportError(AGDError):
    """A run's own description is damaged."""


STYLE = """
:root { --ink: #1c2733; --quiet: #5b6875; --line: #dfe4ea; --paper: #ffffff; --wash: #f5f7f9; --accent: #1f4e8c; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--wash); font: 16px/1.6 system-ui, "Segoe UI", Helvetica, Arial,
  sans-serif; }
main { max-width: 77rem; margin: 0 auto; padding: 2.5rem 3rem 4rem; background: var(--paper);
  border-left: 1px solid var(--line); border-right: 1px solid var(--line); min-height: 100vh; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.45rem; margin: 3rem 0 1rem; padding-top: 1rem; border-top: 2px solid var(--accent); }
h3 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
a { color: var(--accent); } p { max-width: 46rem; }
.lead { color: var(--quiet); margin: 0 0 1.5rem; }
nav { background: var(--wash); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1.2rem;
  margin: 1.5rem 0; columns: 2; font-size: .95rem; }
nav a { display: block; text-decoration: none; padding: .1rem 0; } nav a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--quiet); border-bottom: 2px solid var(--line); }
th, td { padding: .35rem .8rem .35rem 0; vertical-align: top; }
.numbers { font-size: .76rem; } .numbers th, .numbers td { white-space: nowrap; } .numbers td:first-child { padding-left: .4rem; }
td { border-bottom: 1px solid var(--line); }
tr.first td { border-top: 2px solid var(--line); } tr.best td { font-weight: 650; background: #eef4fb; }
.dot { display: inline-block; width: .65rem; height: .65rem; border-radius: 50%; margin-right: .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .92rem; margin: 1rem 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.8rem; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--quiet); font-size: .92rem; max-width: 46rem; margin-top: .5rem; }
figcaption p { margin: .3rem 0; }
code, pre { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem 1rem;
  overflow-x: auto; }
details { margin: .6rem 0 1.2rem; } summary { cursor: pointer; color: var(--quiet); font-size: .92rem; }
.headline { border-left: 4px solid var(--accent); padding: .4rem 0 .4rem 1.1rem; margin: 1.4rem 0; }
@media (max-width: 45rem) { main { padding: 1.5rem 1.2rem; } nav { columns: 1; } }
@media print { body { background: none; } main { border: 0; padding: 0; max-width: none; } nav { display: none; } }
"""


def write_report(root: Path, rows: Sequence[Row]) -> Path:
    """Write ``root/report.html`` from every base model's run below ``root``.

    Args:
        root: such as ``runs/cpu``. rows: all results; may be empty.

    Raises:
        ReportError: if a run's ``run.json`` is damaged.
    """
    runs = [(path.parent, read_json(path, ReportError, "run description")) for path in sorted(root.glob("*/run.json"))]
    sections: list[tuple[str, str, str]] = []  # (anchor, title, content)
    for base in dict.fromkeys(row.base for row in rows):
        of_base = [row for row in rows if row.base == base]
        sections.append((f"results-{_anchor(base)}", f"Results: {Path(base).name}", results_section(of_base)))
    for folder, run in runs:
        sections.append((f"run-{_anchor(folder.name)}", f"Machine and settings: {folder.name}", _run_section(run)))
        for path in sorted((folder / "notebooks").glob("[0-9]*.ipynb")):
            if path.stem.endswith((".failed", ".partial")):
                continue
            notebook = nbformat.read(path, as_version=4)
            anchor = f"{_anchor(folder.name)}-{_anchor(path.stem)}"
            sections.append((anchor, _title(notebook, path.stem), notebook_section(notebook)))
    names = ", ".join(f"{run['base']}" for _, run in runs) or "no base model yet"
    finished = max((str(run["finished"]) for _, run in runs), default="")
    page = [
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>AGD report: {html.escape(root.name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
        "<h1>Adapter Guidance Distillation</h1>",
        f"<p class='lead'>Profile <b>{html.escape(root.name)}</b>, base model {html.escape(names)}. "
        f"Finished {html.escape(finished.replace('T', ' ').replace('+00:00', ' UTC'))}.</p>",
        "<nav>" + "".join(f"<a href='#{anchor}'>{html.escape(title)}</a>" for anchor, title, _ in sections) + "</nav>",
        *(f"<h2 id='{anchor}'>{html.escape(title)}</h2>\n{content}" for anchor, title, content in sections),
        "</main>\n</body>\n</html>\n",
    ]
    with writing(root / "report.html") as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")
    return root / "report.html"


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# Results ------------------------------------------------------------------------------------------------------------------


def results_section(rows: Sequence[Row]) -> str:
    """One base model's rows: a sentence at the scale where CFG is best, and the whole table."""
    header, _, *lines = [_cells(line) for line in markdown_table(rows).splitlines()]
    summaries = summarise(rows)
    distances = [s for s in summaries if s.mean["fd"] is not None]
    best = {s.method: min(o.mean["fd"] or 0.0 for o in distances if o.method == s.method) for s in distances}
    body = []
    for number, (summary, cells) in enumerate(zip(summaries, lines)):
        is_best = summary.mean["fd"] is not None and summary.mean["fd"] == best[summary.method]
        starts = number == 0 or summaries[number - 1].method != summary.method
        classes = " ".join(name for name, on in (("best", is_best), ("first", starts)) if on)
        colour = COLOURS.get(summary.method, "#999999")
        first = f"<td><span class='dot' style='background:{colour}'></span>{html.escape(cells[0])}</td>"
        body.append(
            f"<tr class='{classes}'>{first}{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells[1:])}</tr>"
        )
    row = rows[0]
    return (
        _headline(rows, summaries)
        + "<div class='scroll'><table class='numbers'><thead><tr>"
        + "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        + f"</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        + f"<p class='lead'>{row.steps} sampler steps. Mean ± standard deviation over seeds. Shaded: each method's lowest "
        f"Frechet distance (FD), in the features of {html.escape(row.extractor)}. Endpoint error: "
        "MSE(this, CFG) / MSE(unguided, CFG) over final latents from the same noise.</p>"
    )


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _headline(rows: Sequence[Row], summaries: Sequence[Summary]) -> str:
    """CFG and the nearest AGD at the scale where CFG is best; empty where either is missing."""
    if not any(row.guidance == "cfg" and row.fd is not None for row in rows):
        return ""
    scale = best_scale(rows)
    (cfg,) = [s for s in summaries if s.method == "cfg" and s.scale == scale]
    students = [s for s in summaries if s.method.startswith("agd") and s.scale == scale and s.mean["fd"] is not None]
    if not students:
        return ""
    student = min(students, key=lambda s: s.mean["endpoint_mse_ratio"] or s.mean["fd"] or 0.0)
    ratio = student.mean["endpoint_mse_ratio"]
    closest = f", the closest to CFG with an endpoint error of {ratio:.3f}" if ratio is not None else ""
    return (
        f"<p class='headline'>At scale {scale:g}, where CFG has its lowest Frechet distance, CFG reaches "
        f"<b>{cfg.mean['fd']:.3f}</b> with {cfg.nfe:g} forward passes an image; {html.escape(student.method)} reaches "
        f"<b>{student.mean['fd']:.3f}</b> with {student.nfe:g}{closest}.</p>"
    )


# Machine and settings -----------------------------------------------------------------------------------------------------


def _run_section(run: dict[str, Any]) -> str:
    notebooks = "".join(
        f"<tr><td>{html.escape(entry['name'])}</td><td>{_clock(entry['seconds'])}</td>"
        f"<td>{entry['peak_memory_mib']:,} MiB</td></tr>"
        for entry in run["notebooks"]
    )
    return (
        f"<pre>{html.escape(run['command'])}</pre>"
        + _definitions(run["machine"])
        + "<div class='scroll'><table><thead><tr><th>notebook</th><th>time</th><th>peak memory</th></tr></thead>"
        + f"<tbody>{notebooks}</tbody></table></div>"
        + f"<details><summary>Parameters given to the notebooks</summary>{_definitions(run['parameters'])}</details>"
    )


def _definitions(values: dict[str, Any]) -> str:
    rows = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in values.items())
    return f"<dl>{rows}</dl>"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


# Notebooks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exhibit:
    """Something that a notebook shows.

    Attributes:
        heading: of the section that it stands in.
        content: HTML.
        caption: Markdown, what the notebook says right after it; may be empty.
    """

    heading: str
    content: str
    caption: str


def _title(notebook: NotebookNode, default: str) -> str:
    for cell in notebook.cells:
        match = re.search(r"^# +(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if match:
            return _plain(match[1])
    return default


def _plain(markdown: str) -> str:
    return re.sub(r"[*`$]|\\", "", markdown).strip()


def exhibits(notebook: NotebookNode) -> Iterator[Exhibit]:
    """A notebook's figures, tables and printed results, in order, without its code."""
    heading = ""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#{2,} +(.+)$", cell.source, re.MULTILINE)
            heading = _plain(headings[-1]) if headings else heading
        elif cell.cell_type == "code":
            following = notebook.cells[number + 1] if number + 1 < len(notebook.cells) else None
            caption = _first_paragraph(following.source) if following and following.cell_type == "markdown" else ""
            shown = [content for content in (_show(output, heading) for output in cell.outputs) if content]
            for place, content in enumerate(shown):
                yield Exhibit(heading, content, caption if place == len(shown) - 1 else "")


def _first_paragraph(markdown: str) -> str:
    """The paragraph that a Markdown cell begins with; empty if it begins with anything else."""
    first = markdown.strip().split("\n\n")[0]
    return "" if first.startswith(("#", "|", "$$", "<", "```", "- ", "* ", "1.", ">")) else first


def _show(output: NotebookNode, heading: str) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        source = f"data:image/png;base64,{''.join(data['image/png'].split())}"
        return f"<img src='{source}' alt='{html.escape(heading, quote=True)}'>"
    if "image/svg+xml" in data:
        encoded = base64.b64encode("".join(data["image/svg+xml"]).encode()).decode()
        return f"<img src='data:image/svg+xml;base64,{encoded}' alt='{html.escape(heading, quote=True)}'>"
    if "text/markdown" in data:
        return f"<div class='scroll'>{_markdown(''.join(data['text/markdown']))}</div>"
    if "text/html" in data:
        content = "".join(data["text/html"])
        return f"<div class='scroll'>{content}</div>" if "<table" in content and "<script" not in content else ""
    if output.output_type == "stream" and output.name == "stdout" and output.text.strip():
        return f"<pre>{html.escape(output.text.strip())}</pre>"
    return ""


def notebook_section(notebook: NotebookNode) -> str:
    """A notebook's exhibits under their headings; what a section printed is folded away at its end."""
    sections: dict[str, tuple[list[str], list[str]]] = {}
    for exhibit in exhibits(notebook):
        shown, printed = sections.setdefault(exhibit.heading, ([], []))
        if exhibit.content.startswith("<img"):
            caption = f"<figcaption>{_markdown(exhibit.caption)}</figcaption>" if exhibit.caption else ""
            shown.append(f"<figure>{exhibit.content}{caption}</figure>")
        else:
            (printed if exhibit.content.startswith("<pre") else shown).append(exhibit.content)
    parts = []
    for heading, (shown, printed) in sections.items():
        if shown and heading:
            parts.append(f"<h3>{html.escape(heading)}</h3>")
        parts += shown
        if printed:
            about = "printed output" if shown or not heading else f"{html.escape(heading)}: printed output"
            parts.append(f"<details><summary>{about}</summary>{''.join(printed)}</details>")
    return "\n".join(parts) or "<p class='lead'>This notebook shows no figures.</p>"


def _markdown(text: str) -> str:
    """Markdown with formulas to HTML; formulas become small pictures, so that the page needs no script."""
    formulas: list[str] = []

    def keep(match: re.Match[str]) -> str:
        formulas.append(match[1] or match[2])
        return f"FORMULA{len(formulas) - 1}END"

    kept = re.sub(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", keep, text, flags=re.DOTALL)
    return re.sub(r"FORMULA(\d+)END", lambda match: _formula(formulas[int(match[1])]), str(markdown2html(kept)))


def _formula(tex: str) -> str:
    """A formula as an inline picture; as code where matplotlib cannot set it."""
    size, source = 10, f"${' '.join(tex.split())}$"
    font = FontProperties(size=size)
    try:
        _, height, depth, *_ = MathTextParser("path").parse(source, dpi=72, prop=font)
        picture = io.BytesIO()
        math_to_image(source, picture, prop=font, format="svg", color=(0.11, 0.15, 0.2))
    except ValueError:
        return f"<code>{html.escape(tex.strip())}</code>"
    encoded = base64.b64encode(picture.getvalue()).decode()
    place = f"height:{height / size:.2f}em;vertical-align:{-depth / size:.2f}em"
    return f"<img style='display:inline;{place}' alt='{html.escape(tex, quote=True)}' src='data:image/svg+xml;base64,{encoded}'>"
