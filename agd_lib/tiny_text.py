"""Trains the small text-to-image models: ``python -m agd_lib.tiny_text sd21 --output data/tiny-sd21`` (or ``sdxl``).

True small analogues of Stable Diffusion 2.1 and SDXL, on the captioned scenes of :mod:`agd_lib.scenes`: the same block
types, conditioning and prediction type, saved as ``StableDiffusionPipeline`` and ``StableDiffusionXLPipeline`` folders.
Their text encoders have a vocabulary of their own and are trained together with the UNet. Each stage is written whole
or not at all, a stage that is already there is not repeated, and the denoiser's training keeps checkpoints, so an
interrupted build resumes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .attributes import AttributeFeatures, AttributeReader, Targets, fulfilled, targets
from .base_models import base_from_pipeline
from .cycles import (
    SETTINGS,
    Checkpoint,
    batches,
    check_settings,
    forget_paths,
    has_fast_bfloat16,
    one_cycle,
    save_model,
    train_cycle,
)
from .errors import CheckpointError
from .evaluation import save_reference
from .extractor import load_local, weights_hash
from .guidance import CFG
from .project import DATA, ROOT
from .sampling import generate
from .scenes import Scene, caption, make_scenes, vocabulary
from .shapes import IMAGE_SIZE
from .storage import read_json, write_json, writing
from .tiny import HELD_OUT_SEED, REFERENCE_SEED, TRAIN_SEED, encode_all, to_unit, train_vae

ModelName = Literal["sd21", "sdxl"]

MAX_TOKENS = 24
"""Length of every tokenised prompt, start and end included; the longest caption has 18."""

Cycle = tuple[int, float, float]
"""Steps and peak learning rate of a one-cycle schedule, and the share of the images that have another image's caption."""

TEXT_CYCLES: dict[ModelName, tuple[Cycle, ...]] = {
    "sd21": ((2_000, 1e-3, 0.0), (3_000, 1e-3, 0.0), (1_000, 1e-3, 0.25)),
    "sdxl": ((2_000, 1e-3, 0.0), (1_000, 1e-3, 0.0), (1_000, 1e-3, 0.25)),
}
"""The denoiser's training. More steps alone make a model that follows its prompts so well that guidance has little left to
do. With a quarter of the captions wrong, as captions from the web are, it learns to mistrust them: unguided it draws
something else now and then, and guided it does not."""

BATCH_SIZE = 128
"""Images in a step of the denoiser's training."""

CAPTION_DROPOUT = 0.1
"""Share of the captions that are dropped in the denoiser's training."""

MEASURED_SCALES = (1.0, 3.0)
"""Guidance scales that the denoiser is measured at after each cycle."""

MEASURED = "measured.json"
"""In the folder of a finished stage: the shares of prompts that it fulfils."""

LATENT_SIZE = IMAGE_SIZE // 4
_BYTES = (*range(33, 127), *range(161, 173), *range(174, 256))  # the bytes that CLIP writes as themselves


