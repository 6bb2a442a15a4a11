"""Checkpoints in the authors' format, built by a second implementation of their adapters, and what is refused."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from small_models import build_dit_pipeline, randomise
from small_text_models import build_sd_pipeline, build_sdxl_pipeline
from torch import Tensor, nn

from agd_lib import AGD, AdapterSet, base_from_pipeline, convert_authors_checkpoint, sample
from agd_lib.base_models import BaseModel, DiTBase
from agd_lib.errors import AdapterError

D = 8  # the adapters' inner width

# Their adapters: the names of the layers are theirs, the arithmetic is that of the paper ----------------------------------


class Net(nn.Module):
    """A module whose layers are called ``net.0``, ``net.1`` ..."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(D))
        self.register_buffer("phases", torch.rand(D))

    def forward(self, scalar: Tensor) -> Tensor:
        return torch.cos(2 * torch.pi * (self.frequencies * scalar[:, None] + self.phases))


class TheirAdapter(nn.Module):
    def __init__(
        self,
        width: int,
        use_timestep: bool,
        use_class_label: bool,
        kind: str,
        cfg_mult: float,
        time_dim: int | None = None,
        prompt_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.cfg_mult = kind, cfg_mult
        if use_timestep:
            self.timestep_proj = nn.Linear(time_dim or width, D)
        if use_class_label:
            self.class_proj = nn.Linear(width, D)
        if prompt_dim:
            self.prompt_proj = nn.Linear(prompt_dim, D)
        if kind == "additive":
            middle = [nn.ReLU(), nn.Dropout(0.0), nn.LayerNorm(4 * D)]
            inner = Net(nn.Linear(D, 4 * D), *middle, nn.Linear(4 * D, D), nn.Dropout(0.0))
            middle = [nn.ReLU(), nn.Dropout(0.0), nn.LayerNorm(D)]
            self.out_proj: nn.Module = Net(nn.Linear(D, D), *middle, nn.Linear(D, width), nn.Dropout(0.0))
        else:
            inner = Net(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D))
            self.q_proj = nn.Linear(width, D, bias=False)
            self.k_proj = nn.Linear(D, D, bias=False)
            self.v_proj = nn.Linear(D, D, bias=False)
            self.out_proj = nn.Linear(D, width)
            self.pos_enc = nn.Module()
            angles = torch.arange(250)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2) / D)
            self.pos_enc.register_buffer("pe", torch.cat([angles.sin(), angles.cos()], dim=1))
        self.guidance_scale_embedder = Net(Waves(), inner, nn.LayerNorm(D))

    def forward(
        self,
        x: Tensor,
        scale: Tensor,
        timestep_embedding: Tensor,
        class_embedding: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> Tensor:
        codes = [self.guidance_scale_embedder(scale * self.cfg_mult if self.kind == "additive" else scale)]
        if hasattr(self, "timestep_proj"):
            codes.append(self.timestep_proj(timestep_embedding))
        if hasattr(self, "class_proj"):
            codes.append(self.class_proj(class_embedding))
        tokens = self.prompt_proj(prompt) if hasattr(self, "prompt_proj") else x.new_zeros(len(x), 0, D)
        if self.kind == "additive":
            mean = tokens.mean(dim=1) if tokens.shape[1] else 0.0
            return self.out_proj(torch.stack(codes).sum(dim=0) + mean)[:, None]
        sequence = torch.cat([torch.stack(codes, dim=1), tokens], dim=1)
        sequence = sequence + self.pos_enc.pe[: sequence.shape[1]]
        scores = torch.einsum("bnd,bsd->bns", self.q_proj(x), self.k_proj(sequence)) / math.sqrt(D)
        return self.out_proj(torch.einsum("bns,bsd->bnd", F.softmax(scores, dim=-1), self.v_proj(sequence)))


def their_adapters(
    base: DiTBase, kind: str, use_timestep: bool, use_class_label: bool, cfg_mult: float
) -> nn.ModuleList:
    torch.manual_seed(0)
    adapters = nn.ModuleList(
        TheirAdapter(site.channels, use_timestep, use_class_label, kind, cfg_mult)
        for site in base.attention_sites().values()
    )
    randomise(adapters, 5)
    return adapters.eval()


def write_checkpoint(run: Path, adapters: nn.ModuleList, config: dict[str, Any] | None = None) -> Path:
    """``checkpoints/0005000.pt`` and ``config.yaml`` as their training writes them."""
    (run / "checkpoints").mkdir(parents=True)
    path = run / "checkpoints" / "0005000.pt"
    torch.save({"model": {f"blocks.{i}.attn": adapter.state_dict() for i, adapter in enumerate(adapters)}}, path)
    if config is not None:
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def predict_by_theirs(base: DiTBase, adapters: nn.ModuleList, scale: Tensor, call: tuple) -> Tensor:
    """The base model's prediction with their adapters added to its attention layers."""
    _, timestep, condition = call
    embedder = base.denoiser.transformer_blocks[0].norm1.emb
    time = embedder.timestep_embedder(embedder.time_proj(timestep))
    label = embedder.class_embedder.embedding_table(condition["class_labels"])
    handles = [
        block.attn1.register_forward_hook(
            lambda module, args, output, adapter=adapter: output + adapter(args[0], scale, time, label)
        )
        for block, adapter in zip(base.denoiser.transformer_blocks, adapters)
    ]
    with torch.no_grad():
        prediction = base.denoise(*call)
    for handle in handles:
        handle.remove()
    return prediction


CONFIG = {"image_size": 256, "hidden_dim": D, "dropout": 0.0, "zero_init": True, "lr": 1e-4}


@pytest.fixture
def call(dit_base: DiTBase) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    latents = torch.randn(3, *dit_base.latent_shape, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([10, 400, 999]), dit_base.encode([0, 2, 4])


# Equal outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("use_timestep", "use_class_label"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("arch", "cfg_mult"), [("additive", 1000), ("additive", 1), ("attention", 1000)])
def test_converted_adapters_predict_the_same(
    dit_base: DiTBase,
    call: tuple,
    tmp_path: Path,
    arch: str,
    cfg_mult: float,
    use_timestep: bool,
    use_class_label: bool,
) -> None:
    theirs = their_adapters(dit_base, arch, use_timestep, use_class_label, cfg_mult)
    flags = {"arch": arch, "cfg_mult": cfg_mult, "use_timestep": use_timestep, "use_class_label": use_class_label}
    path = write_checkpoint(tmp_path, theirs, CONFIG | flags)
    scale = torch.tensor([1.0, 2.7, 6.0])
    expected = predict_by_theirs(dit_base, theirs, scale, call)
    plain = dit_base.denoise(*call)

    ours = convert_authors_checkpoint(path, dit_base)
    assert torch.equal(dit_base.denoise(*call), plain)  # nothing is attached yet
    with ours.attach(dit_base).guided_by(scale), torch.no_grad():
        prediction = dit_base.denoise(*call)
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().amax(dim=(1, 2, 3)).min() > 0.1

    assert ours.config.kind == {"additive": "offset", "attention": "cross-attention"}[arch]
    assert ours.config.scale_multiplier == (cfg_mult if arch == "additive" else 1)
    assert (ours.config.timestep_dim is not None, ours.config.class_dim is not None) == (use_timestep, use_class_label)
    assert ours.config.guided_channels == 3 and ours.config.guidance_range == (1.0, 6.0)
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())


def test_converted_adapters_are_adapters_like_any_other(dit_base: DiTBase, tmp_path: Path) -> None:
    theirs = their_adapters(dit_base, "attention", True, True, 1)
    ours = convert_authors_checkpoint(write_checkpoint(tmp_path / "run", theirs), dit_base, (1, 4), 4)
    assert ours.config.guidance_range == (1.0, 4.0) and ours.config.guided_channels == 4
    ours.save_pretrained(tmp_path / "ours")
    loaded = AdapterSet.from_pretrained(tmp_path / "ours").attach(dit_base)
    *_, last = sample(dit_base, dit_base.encode([0]), AGD(loaded, 3.0), 2, seeds=[0])
    ours.attach(base_from_pipeline(build_dit_pipeline()))
    assert torch.isfinite(last.next_latents).all()
    assert all(p.requires_grad for p in loaded.parameters())


def test_diffusers_site_names_are_kept(dit_base: DiTBase, tmp_path: Path) -> None:
    theirs = their_adapters(dit_base, "attention", True, True, 1)
    path = tmp_path / "0000500.pt"
    torch.save({"model": {f"transformer_blocks.{i}.attn1": a.state_dict() for i, a in enumerate(theirs)}}, path)
    assert list(convert_authors_checkpoint(path, dit_base).config.sites) == list(dit_base.attention_sites())


# UNets ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sd21", "sdxl"])
def text_base(request: pytest.FixtureRequest, tmp_path: Path) -> BaseModel:
    """A small base with the layers of SD 2.1 or SDXL."""
    build = {"sd21": build_sd_pipeline, "sdxl": build_sdxl_pipeline}[request.param]
    return base_from_pipeline(build(tmp_path / "base"), request.param)


def their_text_adapters(base: BaseModel, kind: str, use_timestep: bool, use_prompt: bool) -> dict[str, TheirAdapter]:
    """By site: every cross-attention but the last of each up block, as their code goes through a UNet."""
    unet = base.denoiser
    layers, depths = unet.config.layers_per_block, unet.config.transformer_layers_per_block
    depths = [depths] * len(unet.down_blocks) if isinstance(depths, int) else list(depths)
    places = [(f"mid_block.attentions.0.transformer_blocks.{k}", -1) for k in range(depths[-1])]
    for side, types, sizes in (
        ("down_blocks", unet.config.down_block_types, depths),
        ("up_blocks", unet.config.up_block_types, depths[::-1]),
    ):
        for i, block in enumerate(types):
            channels = i if side == "down_blocks" else len(types) - 1 - i
            for j in range(layers if "CrossAttn" in block else 0):
                places += [(f"{side}.{i}.attentions.{j}.transformer_blocks.{k}", channels) for k in range(sizes[i])]
    torch.manual_seed(0)
    time_dim, prompt_dim = 4 * unet.config.block_out_channels[0], unet.config.cross_attention_dim
    adapters = {
        f"{place}.attn2": TheirAdapter(
            unet.config.block_out_channels[channels],
            use_timestep,
            False,
            kind,
            1000,
            time_dim,
            prompt_dim if use_prompt else None,
        ).eval()
        for place, channels in places
    }
    for i, adapter in enumerate(adapters.values()):
        randomise(adapter, i)
    return adapters


def write_text_checkpoint(run: Path, adapters: dict[str, TheirAdapter], config: dict[str, Any]) -> Path:
    path = write_checkpoint(run, nn.ModuleList(), config)
    torch.save({"model": {site: adapter.state_dict() for site, adapter in adapters.items()}}, path)
    return path


@pytest.mark.parametrize(
    ("arch", "use_timestep", "use_prompt"),
    [("attention", False, False), ("attention", True, True), ("attention", False, True), ("additive", True, True)],
)
def test_converted_text_adapters_predict_the_same(
    text_base: BaseModel, tmp_path: Path, arch: str, use_timestep: bool, use_prompt: bool
) -> None:
    theirs = their_text_adapters(text_base, arch, use_timestep, use_prompt)
    flags = {"arch": arch, "use_timestep": use_timestep, "use_prompt": use_prompt, "base_model": "somebody/a-model"}
    path = write_text_checkpoint(tmp_path, theirs, CONFIG | flags)
    ours = convert_authors_checkpoint(path, text_base)
    assert ours.config.kind == {"additive": "offset", "attention": "cross-attention"}[arch]
    assert ours.config.guidance_range == (1.0, 12.0) and ours.config.guided_channels == 4
    assert ours.config.scale_multiplier == (1000 if arch == "additive" else 1)
    assert set(ours.config.sites) == set(text_base.attention_sites(all_sites=False))
    assert ours.num_parameters() == sum(p.numel() for adapter in theirs.values() for p in adapter.parameters())

    condition, scale, timestep = text_base.encode(["red cat", "a hat on"]), torch.tensor([2.7, 12.0]), torch.tensor(400)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = text_base.denoise(latents, timestep, condition)
    with ours.attached(text_base), ours.guided_by(scale), torch.no_grad():
        prediction = text_base.denoise(latents, timestep, condition)

    unet = text_base.denoiser
    time = unet.time_embedding(unet.time_proj(timestep.expand(2)))
    for site, adapter in theirs.items():
        unet.get_submodule(site).register_forward_hook(
            lambda module, args, output, adapter=adapter: (
                output + adapter(args[0], scale, time, None, condition["encoder_hidden_states"])
            )
        )
    with torch.no_grad():
        expected = text_base.denoise(latents, timestep, condition)
    torch.testing.assert_close(prediction, expected, rtol=1e-3, atol=1e-4)
    assert (expected - plain).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_a_base_that_predicts_otherwise_is_refused(tmp_path: Path) -> None:
    base = base_from_pipeline(build_sd_pipeline(tmp_path / "base", prediction_type="epsilon"), "sd20")
    theirs = their_text_adapters(base, "attention", True, True)
    path = write_text_checkpoint(tmp_path, theirs, {"base_model": "stabilityai/stable-diffusion-2-1"})
    with pytest.raises(AdapterError, match=r"trained on stabilityai/stable-diffusion-2-1, which predicts v_prediction"):
        convert_authors_checkpoint(path, base)


# The factor on the scale ------------------------------------------------------------------------------------------------


def test_the_factor_must_be_known(dit_base: DiTBase, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, their_adapters(dit_base, "additive", True, True, 1000))
    with pytest.raises(AdapterError, match=r"no config.yaml with cfg_mult. Pass scale_multiplier .*1000"):
        convert_authors_checkpoint(path, dit_base)
    assert convert_authors_checkpoint(path, dit_base, scale_multiplier=1000).config.scale_multiplier == 1000.0
    (path.parent / "config.yaml").write_text("cfg_mult: 10.0\n")  # beside the checkpoint is as good
    assert convert_authors_checkpoint(path, dit_base).config.scale_multiplier == 10.0
    assert convert_authors_checkpoint(path, dit_base, scale_multiplier=1).config.scale_multiplier == 1.0


@pytest.mark.parametrize("scale_multiplier", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_factor_is_refused(dit_base: DiTBase, tmp_path: Path, scale_multiplier: float) -> None:
    path = write_checkpoint(tmp_path, their_adapters(dit_base, "additive", True, True, 1000))
    with pytest.raises(ValueError, match="got scale_multiplier"):
        convert_authors_checkpoint(path, dit_base, scale_multiplier=scale_multiplier)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arch: attention\ncfg_mult: 1", "holds offset adapters, but its config.yaml says arch: 'attention'"),
        ("arch: mlp_gate\ncfg_mult: 1", "says arch: 'mlp_gate'; expected 'additive'"),
        ("hidden_dim: 320\ncfg_mult: 1", "says hidden_dim: 320, its tensors say 8"),
        ("use_timestep: false\ncfg_mult: 1", "says use_timestep: False, its tensors say True"),
        ("use_class_label: false\ncfg_mult: 1", "says use_class_label: False, its tensors say True"),
        ("cfg_mult: .nan", "gives cfg_mult: nan"),
        ("cfg_mult: many", "gives cfg_mult: 'many'"),
        ("cfg_mult: true", "gives cfg_mult: True"),
        ("cfg_mult: [1]", "gives cfg_mult: 'a list'"),
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)) + "arch: *a39",
            "arch: 'a list'",
        ),
        ("- 1\n- 2", "holds a list, expected settings by name"),
        ("a: [", "is not valid YAML"),
        ("cfg_mult: !!python/object/apply:os.system ['touch exploded']", "is not valid YAML"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(dit_base: DiTBase, tmp_path: Path, text: str, message: str) -> None:
    path = write_checkpoint(tmp_path, their_adapters(dit_base, "additive", True, True, 1000))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(AdapterError, match=message):
        convert_authors_checkpoint(path, dit_base)
    assert not Path("exploded").exists()


def test_a_bad_guidance_range_is_refused(dit_base: DiTBase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got guidance range"):
        convert_authors_checkpoint(tmp_path / "any.pt", dit_base, guidance_range=(6.0, 1.0))


# Hostile and damaged files ----------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("place", ["top", "site", "tensor", "plain pickle"])
def test_code_in_a_pickle_is_not_run(dit_base: DiTBase, tmp_path: Path, place: str) -> None:
    exploded, path = tmp_path / "exploded", tmp_path / "0005000.pt"
    content: Any = {
        "top": Bomb(exploded),
        "site": {"model": {"blocks.0.attn": Bomb(exploded)}},
        "tensor": {"model": {"blocks.0.attn": {"q_proj.weight": Bomb(exploded)}}},
    }.get(place, {"model": Bomb(exploded)})
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(AdapterError, match=r"cannot be read safely .*Nothing of it was run"):
        convert_authors_checkpoint(path, dit_base)
    assert not exploded.exists()
    if place != "plain pickle":
        torch.load(path, weights_only=False)  # the bomb is live: without the guard it goes off
        assert exploded.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x02.", b"\x80\x02J\x00", b"not a checkpoint", bytes(1000)],
)
def test_a_file_that_is_no_checkpoint_is_refused(dit_base: DiTBase, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "0005000.pt"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=r"0005000.pt (cannot be read safely|holds no adapters)"):
        convert_authors_checkpoint(path, dit_base)


def test_a_truncated_checkpoint_is_refused(dit_base: DiTBase, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, their_adapters(dit_base, "attention", True, True, 1))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(AdapterError, match="cannot be read safely"):
        convert_authors_checkpoint(path, dit_base)


def test_a_missing_checkpoint_is_named(dit_base: DiTBase, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no checkpoint at .*0000001.pt: the file does not exist"):
        convert_authors_checkpoint(tmp_path / "0000001.pt", dit_base)


@pytest.mark.parametrize(
    "content",
    [[1, 2], {}, {"model": {}}, {"model": [1]}, {"state_dict": {"a": torch.zeros(1)}}],
    ids=["list", "empty", "no sites", "sites in a list", "another layout"],
)
def test_other_contents_are_refused(dit_base: DiTBase, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match=r"holds no adapters: expected \{'model'"):
        convert_authors_checkpoint(tmp_path / "x.pt", dit_base)


def corrupted(model: dict[str, dict[str, Tensor]], how: str) -> dict[Any, Any]:
    site = model["blocks.1.attn"]
    if how == "unknown name":
        site["backdoor.weight"] = torch.zeros(3)
    elif how == "missing name":
        del site["k_proj.weight"]
    elif how == "wrong shape":
        site["k_proj.weight"] = torch.zeros(D, D + 1)
    elif how == "huge shape":
        site["k_proj.weight"] = torch.zeros(1).expand(60_000, 60_000)
    elif how == "huge everywhere":
        for tensors in model.values():
            tensors["guidance_scale_embedder.net.0.frequencies"] = torch.zeros(1).expand(60_000)
    elif how == "nan":
        site["k_proj.weight"][0, 0] = math.nan
    elif how == "integers":
        site["k_proj.weight"] = site["k_proj.weight"].to(torch.int64)
    elif how == "sparse":
        site["k_proj.weight"] = site["k_proj.weight"].to_sparse()
    elif how == "no tensor":
        site["k_proj.weight"] = "weights"  # type: ignore[assignment]
    elif how == "number for a site":
        model["blocks.1.attn"] = 7  # type: ignore[assignment]
    elif how == "number as name":
        model[7] = site  # type: ignore[index]
    elif how == "other width":
        site["q_proj.weight"], site["out_proj.weight"] = torch.zeros(D, 32), torch.zeros(32, D)
        site["out_proj.bias"] = torch.zeros(32)
    elif how == "unknown site":
        model["blocks.9.attn"] = site
    elif how == "twice":
        model["transformer_blocks.1.attn1"] = site
    elif how == "two kinds":
        model["blocks.2.attn"] = {name: t for name, t in site.items() if not name.startswith(("q_", "k_", "v_"))}
    elif how == "odd site name":
        model["keys"] = model.pop("blocks.1.attn")
    return model


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unknown name", "holds 'backdoor.weight' at transformer_blocks.1.attn1, which no cross-attention adapter"),
        ("missing name", "not a whole set of cross-attention adapters: .*attn1.k_proj.weight is missing"),
        ("wrong shape", r"k_proj.weight: shape \(8, 9\), expected \(8, 8\)"),
        ("huge shape", "malformed at blocks.1.attn.k_proj.weight"),
        ("huge everywhere", "malformed at blocks.0.attn.guidance_scale_embedder.net.0.frequencies"),
        ("nan", "malformed at blocks.1.attn.k_proj.weight: expected a tensor of finite floats"),
        ("integers", "malformed at blocks.1.attn.k_proj.weight"),
        ("sparse", "malformed at blocks.1.attn.k_proj.weight"),
        ("no tensor", "malformed at blocks.1.attn.k_proj.weight"),
        ("number for a site", "malformed at 'blocks.1.attn'"),
        ("number as name", "malformed at '7'"),
        ("other width", "attn1 has width 16, the adapter 32"),
        ("unknown site", "attention layer transformer_blocks.9.attn1 is missing"),
        ("twice", "names one attention layer twice"),
        ("two kinds", "k_proj.weight is missing"),
        ("odd site name", "x.pt|do not fit"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_tensors_that_do_not_fit_are_refused(dit_base: DiTBase, tmp_path: Path, how: str, message: str) -> None:
    theirs = their_adapters(dit_base, "attention", True, True, 1)
    model = {f"blocks.{i}.attn": dict(adapter.state_dict()) for i, adapter in enumerate(theirs)}
    torch.save({"model": corrupted(model, how)}, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match=message):
        convert_authors_checkpoint(tmp_path / "x.pt", dit_base)


def test_adapters_of_another_base_are_refused(dit_base: DiTBase, tmp_path: Path) -> None:
    other = base_from_pipeline(build_dit_pipeline(attention_head_dim=16), "wider")
    assert isinstance(other, DiTBase)
    path = write_checkpoint(tmp_path, their_adapters(other, "attention", True, True, 1))
    with pytest.raises(AdapterError, match=r"has width 16, the adapter 32.*timestep_dim is 16, the adapters expect 32"):
        convert_authors_checkpoint(path, dit_base)
