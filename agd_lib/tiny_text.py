"""Trains the small text-to-image models: ``python -m agd_lib.tiny_text sd21 --output data/tiny-sd21`` (or ``sdxl``).

True small analogues of Stable Diffusion 2.1 and SDXL, on the captioned scenes of :mod:`agd_lib.scenes`: the same block
types, conditioning and prediction type, saved as ``StableDiffusionPipeline`` and ``StableDiffusionXLPipeline`` folders.
Their text encoders have a vocabulary of their own and are trained together with the UNet. Each stage is written whole
or not at all, and a stage that is already there is not repeated, so an interrupted build resumes.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from collections import Counter
from collections.abc import Sequence
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
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .attributes import AttributeFeatures, AttributeReader, Targets, fulfilled, targets
from .evaluation import save_reference
from .project import ROOT
from .scenes import caption, make_scenes, vocabulary
from .shapes import IMAGE_SIZE
from .storage import writing
from .tiny import HELD_OUT_SEED, REFERENCE_SEED, TRAIN_SEED, batches, encode_all, one_cycle, to_unit, train_vae

ModelName = Literal["sd21", "sdxl"]

MAX_TOKENS = 24
"""Length of every tokenised prompt, start and end included; the longest caption has 18."""

TEXT_CYCLES: tuple[tuple[int, float], ...] = ((8_000, 1e-3), (8_000, 8e-4), (8_000, 6e-4))
"""(steps, peak learning rate) of the denoiser's one-cycle schedules, one after another."""

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
            block_out_channels=(32, 96),
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


