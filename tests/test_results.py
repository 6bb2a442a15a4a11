"""The results file: its schema, and the tables made of it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_lib.errors import AGDError
from agd_lib.results import (
    ResultsError,
    Row,
    at_best_scales,
    best_scale,
    markdown_table,
    read_results,
    row_from_dict,
    summarise,
    write_results,
)

CFG_ROW = Row(
    base="tiny-dit",
    guidance="cfg",
    adapter=None,
    scale=2.0,
    steps=20,
    nfe=40.0,
    n=1000,
    seed=0,
    fd=1.5,
    extractor="shapes-extractor",
    precision=0.75,
    recall=0.5,
    condition_accuracy=0.9,
    endpoint_mse_ratio=0.0,
    seconds_per_image=0.02,
    base_parameters=2_900_000,
    adapter_parameters=None,
)
AGD_ROW = replace(
    CFG_ROW, guidance="agd", adapter="offset", nfe=20.0, fd=1.25, endpoint_mse_ratio=0.2, adapter_parameters=80_000
)
UNGUIDED_ROW = replace(CFG_ROW, guidance="unguided", scale=1.0, nfe=20.0, fd=4.0, endpoint_mse_ratio=1.0)
BARE_ROW = replace(
    AGD_ROW, fd=None, precision=None, recall=None, condition_accuracy=None, endpoint_mse_ratio=None, seed=1
)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [CFG_ROW, AGD_ROW, UNGUIDED_ROW, BARE_ROW]
    write_results(tmp_path / "results.json", rows)
    assert read_results(tmp_path / "results.json") == rows


def test_the_file_is_a_list_of_objects_with_the_agreed_keys(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", [CFG_ROW])
    (value,) = json.loads((tmp_path / "results.json").read_text())
    assert list(value) == [
        *(
            "base",
            "guidance",
            "adapter",
            "scale",
            "steps",
            "nfe",
            "n",
            "seed",
            "fd",
            "extractor",
            "precision",
            "recall",
        ),
        *("condition_accuracy", "endpoint_mse_ratio", "seconds_per_image", "base_parameters", "adapter_parameters"),
        "kd",
    ]
    assert value["adapter"] is None and value["scale"] == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": "CFG"}, "guidance 'CFG'"),
        ({"adapter": "offset"}, "guidance 'cfg' with adapter 'offset'"),
        ({"guidance": "agd"}, "guidance 'agd' with adapter None"),
        ({"guidance": "unguided", "adapter": "offset"}, "guidance 'unguided' with adapter 'offset'"),
        ({"fd": math.nan}, "fd = nan"),
        ({"fd": math.inf}, "fd = inf"),
        ({"scale": math.nan}, "scale = nan"),
        ({"seconds_per_image": math.inf}, "seconds_per_image = inf"),
        ({"precision": 1.01}, "precision = 1.01"),
        ({"recall": -0.1}, "recall = -0.1"),
        ({"condition_accuracy": 98.0}, "condition_accuracy = 98.0"),
        ({"endpoint_mse_ratio": math.nan}, "endpoint_mse_ratio = nan"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultsError, match=message):
        replace(CFG_ROW, **changes)
    with pytest.raises(ResultsError, match=message):
        row_from_dict(asdict(CFG_ROW) | changes, "here")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("base", None, "None"),
        ("base", 1, "int"),
        ("adapter", 1, "int"),
        ("scale", "2", "str"),
        ("scale", None, "None"),
        ("scale", True, "bool"),
        ("steps", 20.0, "float"),
        ("n", "1000", "str"),
        ("seed", None, "None"),
        ("fd", "1.5", "str"),
        ("fd", [1.5], "list"),
        ("precision", {}, "dict"),
        ("base_parameters", True, "bool"),
        ("adapter_parameters", 0.5, "float"),
    ],
)
def test_values_of_another_type_are_refused_by_name(name: str, value: Any, kind: str) -> None:
    with pytest.raises(ResultsError, match=f"here: {name} is a {kind}, expected"):
        row_from_dict(asdict(CFG_ROW) | {name: value}, "here")


def test_whole_numbers_serve_as_floats() -> None:
    row = row_from_dict(asdict(CFG_ROW) | {"scale": 2, "nfe": 40}, "here")
    assert row == CFG_ROW and isinstance(row.scale, float)
    with pytest.raises(ResultsError, match="fd is too large"):
        row_from_dict(asdict(CFG_ROW) | {"fd": 10**400}, "here")


def test_rows_of_older_versions_have_no_kernel_distance() -> None:
    value = asdict(replace(CFG_ROW, kd=0.5))
    assert row_from_dict(value, "here").kd == 0.5
    del value["kd"]
    assert row_from_dict(value, "here") == replace(CFG_ROW, kd=None)


def test_kernel_distances_have_a_column_where_there_are_any() -> None:
    assert "KD" not in markdown_table([CFG_ROW]) + markdown_table(
        [CFG_ROW, replace(CFG_ROW, kd=0.5, seed=1)]
    ) + markdown_table([])
    table = markdown_table([replace(CFG_ROW, kd=0.5), replace(CFG_ROW, kd=0.7, seed=1)])
    head, line, values = table.splitlines()
    assert head.count("|") == line.count("|") == values.count("|")
    assert values.split("|")[head.split("|").index(" KD ")].strip() == "0.6000 ± 0.1414"


@pytest.mark.parametrize("name", [name for name in asdict(CFG_ROW) if name != "kd"])
def test_every_key_is_needed_and_no_other(name: str) -> None:
    value = asdict(CFG_ROW)
    del value[name]
    with pytest.raises(ResultsError, match="exactly the keys"):
        row_from_dict(value, "here")
    with pytest.raises(ResultsError, match="exactly the keys"):
        row_from_dict(value | {name.upper(): 1}, "here")


@pytest.mark.parametrize(
    "text", ["", "[", "{}", "null", "[1]", "[[]]", '["row"]', "[" * 100_000, "[" + "9" * 5_000 + "]"], ids=range(9)
)
def test_files_that_are_no_list_of_rows_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ResultsError, match=r"results\.json"):
        read_results(tmp_path / "results.json")


def test_the_row_that_is_wrong_is_numbered(tmp_path: Path) -> None:
    values = [asdict(CFG_ROW), asdict(AGD_ROW) | {"precision": 2.0}]
    (tmp_path / "results.json").write_text(json.dumps([values[0], asdict(AGD_ROW) | {"n": None}]))
    with pytest.raises(ResultsError, match="row 1: n is a None"):
        read_results(tmp_path / "results.json")


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"no results at .*gone\.json: run `make reproduce`"):
        read_results(tmp_path / "gone.json")
    (tmp_path / "results.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(ResultsError, match="not valid JSON"):
        read_results(tmp_path / "results.json")


# Tables ------------------------------------------------------------------------------------------------------------


def test_mean_and_deviation_over_seeds() -> None:
    rows = [replace(CFG_ROW, seed=seed, fd=fd) for seed, fd in enumerate((1.0, 2.0, 4.0))]
    (summary,) = summarise(rows)
    assert (summary.method, summary.scale, summary.seeds, summary.n, summary.nfe) == ("cfg", 2.0, 3, 1000, 40.0)
    assert summary.mean["fd"] == pytest.approx(7 / 3)
    assert summary.deviation["fd"] == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    assert summary.mean["precision"] == 0.75 and summary.deviation["precision"] == 0


def test_one_seed_has_no_deviation_and_missing_values_are_left_out() -> None:
    (single,) = summarise([CFG_ROW])
    assert single.deviation["fd"] is None and single.mean["fd"] == 1.5
    (partly,) = summarise([AGD_ROW, BARE_ROW])
    assert partly.seeds == 2 and partly.mean["fd"] == 1.25 and partly.deviation["fd"] is None
    (bare,) = summarise([BARE_ROW])
    assert bare.mean["fd"] is None and bare.mean["seconds_per_image"] == 0.02


def test_methods_scales_bases_steps_and_sample_counts_are_not_mixed() -> None:
    others = [
        AGD_ROW,
        replace(AGD_ROW, adapter="modulated"),
        replace(CFG_ROW, scale=3.0),
        replace(CFG_ROW, base="dit-xl-2-256"),
        replace(CFG_ROW, steps=50),
        replace(CFG_ROW, n=500),
        replace(CFG_ROW, extractor="inception-v3-clean"),
    ]
    rows = [CFG_ROW, *others, replace(CFG_ROW, seed=1, fd=2.5)]
    summaries = summarise(rows)
    assert [summary.seeds for summary in summaries] == [2] + [1] * 7
    assert [summary.method for summary in summaries[:3]] == ["cfg", "agd offset", "agd modulated"]
    assert summaries[0].mean["fd"] == 2.0


def test_the_best_scale_has_the_lowest_mean_distance() -> None:
    distances = {(1.5, 0): 2.0, (1.5, 1): 4.0, (2.0, 0): 3.2, (2.0, 1): 2.6, (3.0, 0): 1.0, (3.0, 1): 9.0}
    rows = [replace(CFG_ROW, scale=scale, seed=seed, fd=fd) for (scale, seed), fd in distances.items()]
    rows += [replace(AGD_ROW, scale=4.0, fd=0.5), replace(UNGUIDED_ROW, fd=0.1)]
    assert best_scale(rows) == 2.0
    assert best_scale(rows, "agd offset") == 4.0


def test_every_method_is_shown_at_its_own_best_scale() -> None:
    other = replace(CFG_ROW, base="tiny-sd21", extractor="scenes", scale=7.0)
    rows = [
        UNGUIDED_ROW,
        *(replace(CFG_ROW, scale=scale, fd=fd, seed=seed) for seed in (0, 1) for scale, fd in ((2, 1.5), (4, 1.4))),
        *(replace(AGD_ROW, scale=scale, fd=fd) for scale, fd in ((2.0, 1.6), (4.0, 1.7))),
        other,
    ]
    assert [(row.base, row.method, row.scale, row.seed) for row in at_best_scales(rows)] == [
        ("tiny-dit", "unguided", 1.0, 0),
        ("tiny-dit", "cfg", 4, 0),
        ("tiny-dit", "cfg", 4, 1),
        ("tiny-dit", "agd offset", 2.0, 0),
        ("tiny-sd21", "cfg", 7.0, 0),
    ]


def test_a_best_scale_needs_distances_of_one_kind() -> None:
    with pytest.raises(ResultsError, match="no row of method 'cfg'"):
        best_scale([AGD_ROW])
    with pytest.raises(ResultsError, match="no row of method 'agd offset'"):
        best_scale([BARE_ROW], "agd offset")
    with pytest.raises(ResultsError, match=r"2 \(base, extractor\) pairs"):
        best_scale([CFG_ROW, replace(CFG_ROW, extractor="inception-v3-clean")])


def test_markdown_table() -> None:
    lines = markdown_table([CFG_ROW, replace(CFG_ROW, seed=1, fd=2.0), BARE_ROW]).splitlines()
    assert [line.count("|") for line in lines] == [10] * 4
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:4] == ["cfg", "2", "40", "1.750 ± 0.354"]
    assert cells[4:] == ["0.750 ± 0.000", "0.500 ± 0.000", "0.900 ± 0.000", "0.000 ± 0.000", "1000 x 2"]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")][3:8] == ["-"] * 5
    assert lines[3].startswith("| agd offset | 2 | 20 |")


def test_a_table_of_several_bases_names_them() -> None:
    table = markdown_table([CFG_ROW, replace(CFG_ROW, base="dit-xl-2-256")])
    assert "| tiny-dit: cfg |" in table and "| dit-xl-2-256: cfg |" in table


# Arbitrary JSON ----------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(value=JSON | st.dictionaries(st.sampled_from(list(asdict(CFG_ROW))), JSON))
def test_any_json_at_all_is_refused_with_a_results_error(value: Any) -> None:
    with pytest.raises(ResultsError):
        row_from_dict(value, "here")


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(list(asdict(CFG_ROW))), JSON, min_size=1, max_size=3))
def test_a_row_with_any_other_values_is_a_row_or_a_results_error(changes: dict[str, Any]) -> None:
    try:
        row = row_from_dict(asdict(CFG_ROW) | changes, "here")
    except AGDError:
        return
    assert row_from_dict(json.loads(json.dumps(asdict(row), allow_nan=False)), "here") == row
    assert markdown_table([row])