def _join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each of these words one token, the commonest pair first."""
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for parts in pieces for pair in pairwise(parts)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = [_join(parts, best) for parts in pieces]
    return merges


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of our own: every caption word is one token, any other word several.

    As in CLIP, all bytes are in the vocabulary, alone and at the end of a word, so that no word is unknown.
    """
    characters = [chr(byte) for byte in _BYTES] + [chr(256 + i) for i in range(256 - len(_BYTES))]
    merges = word_merges(vocabulary())
    specials = ["<|startoftext|>", "<|endoftext|>", "<|pad|>"]
    tokens = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges), *specials]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,  # type: ignore[arg-type]  # pairs, as the tokenizers library takes them
        pad_token="<|pad|>",
        model_max_length=MAX_TOKENS,
    )


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (N, 24), padded and truncated as diffusers does it."""
    encoded = tokenizer(
        list(prompts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


def _new_text_encoder(kind: Any, tokenizer: CLIPTokenizer, width: int) -> Any:
    """An untrained text encoder of three layers; embeddings start large enough to tell words apart."""
    encoder = kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=3,
            num_attention_heads=width // 32,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=width,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, parameter in encoder.named_parameters():
        if "embedding.weight" in name:
            nn.init.normal_(parameter, std=0.5)
    return encoder


class SD21Denoiser(nn.Module):
    """UNet and text encoder of the small Stable Diffusion 2.1, as they are trained together.

    Block types as in SD 2.1, on three levels instead of four: cross-attention at 8 x 8 and 4 x 4 and in the middle,
    plain blocks at 2 x 2. Its children are named as the pipeline's components.
    """

    prediction_type = "v_prediction"
    empty_prompt: Tensor

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = _new_text_encoder(CLIPTextModel, tokenizer, 64)
        self.unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64, 160),
            layers_per_block=1,
            attention_head_dim=(2, 4, 8),  # numbers of heads, in spite of the name
            cross_attention_dim=64,
            use_linear_projection=True,
            norm_num_groups=16,
        )
        self.register_buffer("empty_prompt", tokenize(tokenizer, [""]), persistent=False)

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, dropped: Tensor, time_ids: Tensor) -> Tensor:
        """Predicted velocity (B, 4, 8, 8).

        Args:
            noisy: (B, 4, 8, 8). timesteps: (B,). ids: (B, 24) tokens. dropped: (B,) bool, captions to be replaced by
                the empty prompt. time_ids: not used by this model.
        """
        context = self.text_encoder(torch.where(dropped[:, None], self.empty_prompt, ids)).last_hidden_state
        prediction: Tensor = self.unet(noisy, timesteps, context).sample
        return prediction

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
        """The diffusers pipeline around this denoiser."""
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=tokenizer,
            unet=self.unet,
            scheduler=new_scheduler(self.prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class SDXLDenoiser(nn.Module):
    """UNet and both text encoders of the small SDXL, as they are trained together.

    Block types as in SDXL, on two levels instead of three: plain at 8 x 8, transformers of two layers at 4 x 4 and in
    the middle. The context is the last but one layer of both encoders side by side; the second one's pooled output
    and the sizes go in beside the timestep. Its children are named as the pipeline's components.
    """

    prediction_type = "epsilon"

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = _new_text_encoder(CLIPTextModel, tokenizer, 64)
        self.text_encoder_2 = _new_text_encoder(CLIPTextModelWithProjection, tokenizer, 64)
        self.unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 96),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),  # numbers of heads, in spite of the name
            cross_attention_dim=64 + 64,
            use_linear_projection=True,
            norm_num_groups=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=64 + 6 * 32,
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, dropped: Tensor, time_ids: Tensor) -> Tensor:
        """Predicted noise (B, 4, 8, 8).

        Args:
            noisy: (B, 4, 8, 8). timesteps: (B,). ids: (B, 24) tokens. dropped: (B,) bool, captions to be replaced by
                zeros, as the pipeline does for the empty prompt. time_ids: (B, 6), see :func:`size_conditioning`.
        """
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        kept = (~dropped).to(noisy.dtype)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1) * kept[:, None, None]
        added = {"text_embeds": second.text_embeds * kept[:, None], "time_ids": time_ids}
        prediction: Tensor = self.unet(noisy, timesteps, context, added_cond_kwargs=added).sample
        return prediction

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
        """The diffusers pipeline around this denoiser."""
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=self.unet,
            scheduler=new_scheduler(self.prediction_type),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )


Denoiser = SD21Denoiser | SDXLDenoiser
_DENOISERS: dict[ModelName, type[SD21Denoiser] | type[SDXLDenoiser]] = {"sd21": SD21Denoiser, "sdxl": SDXLDenoiser}
_PLAIN_SIZES = (IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE)


def new_scheduler(prediction_type: str) -> DDIMScheduler:
    """Stable Diffusion's noise schedule (1,000 timesteps, scaled linear betas) for a DDIM sampler."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def size_conditioning(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What SDXL learns its sizes from: of the images 15 % from a small original, 15 % cropped, the others as they are.

    Args:
        images: (N, 3, 32, 32) uint8.

    Returns:
        ``(images, time_ids)``: uint8 like the given images, and (N, 6) float: original height and width, top and left
        of the crop, target height and width.
    """
    generator = torch.Generator().manual_seed(seed)
    result = images.clone()
    time_ids = torch.tensor(_PLAIN_SIZES, dtype=torch.float32).repeat(len(images), 1)
    kinds = torch.rand(len(images), generator=generator)
    for i in (kinds < 0.3).nonzero().flatten().tolist():
        if kinds[i] < 0.15:
            side = int(torch.randint(16, 29, (), generator=generator))
            image = _resized(_resized(images[i], side), IMAGE_SIZE)
            time_ids[i, :2] = side
        else:
            top, left = torch.randint(1, 5, (2,), generator=generator).tolist()
            image = _resized(images[i], IMAGE_SIZE + 4)[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
            time_ids[i, 2:4] = torch.tensor([top, left])
        result[i] = image.round().clamp(0, 255).to(torch.uint8)
    return result, time_ids


def _resized(image: Tensor, side: int) -> Tensor:
    return F.interpolate(image[None].float(), size=(side, side), mode="bilinear", antialias=True)[0]


def train_denoiser(
    denoiser: Denoiser,
    mean: Tensor,
    std: Tensor,
    ids: Tensor,
    time_ids: Tensor,
    scaling_factor: float,
    steps: int,
    learning_rate: float,
    batch_size: int = BATCH_SIZE,
    caption_dropout: float = CAPTION_DROPOUT,
    ema_decay: float = 0.999,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    compiled: bool = False,
) -> Denoiser:
    """Train UNet and text encoders for one cycle; returns the exponential moving average of their weights.

    The average's decay rises to ``ema_decay``; 0.999 is reached after 4,994 steps.

    Args:
        denoiser: where to start; is changed.
        mean, std: (N, 4, 8, 8), the autoencoder's posteriors; a latent is drawn anew at every use.
        ids: (N, 24), the captions' tokens. time_ids: (N, 6).
        checkpoint: with one there, training goes on from it exactly.
        compiled: compile, and compute in bfloat16 where the processor has instructions for it. With AMX that is 1.3 times
            as fast, after some minutes.

    Raises:
        CheckpointError: if the checkpoint is damaged or of other settings. WriteError: if it cannot be written.
    """
    torch.manual_seed(seed)
    denoiser.train()
    forward = torch.compile(denoiser, dynamic=False) if compiled else denoiser
    fast = torch.autocast("cpu", torch.bfloat16, enabled=compiled and has_fast_bfloat16())

    def predict(noisy: Tensor, timesteps: Tensor, indices: Tensor, dropped: Tensor) -> Tensor:
        with fast:
            prediction: Tensor = forward(noisy, timesteps, ids[indices], dropped, time_ids[indices])
        return prediction.float()

    # the backward pass of the fused attention is slow in bfloat16
    with sdpa_kernel(SDPBackend.MATH) if compiled else nullcontext():
        ema: Any = train_cycle(
            denoiser,
            predict,
            new_scheduler(denoiser.prediction_type),
            mean,
            std,
            scaling_factor,
            steps,
            batch_size,
            learning_rate,
            caption_dropout,
            ema_decay,
            ema_lag=6,
            seed=seed,
            checkpoint=checkpoint,
        )
    trained: Denoiser = ema
    return trained


def train_reader(images: Tensor, truth: Targets, steps: int, batch_size: int = 128, seed: int = 0) -> AttributeReader:
    """Train the attribute reader, on images with a little noise, so that a generator's slight noise is no surprise.

    Args:
        images: (N, 3, 32, 32) uint8.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = AttributeReader().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = one_cycle(optimizer, 2e-3, steps)
    progress = tqdm(batches(len(images), batch_size, steps, generator), total=steps, desc="reader", mininterval=10)
    for batch in progress:
        strength = 0.06 * torch.rand(len(batch), 1, 1, 1, generator=generator)
        pixels = images[batch].float() / 127.5 - 1
        output = model(pixels + strength * torch.randn(pixels.shape, generator=generator))
        loss = reader_loss(output.logits, output.measures, Targets(truth.answers[batch], truth.measures[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return model.eval()


def reader_loss(logits: Sequence[Tensor], measures: Tensor, truth: Targets) -> Tensor:
    """Cross-entropy of every question plus squared error of every measure; an absent second object counts nowhere."""
    questions = [
        F.cross_entropy(scores, answers, reduction="sum") / (answers >= 0).sum().clamp(min=1)
        for scores, answers in zip(logits, truth.answers.unbind(dim=1))
    ]
    known = ~truth.measures.isnan()
    return torch.stack(questions).sum() + 4 * F.mse_loss(measures[known], truth.measures[known])


def shares_fulfilled(reader: AttributeReader, images: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of the images in which everything is there that the scene's caption asks for, by its number of objects.

    Args:
        images: (N, 3, 32, 32), float in [-1, 1] or uint8.
    """
    found = fulfilled(reader, images, scenes).double()
    counts = torch.tensor([len(scene.objects) for scene in scenes])
    groups = {"one object": counts == 1, "two objects": counts == 2}
    return {name: found[group].mean().item() for name, group in groups.items() if group.any()}


def measure_denoiser(
    denoiser: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, reader: AttributeReader, num_samples: int = 500
) -> dict[str, dict[str, float]]:
    """:func:`shares_fulfilled` of samples (20 DDIM steps) for held-out captions, without and with guidance.

    Args:
        denoiser: is frozen by this.

    Returns:
        ``{"scale 1": shares, "scale 3": shares}``.
    """
    base = base_from_pipeline(denoiser.pipeline(vae, tokenizer))
    scenes = make_scenes(HELD_OUT_SEED, num_samples)[1]
    shares = {}
    for scale in MEASURED_SCALES:
        guidance = CFG(scale)  # one pass a step at scale 1
        latents = generate(base, [caption(scene) for scene in scenes], guidance, 20, progress=f"scale {scale:g}")
        images = torch.cat([base.decode(batch) for batch in latents])
        shares[f"scale {scale:g}"] = shares_fulfilled(reader, images * 2 - 1, scenes)
    return shares


def measure_autoencoder(vae: AutoencoderKL, reader: AttributeReader, num_images: int) -> dict[str, dict[str, float]]:
    """:func:`shares_fulfilled` of held-out scenes as they are, and as the autoencoder gives them back.

    Returns:
        ``{"real images": shares, "reconstructions": shares}``.
    """
    images, scenes = make_scenes(HELD_OUT_SEED, num_images)
    with torch.no_grad():
        chunks = [vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode() for chunk in images.split(500)]
        again = torch.cat([vae.decode(chunk).sample.clamp(-1, 1) for chunk in chunks])
    return {
        "real images": shares_fulfilled(reader, images, scenes),
        "reconstructions": shares_fulfilled(reader, again, scenes),
    }


def _measured(folder: Path, measurement: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured on a finished stage; measured now if it was not, kept in its folder, and printed."""
    file = folder / MEASURED
    if not file.exists():
        write_json(file, measurement())
    shares = read_json(file, CheckpointError, "record of measurements")
    for name, groups in shares.items():
        said = ", ".join(f"{group} {share:.3f}" for group, share in groups.items())
        print(f"{folder.name}, {name}: {said} of the prompts fulfilled", flush=True)
    return shares


def _save(model: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    """Save one model, or the parts of a denoiser in a folder each, with the settings of its training."""
    if not isinstance(model, Denoiser):
        save_model(model, folder, settings)
        return
    with writing(folder) as temporary:
        for name, part in model.named_children():
            part.save_pretrained(temporary / name)  # type: ignore[operator]
        write_json(temporary / SETTINGS, dict(settings))


def _load_parts(denoiser: Denoiser, folder: Path) -> Denoiser:
    """Replace the denoiser's parts by saved ones, one folder for each."""
    for name, part in list(denoiser.named_children()):
        loaded = type(part).from_pretrained(folder / name, use_safetensors=True, local_files_only=True)  # type: ignore[attr-defined]
        setattr(denoiser, name, loaded)
    return denoiser


def _stage(
    name: str, output: Path, shared: Path, work: Path, settings: Mapping[str, Any], train: Callable[[], Any]
) -> Path:
    """The folder of a finished stage: in ``output``, in ``work``, or in ``shared`` if it was trained with these settings.

    It is trained, in ``work``, if it is nowhere.
    """
    folder = output / name if (output / name).exists() else work / name
    if not folder.exists() and (shared / name / SETTINGS).is_file():
        kept = read_json(shared / name / SETTINGS, CheckpointError, "record of a training's settings")
        folder = shared / name if kept == dict(settings) else folder
    if not folder.exists():
        _save(train(), folder, settings)
    check_settings(folder, settings)
    return folder


def build_tiny_text(
    model: ModelName,
    output: Path,
    num_images: int = 100_000,
    reader_steps: int = 5_000,
    vae_steps: int = 1_200,
    cycles: Sequence[Cycle] | None = None,
    num_reference: int = 5_000,
    work: Path = ROOT / "runs" / "build" / "tiny-text",
    shared: Path = DATA / "scenes",
    num_samples: int = 500,
    compiled: bool = True,
) -> None:
    """Train autoencoder, reader, denoiser and text encoders, and save them as ``output``, a diffusers pipeline folder.

    Every stage is measured by the share of held-out prompts that it fulfils. A stage keeps its settings
    (``training.json``) and its measurements (``measured.json``) in its folder; ``output`` gets all of them, and a model
    card (``README.md``). A finished ``output`` is left as it is; an unfinished one is replaced when all is done, with
    whatever else lies in it.

    Args:
        model: ``"sd21"`` or ``"sdxl"``.
        cycles: by default the model's :data:`TEXT_CYCLES`. num_reference: images of the reference.
        work: where unfinished work is kept.
        shared: where the autoencoder and the reader of both models are taken from, if they were trained with these settings.
        num_samples: samples for each measurement of the denoiser.
        compiled: see :func:`train_denoiser`; short trainings are faster without.

    Raises:
        CheckpointError: if ``output`` or a stage was trained with other settings. WriteError: if the disk is full.
    """
    cycles = TEXT_CYCLES[model] if cycles is None else cycles
    settings = {
        "model": model,
        "num_images": num_images,
        "reader_steps": reader_steps,
        "vae_steps": vae_steps,
        "cycles": [list(cycle) for cycle in cycles],
        "batch_size": BATCH_SIZE,
        "num_reference": num_reference,
    }
    if (output / "model_index.json").exists():
        check_settings(output, settings)
        print(f"{output} is finished: nothing to do", flush=True)
        return
    images, scenes = make_scenes(TRAIN_SEED, num_images)
    first_vae = DATA / "tiny-dit" / "vae"
    vae_folder = _stage(
        "vae",
        output,
        shared,
        work,
        {"num_images": num_images, "steps": vae_steps, "start": weights_hash(first_vae)},
        lambda: train_vae(images, vae_steps, start=load_local(AutoencoderKL, first_vae), learning_rate=1e-3),
    )
    reader_folder = _stage(
        "extractor",
        output,
        shared,
        work,
        {"num_images": num_images, "steps": reader_steps},
        lambda: train_reader(images, targets(scenes), reader_steps),
    )
    vae = load_local(AutoencoderKL, vae_folder)
    features = AttributeFeatures(reader_folder)
    reader = features.model
    measured = _measured(vae_folder, lambda: measure_autoencoder(vae, reader, 10 * num_samples))
    tokenizer = new_tokenizer()
    folders = _train_cycles(model, vae_folder, tokenizer, images, [caption(s) for s in scenes], cycles, work, compiled)
    for number, (folder, denoiser) in enumerate(folders, start=1):
        shares = _measured(folder, lambda: measure_denoiser(denoiser, vae, tokenizer, reader, num_samples))  # noqa: B023
        measured |= {f"samples after cycle {number}, {name}": value for name, value in shares.items()}
    chunks = make_scenes(REFERENCE_SEED, num_reference)[0].split(500)
    rows = torch.cat([features(to_unit(chunk))[0] for chunk in chunks])
    pipeline = denoiser.pipeline(vae, new_tokenizer())  # one that was used is saved otherwise, with its last padding
    with writing(output) as temporary:
        if output.exists():
            shutil.copytree(output, temporary)
        pipeline.save_pretrained(temporary)
        for name in pipeline.components:
            if name.startswith("tokenizer"):  # beside tokenizer.json, the files that every version of CLIP's reads
                pipeline.components[name].backend_tokenizer.model.save(str(temporary / name))
        for folder in (vae_folder, reader_folder):
            shutil.copytree(folder, temporary / folder.name, dirs_exist_ok=True)
        save_reference(temporary / "reference.safetensors", rows, features.name)
        write_json(temporary / SETTINGS, settings)
        write_json(temporary / MEASURED, measured)
        (temporary / "README.md").write_text(_model_card(settings, measured, num_samples), encoding="utf-8")
        forget_paths(temporary)


def with_wrong_captions(ids: Tensor, share: float, seed: int) -> Tensor:
    """Tokens (N, 24) of which a share of the rows, drawn by seed, are those of another row that was drawn."""
    drawn = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[: round(share * len(ids))]
    result = ids.clone()
    result[drawn] = ids[drawn.roll(1)]
    return result


def _train_cycles(
    model: ModelName,
    vae_folder: Path,
    tokenizer: CLIPTokenizer,
    images: Tensor,
    captions: Sequence[str],
    cycles: Sequence[Cycle],
    work: Path,
    compiled: bool,
) -> Iterator[tuple[Path, Denoiser]]:
    """Folder and denoiser after each cycle; finished ones are kept in ``work`` and not repeated."""
    torch.manual_seed(0)
    denoiser: Denoiser = _DENOISERS[model](tokenizer)
    settings: dict[str, Any] = {
        "num_images": len(images),
        "batch_size": BATCH_SIZE,
        "vae": weights_hash(vae_folder),
        "architecture": _architecture(denoiser),
    }
    data: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for i, (steps, learning_rate, wrong) in enumerate(cycles):
        folder = work / model / f"cycle-{i + 1}"
        settings["cycles"] = [list(cycle) for cycle in cycles[: i + 1]]
        if not folder.exists():
            vae = load_local(AutoencoderKL, vae_folder)
            if data is None:
                time_ids = torch.tensor(_PLAIN_SIZES, dtype=torch.float32).repeat(len(images), 1)
                if model == "sdxl":
                    images, time_ids = size_conditioning(images, TRAIN_SEED)
                mean, std = encode_all(vae, images)
                data = mean, std, tokenize(tokenizer, captions), time_ids
            mean, std, ids, time_ids = data
            checkpoint = Checkpoint(work / model / f"cycle-{i + 1}-unfinished", settings)
            factor = vae.config.scaling_factor
            ids = with_wrong_captions(ids, wrong, seed=i)
            trained = train_denoiser(
                denoiser,
                mean,
                std,
                ids,
                time_ids,
                factor,
                steps,
                learning_rate,
                seed=i,
                checkpoint=checkpoint,
                compiled=compiled,
            )
            _save(trained, folder, settings)
            checkpoint.remove()
        check_settings(folder, settings)
        denoiser = _load_parts(_DENOISERS[model](tokenizer), folder)
        yield folder, copy.deepcopy(denoiser).eval()


def _architecture(denoiser: Denoiser) -> str:
    """A digest that tells denoisers of other sizes apart."""
    config = {name: value for name, value in denoiser.unet.config.items() if not name.startswith("_")}
    return hashlib.sha256((repr(denoiser) + json.dumps(config, sort_keys=True)).encode()).hexdigest()[:16]


_TITLES: dict[ModelName, str] = {"sd21": "Stable Diffusion 2.1", "sdxl": "SDXL"}


def _model_card(settings: Mapping[str, Any], measured: Mapping[str, Mapping[str, float]], num_samples: int) -> str:
    model: ModelName = settings["model"]
    cycles = ", ".join(
        f"{steps:,} (peak learning rate {rate:g}{f', {wrong:.0%} of the captions wrong' if wrong else ''})"
        for steps, rate, wrong in settings["cycles"]
    )
    rows = []
    for name, shares in measured.items():
        cells = (f"{shares[group]:.1%}" if group in shares else "" for group in ("one object", "two objects"))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(rows)
    return f"""---
library_name: diffusers
license: mit
tags: [text-to-image]
---
# tiny-{model}

A small text-to-image model, built like {_TITLES[model]} and trained by this repository, so that guidance and its
distillation can be studied on two CPU cores. It draws one or two objects at 32 x 32 pixels; a prompt asks for their
shapes, and for colours, sizes, places and background or for some of them (`agd_lib.scenes`).

It predicts {_DENOISERS[model].prediction_type}; {CAPTION_DROPOUT:.0%} of the captions were dropped in training. `extractor`
is the network that samples are measured with (`agd_lib.attributes`), `reference.safetensors` holds its features of
{settings["num_reference"]:,} real images.

Share of held-out prompts (scenes of seed {HELD_OUT_SEED}) of which everything is in the picture, as the extractor reads it: {10 * num_samples:,} pictures,
{num_samples:,} samples of each cycle (DDIM, 20 steps, noise of seed 0), one training (seed 0). `docs/results.md` has the finished model from
three seeds of noise.

| | one object | two objects |
|---|---|---|
{table}

Made by `python -m agd_lib.tiny_text {model} --output data/tiny-{model}`: {settings["num_images"]:,} images,
{settings["vae_steps"]:,} steps for the autoencoder (which began as tiny-dit's), {settings["reader_steps"]:,} for the extractor, and for UNet and text
encoders cycles of {cycles} steps of {settings["batch_size"]} images.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(_DENOISERS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=100_000)
    parser.add_argument("--reader-steps", type=int, default=5_000)
    parser.add_argument("--vae-steps", type=int, default=1_200)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "build" / "tiny-text", help="unfinished work")
    arguments = parser.parse_args()
    build_tiny_text(
        arguments.model,
        arguments.output,
        arguments.num_images,
        arguments.reader_steps,
        arguments.vae_steps,
        work=arguments.work,
    )


if __name__ == "__main__":
    main()
