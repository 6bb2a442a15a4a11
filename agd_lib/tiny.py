"""Trains the small models that ``data/`` ships: ``python -m agd_lib.tiny dit --output data/tiny-dit``.

A true small analogue of DiT-XL/2: an ``AutoencoderKL`` of its own, a ``DiTTransformer2DModel`` on its latents with
label dropout and a null class, and a ``DDIMScheduler``, saved as a diffusers ``DiTPipeline`` folder. Each stage is
written whole or not at all, and a stage that is already there is not repeated, so an interrupted build resumes.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from .cycles import (
    Checkpoint,
    batches,
    check_settings,
    forget_paths,
    has_fast_bfloat16,
    one_cycle,
    save_model,
    train_cycle,
)
from .evaluation import ShapesFeatures, save_reference
from .extractor import ShapesExtractor
from .project import ROOT
from .shapes import IMAGE_SIZE, SHAPES, draw_scene, iter_images, make_images

TRAIN_SEED, HELD_OUT_SEED, REFERENCE_SEED = 1, 2, 3
"""Seeds of the images for training, for the extractor's accuracy, and for the reference that samples are compared to."""

NUM_REFERENCE = 5_000
"""Images of the reference."""

DIT_CYCLES: tuple[tuple[int, int, float], ...] = (
    (6, 6_000, 2e-3),
    (6, 4_000, 1.5e-3),
    (6, 8_000, 1.2e-3),
    (9, 6_000, 1e-3),
)
"""(blocks, steps, peak learning rate) of the denoiser's one-cycle schedules, one after another: see :func:`grown`."""


def scene_attributes(seed: int, count: int) -> Tensor:
    """The nine attributes that the extractor learns, (count, 9); see ``ExtractorOutput.attributes``."""
    rows = []
    for index in range(count):
        scene = draw_scene(seed, index)
        background = np.mean(scene.background_rgb, axis=0)
        rows.append(
            [
                *(np.asarray(scene.foreground_rgb) / 127.5 - 1),
                *(background / 127.5 - 1),
                *(2 * v / IMAGE_SIZE - 1 for v in (scene.x, scene.y)),
                scene.radius / IMAGE_SIZE,
            ]
        )
    return torch.tensor(rows, dtype=torch.float32)


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def to_unit(images: Tensor) -> Tensor:
    """Bytes (B, 3, H, W) as floats in [0, 1], as feature extractors take them."""
    return images.float() / 255