def min_snr_weights(alphas_cumprod: Tensor, prediction_type: str, gamma: float = 5.0) -> Tensor:
    """Weight of each timestep's squared error, (T,): min-SNR weighting (arXiv 2303.09556).

    In terms of the clean latents the weight is min(SNR, gamma). An error of the noise is SNR times, and an error of
    the velocity SNR + 1 times that of the clean latents.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


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
    batch_size: int = 64,
    caption_dropout: float = 0.1,
    ema_decay: float = 0.999,
    seed: int = 0,
) -> Denoiser:
    """Train UNet and text encoders for one cycle; returns the exponential moving average of their weights.

    Args:
        denoiser: where to start; is changed.
        mean, std: (N, 4, 8, 8), the autoencoder's posteriors; a latent is drawn anew at every use.
        ids: (N, 24), the captions' tokens. time_ids: (N, 6).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    scheduler = new_scheduler(denoiser.prediction_type)
    weights = min_snr_weights(scheduler.alphas_cumprod, denoiser.prediction_type)
    denoiser.train()
    ema = copy.deepcopy(denoiser).eval()
    optimizer = torch.optim.AdamW(denoiser.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    schedule = one_cycle(optimizer, learning_rate, steps)
    progress = tqdm(batches(len(mean), batch_size, steps, generator), total=steps, desc="denoiser", mininterval=10)
    for step, batch in enumerate(progress, start=1):
        posterior_noise, noise = (torch.randn(mean[batch].shape, generator=generator) for _ in range(2))
        latents: Any = (mean[batch] + std[batch] * posterior_noise) * scaling_factor
        timesteps: Any = torch.randint(len(weights), (len(batch),), generator=generator)
        dropped = torch.rand(len(batch), generator=generator) < caption_dropout
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if denoiser.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        prediction = denoiser(noisy, timesteps, ids[batch], dropped, time_ids[batch])
        loss = (weights[timesteps] * (prediction - target).square().mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(denoiser.parameters()), 1 - decay)
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return ema


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
    questions = [F.cross_entropy(scores, answers) for scores, answers in zip(logits, truth.answers.unbind(dim=1))]
    known = ~truth.measures.isnan()
    return torch.stack(questions).sum() + 4 * F.mse_loss(measures[known], truth.measures[known])


def _save(model: Any, folder: Path) -> None:
    with writing(folder) as temporary:
        model.save_pretrained(temporary)


def _copy(source: Path, folder: Path) -> None:
    with writing(folder) as temporary:
        shutil.copytree(source, temporary)


def _load_parts(denoiser: Denoiser, folder: Path) -> None:
    """Replace the denoiser's parts by saved ones, one folder for each."""
    for name, part in list(denoiser.named_children()):
        setattr(denoiser, name, type(part).from_pretrained(folder / name))  # type: ignore[attr-defined]


def _save_parts(denoiser: Denoiser, folder: Path) -> None:
    with writing(folder) as temporary:
        for name, part in denoiser.named_children():
            part.save_pretrained(temporary / name)  # type: ignore[operator]


def build_tiny_text(
    model: ModelName,
    output: Path,
    num_images: int = 100_000,
    reader_steps: int = 5_000,
    vae_steps: int = 3_600,
    cycles: Sequence[tuple[int, float]] = TEXT_CYCLES,
    num_reference: int = 5_000,
    work: Path = ROOT / "runs" / "build" / "tiny-text",
) -> None:
    """Train autoencoder, reader, denoiser and text encoders, and save them as ``output``, a diffusers pipeline folder.

    Args:
        model: ``"sd21"`` or ``"sdxl"``.
        cycles: see :data:`TEXT_CYCLES`. num_reference: images of the reference.
        work: where unfinished work is kept; autoencoder and reader in it serve both models.
    """
    output.mkdir(parents=True, exist_ok=True)
    images, scenes = make_scenes(TRAIN_SEED, num_images)
    for name in ("vae", "extractor"):
        if not (work / name).exists():
            if name == "vae":
                _save(train_vae(images, vae_steps), work / name)
            else:
                reader = train_reader(images, targets(scenes), reader_steps)
                held_out = fulfilled(reader, *make_scenes(HELD_OUT_SEED, 5_000))
                print(f"reader: prompt accuracy {held_out.double().mean():.4f} on held-out images", flush=True)
                _save(reader, work / name)
        if not (output / name).exists():
            _copy(work / name, output / name)
    if not (output / "reference.safetensors").exists():
        features = AttributeFeatures(output / "extractor")
        chunks = make_scenes(REFERENCE_SEED, num_reference)[0].split(500)
        rows = torch.cat([features(to_unit(chunk))[0] for chunk in chunks])
        save_reference(output / "reference.safetensors", rows, features.name)
    vae = AutoencoderKL.from_pretrained(output / "vae")
    tokenizer = new_tokenizer()
    denoiser: Denoiser = _train_cycles(model, vae, tokenizer, images, [caption(s) for s in scenes], cycles, work)
    pipeline = denoiser.pipeline(vae, tokenizer)
    pipeline.save_pretrained(output)
    for name in pipeline.components:
        if name.startswith("tokenizer"):  # beside tokenizer.json, the two files that every version of CLIP's reads
            pipeline.components[name].backend_tokenizer.model.save(str(output / name))


def _train_cycles(
    model: ModelName,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    images: Tensor,
    captions: Sequence[str],
    cycles: Sequence[tuple[int, float]],
    work: Path,
) -> Denoiser:
    """The denoiser after the last cycle; finished cycles are kept in ``work`` and not repeated."""
    torch.manual_seed(0)
    denoiser: Denoiser = _DENOISERS[model](tokenizer)
    folders = [work / model / f"cycle-{i}" for i in range(len(cycles))]
    done = max((i + 1 for i, folder in enumerate(folders) if folder.exists()), default=0)
    if done:
        _load_parts(denoiser, folders[done - 1])
    if done == len(cycles):
        return denoiser.eval()
    time_ids = torch.tensor(_PLAIN_SIZES, dtype=torch.float32).repeat(len(images), 1)
    if model == "sdxl":
        images, time_ids = size_conditioning(images, TRAIN_SEED)
    mean, std = encode_all(vae, images)
    ids = tokenize(tokenizer, captions)
    for i in range(done, len(cycles)):
        steps, learning_rate = cycles[i]
        denoiser = train_denoiser(
            denoiser, mean, std, ids, time_ids, vae.config.scaling_factor, steps, learning_rate, seed=i
        )
        _save_parts(denoiser, folders[i])
    return denoiser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(_DENOISERS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=100_000)
    parser.add_argument("--reader-steps", type=int, default=5_000)
    parser.add_argument("--vae-steps", type=int, default=3_600)
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
