"""Prompts: from scenes, from a file of one's own, from COCO's captions; what is wrong with a line is said with its number."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_text_models import build_sd_pipeline

import agd_lib.prompts as prompts
from agd_lib.base_models import StableDiffusionBase, base_from_pipeline
from agd_lib.errors import PromptError
from agd_lib.project import ROOT
from agd_lib.prompts import COCO_MEMBERS, coco_prompts, prompts_from, read_prompts, scene_prompts
from agd_lib.scenes import asked, draw_scene, read_caption
from agd_lib.study import MEASURING_PROMPTS, TRAINING_PROMPTS
from agd_lib.tiny import TRAIN_SEED

# Scenes ------------------------------------------------------------------------------------------------------------


def test_scene_prompts_are_the_captions_of_those_scenes() -> None:
    found = scene_prompts(50, seed=7)
    assert [read_caption(prompt) for prompt in found] == [asked(draw_scene(7, index)) for index in range(50)]
    assert found[:10] == scene_prompts(10, seed=7) != scene_prompts(10, seed=8)


def test_how_many_of_the_measuring_prompts_training_has_seen_is_what_the_results_say() -> None:
    measured = scene_prompts(1_000, MEASURING_PROMPTS)
    by_base = set(scene_prompts(100_000, TRAIN_SEED))  # captions of the base models' training images
    by_adapters = set(scene_prompts(8_000, TRAINING_PROMPTS))
    seen = [sum(prompt in others for prompt in measured) for others in (by_base, by_adapters)]
    text = f"{seen[0]} are also among the 100,000 captions of the base models' training, {seen[1]} among the adapters' 8,000"
    assert text in " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())


# A file ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionBase:
    base = base_from_pipeline(build_sd_pipeline(tmp_path_factory.mktemp("bases") / "sd"))
    assert isinstance(base, StableDiffusionBase)
    return base


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end"])
def test_a_line_is_a_prompt(tmp_path: Path, ending: str, last: str) -> None:
    lines = ["a red cat", "  zwei Äpfel ", "一只猫"]
    text = ending.join(lines) + (ending if last else "")
    (tmp_path / "prompts.txt").write_bytes(text.encode("utf-8"))
    assert read_prompts(tmp_path / "prompts.txt") == ["a red cat", "zwei Äpfel", "一只猫"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cat\nhat\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "prompts.txt") == ["cat", "hat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: expected one prompt a line"),
        (b"\n", "line 1 is empty: remove it"),
        (b"cat\n\nhat\n", "line 2 is empty: remove it"),
        (b"cat\n   \n", "line 2 is empty: remove it"),
        (b"cat\nhat\n\xff\n", r"line 3 is not UTF-8 \(byte 0xff\): save the file as UTF-8"),
        ("cät".encode("latin-1"), r"line 1 is not UTF-8 \(byte 0xe4\)"),
        (b"cat\nh\x00at\n", "line 2 holds control characters: 'h.x00at'"),
        (
            b"cat\na b c d e f g h i j k\n",
            "line 2 has 13 tokens, of which the text encoder takes 12: shorten it: 'a b c",
        ),
    ],
)
def test_a_line_that_is_no_prompt_is_named(
    tmp_path: Path, base: StableDiffusionBase, content: bytes, message: str
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts(tmp_path / "prompts.txt", base)
    assert str(tmp_path / "prompts.txt") in str(caught.value)


def test_a_missing_file_and_a_huge_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"no prompts at .*expected a text file"):
        read_prompts(tmp_path)
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(PromptError, match="has 67,108,865 bytes"):
        read_prompts(tmp_path / "huge.txt")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_any_bytes_at_all_are_prompts_or_a_prompt_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    try:
        found = read_prompts(tmp_path / "prompts.txt")
    except PromptError:
        return
    assert found and all(prompt and prompt.isprintable() and prompt == prompt.strip() for prompt in found)


# COCO --------------------------------------------------------------------------------------------------------------


def write_archive(folder: Path, value: Any, member: str = COCO_MEMBERS["coco"]) -> None:
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as file:
        file.writestr(member, value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an archive of twenty captions, numbered from behind, that counts as fetched."""
    annotations = [{"id": 20 - i, "image_id": 1, "caption": f" Caption {20 - i}.\n"} for i in range(20)]
    write_archive(tmp_path, {"annotations": annotations})
    monkeypatch.setattr(prompts, "download_url", lambda url, folder, md5: None)
    return tmp_path


def test_captions_are_drawn_by_seed_without_repetition_and_tidied(coco: Path) -> None:
    assert sorted(coco_prompts(20, folder=coco)) == sorted(f"Caption {i + 1}." for i in range(20))
    assert coco_prompts(5, 3, folder=coco) == coco_prompts(5, 3, folder=coco) != coco_prompts(5, 4, folder=coco)


def test_validation_captions_are_others(coco: Path) -> None:
    with zipfile.ZipFile(coco / "annotations_trainval2017.zip", "a") as file:
        captions = {"annotations": [{"id": 1, "image_id": 7, "caption": "Of a validation image."}]}
        file.writestr("annotations/captions_val2017.json", json.dumps(captions))
    assert coco_prompts(1, source="coco-val", folder=coco) == ["Of a validation image."]
    assert "Of a validation image." not in coco_prompts(20, folder=coco)


def test_all_captions_are_equally_likely(coco: Path) -> None:
    counts = Counter(prompt for seed in range(400) for prompt in coco_prompts(5, seed, folder=coco))
    assert len(counts) == 20 and 60 < min(counts.values()) <= max(counts.values()) < 145  # 100 each, sd 8.7


@pytest.mark.parametrize("count", [0, 21])
def test_more_captions_than_there_are_are_refused(coco: Path, count: int) -> None:
    with pytest.raises(PromptError, match=f"got count = {count}, expected 1 to 20"):
        coco_prompts(count, folder=coco)


@pytest.mark.parametrize("value", ["no JSON", [], {}, {"annotations": 3}, {"annotations": [{"id": "one"}]}])
def test_an_archive_of_other_things_is_refused(coco: Path, value: Any) -> None:
    write_archive(coco, value)
    with pytest.raises(PromptError, match=r"is not COCO's archive of annotations .*: remove it"):
        coco_prompts(1, folder=coco)


def test_an_archive_without_captions_and_a_damaged_one_are_refused(coco: Path) -> None:
    write_archive(coco, {}, member="../captions_train2017.json")
    with pytest.raises(PromptError, match="is not COCO's archive"):
        coco_prompts(1, folder=coco)
    (coco / "annotations_trainval2017.zip").write_bytes(b"no archive")
    with pytest.raises(PromptError, match="is not COCO's archive"):
        coco_prompts(1, folder=coco)


def test_without_a_network_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, folder: Any, md5: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(prompts, "download_url", refuse)
    with pytest.raises(PromptError, match=r"could not fetch COCO's captions .*no network.* Fetch that file to .*zip"):
        coco_prompts(1, folder=tmp_path)


def test_prompts_by_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "coco_prompts", lambda count, seed, source: [f"{source} {seed}"] * count)
    (tmp_path / "mine.txt").write_text("a cat\na dog\na horse\n")
    assert prompts_from("scenes", 3, 7) == scene_prompts(3, 7)
    assert prompts_from("coco", 3, 7) == ["coco 7"] * 3
    assert prompts_from("coco-val", 3, 7) == ["coco-val 7"] * 3
    assert prompts_from(str(tmp_path / "mine.txt"), 2, 7) == ["a cat", "a dog", "a horse"]
    with pytest.raises(PromptError, match=r"no prompts at .*nothing"):
        prompts_from("nothing", 2, 7)