def train_extractor(
    images: Tensor, labels: Tensor, attributes: Tensor, steps: int, batch_size: int = 128, seed: int = 0
) -> ShapesExtractor:
    """Train the feature extractor on class and attributes.

    Args:
        images: (N, 3, 32, 32) uint8. labels: (N,) int64. attributes: (N, 9) float.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ShapesExtractor().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = one_cycle(optimizer, 2e-3, steps)
    progress = tqdm(batches(len(images), batch_size, steps, generator), total=steps, desc="extractor", mininterval=10)
    for batch in progress:
        output = model(images[batch])
        loss = F.cross_entropy(output.logits, labels[batch]) + 4 * F.mse_loss(output.attributes, attributes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return model.eval()


@torch.no_grad()
def extractor_accuracy(model: ShapesExtractor, images: Tensor, labels: Tensor) -> float:
    """Share of images whose class the extractor reads rightly."""
    predictions = torch.cat([model(chunk).logits.argmax(1) for chunk in images.split(500)])
    return (predictions == labels).float().mean().item()


def new_vae() -> AutoencoderKL:
    """The untrained autoencoder: 3 x 32 x 32 -> 4 x 8 x 8, 0.8 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def train_vae(
    images: Tensor,
    steps: int,
    batch_size: int = 48,
    seed: int = 0,
    kl_weight: float = 1e-4,
    start: AutoencoderKL | None = None,
    learning_rate: float = 2e-3,
) -> AutoencoderKL:
    """Train the autoencoder: squared error plus a light Kullback-Leibler term; the latents' scale is then measured.

    Args:
        images: (N, 3, 32, 32) uint8.
        kl_weight: weight of the KL divergence per latent value against the squared error per pixel value.
        start: an autoencoder to go on from; is changed. By default a new one. learning_rate: peak.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = (new_vae() if start is None else start).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0)
    schedule = one_cycle(optimizer, learning_rate, steps)
    progress = tqdm(batches(len(images), batch_size, steps, generator), total=steps, desc="autoencoder", mininterval=10)
    for batch in progress:
        x = _to_float(images[batch]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            posterior = vae.encode(x).latent_dist
            reconstruction = vae.decode(posterior.sample(generator)).sample
        mse = F.mse_loss(reconstruction.float(), x)
        loss = mse + kl_weight * posterior.kl().float().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(psnr=f"{10 * np.log10(4 / mse.item()):.1f} dB", refresh=False)
    vae = vae.eval().to(memory_format=torch.contiguous_format)
    mean, std = encode_all(vae, images[:4000])
    vae.register_to_config(scaling_factor=float(1 / (mean + std * torch.randn(std.shape, generator=generator)).std()))
    return vae


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of all images, each (N, 4, 8, 8), unscaled."""
    posteriors = [
        vae.encode(_to_float(chunk)).latent_dist for chunk in tqdm(images.split(500), desc="encode", mininterval=10)
    ]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def new_dit(num_layers: int = DIT_CYCLES[-1][0]) -> DiTTransformer2DModel:
    """The untrained denoiser: width 128, patch 2, classes 0-19 and the null class 20.

    As in DiT, every adaptive layer norm starts at zero (adaLN-Zero), and one timestep-and-label embedder serves all
    blocks (diffusers gives each block a copy of it; here the copies are one module while training).
    """
    dit = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        sample_size=IMAGE_SIZE // 4,
        patch_size=2,
        num_embeds_ada_norm=len(SHAPES),
    )
    shared = dit.transformer_blocks[0].norm1.emb
    nn.init.normal_(shared.class_embedder.embedding_table.weight, std=0.5)
    for block in dit.transformer_blocks:
        block.norm1.emb = shared
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (dit.proj_out_1, dit.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return dit


def grown(dit: DiTTransformer2DModel, num_layers: int) -> DiTTransformer2DModel:
    """A deeper denoiser, ready for training, that computes what ``dit`` computes: the new blocks start as identities.

    The old blocks are spread evenly over the new depth. A short training is spent on a shallow model at first, where a
    step costs less, and goes on with a deep one.

    Args:
        dit: with at most ``num_layers`` blocks; is not changed.
    """
    deep = new_dit(num_layers)
    state = {name: value for name, value in dit.state_dict().items() if not name.startswith("transformer_blocks.")}
    for index, block in enumerate(dit.transformer_blocks):
        place = index * num_layers // len(dit.transformer_blocks)
        state |= {f"transformer_blocks.{place}.{name}": value for name, value in block.state_dict().items()}
    embedder = dit.transformer_blocks[0].norm1.emb.state_dict()
    for place in range(num_layers):  # one module in ``deep``, named once for each of its blocks
        state |= {f"transformer_blocks.{place}.norm1.emb.{name}": value for name, value in embedder.items()}
    deep.load_state_dict(deep.state_dict() | state)
    return deep


def new_scheduler() -> DDIMScheduler:
    """DiT-XL/2's noise schedule: 1,000 timesteps, linear betas, epsilon prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", clip_sample=False, timestep_spacing="leading"
    )


def train_dit(
    mean: Tensor,
    std: Tensor,
    labels: Tensor,
    scaling_factor: float,
    steps: int,
    batch_size: int = 192,
    learning_rate: float = 2e-3,
    label_dropout: float = 0.1,
    ema_decay: float = 0.999,
    seed: int = 0,
    num_layers: int = DIT_CYCLES[-1][0],
    start: DiTTransformer2DModel | None = None,
    checkpoint: Checkpoint | None = None,
    compiled: bool = False,
) -> DiTTransformer2DModel:
    """Train the denoiser on latents for one cycle; returns the exponential moving average of its weights.

    The loss is the epsilon error weighted by min(SNR, 5) / SNR (min-SNR weighting, arXiv 2303.09556), and a tenth of
    the labels is replaced by the null class, once for all blocks.

    Args:
        mean, std: (N, 4, 8, 8), the autoencoder's posteriors; a latent is drawn anew at every use.
        labels: (N,) int64.
        num_layers: blocks of the denoiser.
        start: go on from the result of an earlier cycle, of as many blocks or fewer (:func:`grown`); None for a new model.
        checkpoint: with one there, training goes on from it exactly.
        compiled: compile, and compute in bfloat16 where the processor has instructions for it: twice as fast.

    Raises:
        CheckpointError: if the checkpoint is damaged or of other settings. WriteError: if it cannot be written.
    """
    torch.manual_seed(seed)
    dit = (new_dit(num_layers) if start is None else grown(start, num_layers)).train()
    for block in dit.transformer_blocks:
        block.norm1.emb.eval()  # diffusers would drop labels here, independently in every block
    null_label = dit.config.num_embeds_ada_norm
    forward: Any = torch.compile(dit, dynamic=False) if compiled else dit
    fast = torch.autocast("cpu", torch.bfloat16, enabled=compiled and has_fast_bfloat16())

    def predict(noisy: Tensor, timesteps: Tensor, indices: Tensor, dropped: Tensor) -> Tensor:
        with fast:
            prediction: Tensor = forward(noisy, timesteps, torch.where(dropped, null_label, labels[indices])).sample
        return prediction.float()

    # the backward pass of the fused attention is slow in bfloat16
    with sdpa_kernel(SDPBackend.MATH) if compiled else nullcontext():
        ema: Any = train_cycle(
            dit,
            predict,
            new_scheduler(),
            mean,
            std,
            scaling_factor,
            steps,
            batch_size,
            learning_rate,
            label_dropout,
            ema_decay,
            ema_lag=10,
            seed=seed,
            checkpoint=checkpoint,
        )
    return _untied(ema)


def _untied(dit: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A copy with an embedder in every block, as diffusers builds and loads it."""
    dit = copy.deepcopy(dit)
    for block in dit.transformer_blocks:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    return dit


def build_tiny_dit(
    output: Path,
    num_images: int = 120_000,
    extractor_steps: int = 1_500,
    vae_steps: int = 2_400,
    dit_cycles: Sequence[tuple[int, int, float]] = DIT_CYCLES,
    work: Path = ROOT / "runs" / "build" / "tiny-dit",
) -> None:
    """Train autoencoder, denoiser and extractor, and save them as ``output`` (a ``DiTPipeline`` folder).

    Args:
        dit_cycles: see :data:`DIT_CYCLES`. work: where the denoiser is kept after each cycle.

    Raises:
        CheckpointError: if what lies in ``work`` was trained with other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    images, labels = make_images(TRAIN_SEED, num_images)
    if not (output / "vae").exists():
        save_model(train_vae(make_images(TRAIN_SEED, num_images, wide=True)[0], vae_steps), output / "vae")
    if not (output / "transformer").exists():
        vae = AutoencoderKL.from_pretrained(output / "vae", use_safetensors=True, local_files_only=True)
        mean, std = encode_all(vae, images)
        dit = None
        for cycle, (num_layers, steps, learning_rate) in enumerate(dit_cycles):
            finished = work / f"cycle-{cycle}"
            settings = {
                "num_images": num_images,
                "vae_steps": vae_steps,
                "cycles": [list(each) for each in dit_cycles[: cycle + 1]],
            }
            if finished.exists():
                check_settings(finished, settings)
                dit = DiTTransformer2DModel.from_pretrained(finished, use_safetensors=True, local_files_only=True)
                continue
            checkpoint = Checkpoint(work / f"cycle-{cycle}-unfinished", settings)
            dit = train_dit(
                mean,
                std,
                labels,
                vae.config.scaling_factor,
                steps,
                learning_rate=learning_rate,
                seed=cycle,
                num_layers=num_layers,
                start=dit,
                checkpoint=checkpoint,
                compiled=True,
            )
            save_model(dit, finished, settings)
            checkpoint.remove()
        save_model(dit, output / "transformer")
    if not (output / "extractor").exists():
        extractor = train_extractor(images, labels, scene_attributes(TRAIN_SEED, num_images), extractor_steps)
        held_out = make_images(HELD_OUT_SEED, 5_000)
        print(f"extractor: held-out accuracy {extractor_accuracy(extractor, *held_out):.4f}", flush=True)
        save_model(extractor, output / "extractor")
    if not (output / "reference.safetensors").exists():
        features = ShapesFeatures(output / "extractor")
        rows = [features(to_unit(batch))[0] for batch, _ in iter_images(REFERENCE_SEED, NUM_REFERENCE)]
        save_reference(output / "reference.safetensors", torch.cat(rows), features.name)
    pipeline = DiTPipeline(
        transformer=DiTTransformer2DModel.from_pretrained(
            output / "transformer", use_safetensors=True, local_files_only=True
        ),
        vae=AutoencoderKL.from_pretrained(output / "vae", use_safetensors=True, local_files_only=True),
        scheduler=new_scheduler(),
        id2label=dict(enumerate(SHAPES)),
    )
    pipeline.register_to_config(id2label=dict(enumerate(SHAPES)))  # diffusers itself forgets the names when it saves
    pipeline.save_pretrained(output)
    forget_paths(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["dit"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=120_000)
    parser.add_argument("--extractor-steps", type=int, default=1_500)
    parser.add_argument("--vae-steps", type=int, default=2_400)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "build" / "tiny-dit", help="unfinished work")
    arguments = parser.parse_args()
    build_tiny_dit(
        arguments.output,
        arguments.num_images,
        arguments.extractor_steps,
        arguments.vae_steps,
        work=arguments.work,
    )


if __name__ == "__main__":
    main()
