"""Prompts for text-to-image models: captions of our scenes, of COCO-2017, or a file of one's own.

Whatever they come from, they are a list of texts, and which ones they are depends on the arguments alone.
"""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

from torchvision.datasets.utils import download_url

from .base_models import StableDiffusionBase
from .errors import PromptError
from .project import RUNS, repository_path
from .scenes import caption, draw_scene

COCO_URL = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
COCO_MD5 = "f4bbac642086de4f52a3fdda2de5fa2c"
COCO_MEMBERS = {"coco": "annotations/captions_train2017.json", "coco-val": "annotations/captions_val2017.json"}
"""In the archive: the captions of the training images, which the paper trains on, and of the validation images, which its FID
is measured against."""
COCO_FOLDER = RUNS / "coco-2017"
"""Where the captions' archive (241 MB) is kept once it has been fetched."""

MAX_FILE_BYTES = 2**26
MAX_COCO_BYTES = 2**28
"""Larger files are refused unread."""


def scene_prompts(count: int, seed: int) -> list[str]:
    """Captions of the first ``count`` scenes with this seed (:mod:`agd_lib.scenes`); each says some attributes of its scene."""
    return [caption(draw_scene(seed, index)) for index in range(count)]


def read_prompts(path: str | Path, base: StableDiffusionBase | None = None) -> list[str]:
    """The prompts in a text file, one a line, in UTF-8.

    Args:
        base: with it, prompts that are too long for its text encoders are refused too: their ends would be cut off.

    Raises:
        PromptError: if there is no such file, it is not UTF-8, holds no prompt, or a line is empty, holds control
            characters, or is too long; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptError(f"no prompts at {path}: expected a text file with one prompt a line")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise PromptError(f"{path} has {path.stat().st_size:,} bytes, expected at most {MAX_FILE_BYTES:,}")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PromptError(
            f"{path}, line {line} is not UTF-8 (byte {content[error.start]:#04x}): save the file as UTF-8"
        ) from error
    prompts = [line.strip() for line in text.split("\n")]
    if prompts[-1] == "":  # after the last line's end
        prompts.pop()
    if not prompts:
        raise PromptError(f"{path} is empty: expected one prompt a line")
    for number, prompt in enumerate(prompts, start=1):
        problem = _problem(prompt, base)
        if problem:
            raise PromptError(f"{path}, line {number} {problem}")
    return prompts


def prompts_from(source: str, count: int, seed: int, base: StableDiffusionBase | None = None) -> list[str]:
    """Prompts by one word: ``"scenes"`` (:func:`scene_prompts`), ``"coco"`` or ``"coco-val"`` (:func:`coco_prompts`), or a
    file's, all of them.

    Args:
        source: one of the three, or a path for :func:`read_prompts`, from the repository. count, seed: of the first three.
        base: see :func:`read_prompts`.

    Raises:
        PromptError: as the three functions do.
    """
    if source == "scenes":
        return scene_prompts(count, seed)
    if source in COCO_MEMBERS:
        return coco_prompts(count, seed, source)
    return read_prompts(repository_path(source), base)


def _problem(prompt: str, base: StableDiffusionBase | None) -> str | None:
    """What is wrong with a line; None if it is a prompt."""
    if not prompt:
        return "is empty: remove it (the empty prompt is what guidance leads away from)"
    if not prompt.isprintable():
        return f"holds control characters: {prompt[:60]!r}"
    for tokens, limit in base.prompt_lengths(prompt) if base else ():
        if tokens > limit:
            return f"has {tokens} tokens, of which the text encoder takes {limit}: shorten it: {prompt[:60]!r}"
    return None


def coco_prompts(count: int = 500, seed: int = 0, source: str = "coco", folder: str | Path = COCO_FOLDER) -> list[str]:
    """Captions of COCO-2017's images (the paper: 500 of the training images'), all equally likely, none twice.

    Args:
        source: whose captions: a name in :data:`COCO_MEMBERS`.
        folder: where the archive of annotations is, or is fetched to (241 MB, once).

    Raises:
        PromptError: if the archive cannot be fetched or is damaged, or there are fewer captions.
    """
    archive = Path(folder) / Path(COCO_URL).name
    try:
        download_url(COCO_URL, folder, md5=COCO_MD5)  # does nothing if a whole one is there
    except (OSError, RuntimeError) as error:
        raise PromptError(
            f"could not fetch COCO's captions from {COCO_URL}: {error}. Fetch that file to {archive} yourself, or give "
            "prompts of your own"
        ) from error
    captions = _read_captions(archive, COCO_MEMBERS[source])
    if not 1 <= count <= len(captions):
        raise PromptError(f"got count = {count}, expected 1 to {len(captions):,}, as many as there are captions")
    return random.Random(seed).sample(captions, count)


def _read_captions(archive: Path, member: str) -> list[str]:
    """Every caption, in the order of the annotations' numbers; nothing is unpacked to the disk."""
    try:
        with zipfile.ZipFile(archive) as file:
            if file.getinfo(member).file_size > MAX_COCO_BYTES:
                raise ValueError(f"{member} is larger than {MAX_COCO_BYTES:,} bytes")
            annotations = json.loads(file.read(member))["annotations"]
        by_number = {int(annotation["id"]): str(annotation["caption"]) for annotation in annotations}
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise PromptError(f"{archive} is not COCO's archive of annotations ({error}): remove it") from error
    return [" ".join(by_number[number].split()) for number in sorted(by_number)]
