"""LoRA weights are merged whole, as the libraries that wrote them merge them, or refused by name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowgym_gym.errors import CheckpointError
from flowgym_gym.models import from_pretrained
from tests.models import tiny

peft = pytest.importorskip("peft")

SETTINGS = {
    "plain": {"lora_alpha": 3, "target_modules": ["to_q", "to_v"]},
    "stabilised by rank": {"lora_alpha": 3, "use_rslora": True, "target_modules": ["to_q", "to_v"]},
    "patterns": {
        "lora_alpha": 3,
        "rank_pattern": {"mid_block.*to_q": 1},
        "alpha_pattern": {"mid_block.*to_q": 7},
        "target_modules": ["to_q", "to_k", "proj_in"],
    },
    "DoRA": {"lora_alpha": 3, "use_dora": True, "target_modules": ["to_q", "to_v"]},
    "convolutions": {
        "lora_alpha": 3,
        "target_modules": ["conv1", "conv_shortcut", "time_emb_proj"],
    },
    "biases": {"lora_alpha": 3, "bias": "lora_only", "target_modules": ["to_out.0"]},
    "whole layers": {"lora_alpha": 3, "modules_to_save": ["conv_out"], "target_modules": ["to_q"]},
}
# Layers of every kind of text encoder.
TEXT = {"CLIP": ["q_proj", "fc1"], "T5": ["q", "wo"]}


def lora_config(**options):
    return peft.LoraConfig(r=2, init_lora_weights=False, **options)


def save_peft(module, folder, **options):
    """What a training with peft leaves behind, with every adapter's weight drawn at random."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = peft.get_peft_model(module, lora_config(**options))
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data += 0.3 * torch.rand_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def opened(name, **options):
    return from_pretrained(tiny.folder(name), **tiny.OPTIONS.get(name, {}), **options).pipe


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_folder_of_peft_is_merged_as_peft_merges_it(settings, tmp_path):
    folder = save_peft(tiny.build("stable_diffusion").unet, tmp_path, **settings)
    plain = weights(tiny.build("stable_diffusion").unet)
    reference = peft.PeftModel.from_pretrained(tiny.build("stable_diffusion").unet, folder)
    expected = weights(reference.merge_and_unload())
    changed = [name for name in plain if not torch.equal(plain[name], expected[name])]
    assert changed
    for lora in (folder, f"{folder}/adapter_model.safetensors"):
        merged = weights(opened("stable_diffusion", lora=lora).unet)
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[key], expected[key]) for key in expected)
    if settings.keys() & {"bias", "modules_to_save"}:
        with pytest.raises(
            CheckpointError, match=r"replaces \d+ weights? .*lora_scale=0.5 cannot scale"
        ):
            opened("stable_diffusion", lora=folder, lora_scale=0.5)
    elif "use_dora" not in settings:
        merged = weights(opened("stable_diffusion", lora=folder, lora_scale=0.5).unet)
        for key in changed:
            torch.testing.assert_close(merged[key], (plain[key] + expected[key]) / 2)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("stable_diffusion", "text_encoder"),
        ("stable_diffusion_xl", "text_encoder"),
        ("stable_diffusion_xl", "text_encoder_2"),
        ("stable_diffusion_3", "transformer"),
        ("stable_diffusion_3", "text_encoder_3"),
        ("flux", "transformer"),
        ("flux", "text_encoder_2"),
    ],
)
def test_a_folder_of_peft_goes_to_the_part_that_has_its_layers(name, part, tmp_path):
    layers = ["to_q", "to_v"]
    if part.startswith("text"):
        layers = TEXT[
            "T5" if type(getattr(tiny.build(name), part)).__name__.startswith("T5") else "CLIP"
        ]
    folder = save_peft(
        getattr(tiny.build(name), part), tmp_path, lora_alpha=3, target_modules=layers
    )
    reference = peft.PeftModel.from_pretrained(getattr(tiny.build(name), part), folder)
    expected, pipe, plain = (
        reference.merge_and_unload(),
        opened(name, lora=folder),
        tiny.build(name),
    )
    for other in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if hasattr(pipe, other):
            wanted = weights(expected if other == part else getattr(plain, other))
            merged = weights(getattr(pipe, other))
            assert all(torch.equal(merged[key], wanted[key]) for key in wanted)


def adapted(pipe, part, layers, seed):
    """LoRA weights of a part in diffusers' format, and the part's weights once they are merged, in
    closed form.
    """
    torch.manual_seed(seed)
    module = getattr(pipe, part)
    module.add_adapter(lora_config(lora_alpha=2, target_modules=layers))
    found = peft.get_peft_model_state_dict(module)
    merged = weights(getattr(tiny.build(NAMES[type(pipe).__name__]), part))
    for key in [key for key in found if "lora_A" in key]:
        up, down = found[key.replace("lora_A", "lora_B")], found[key]
        merged[key.replace("lora_A.", "")] += 0.7 * up @ down
    return found, merged


NAMES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "FluxPipeline": "flux",
}


@pytest.mark.parametrize("name", NAMES.values())
@torch.no_grad()
def test_lora_weights_of_text_encoders_are_merged_in_every_family(name, tmp_path):
    pipe = tiny.build(name)
    parts = {
        "unet" if hasattr(pipe, "unet") else "transformer": ["to_q"],
        "text_encoder": TEXT["CLIP"],
    }
    if name in ("stable_diffusion_xl", "stable_diffusion_3"):
        parts["text_encoder_2"] = TEXT["CLIP"]
    expected, layers = {}, {}
    for seed, (part, targets) in enumerate(parts.items()):
        layers[f"{part}_lora_layers"], expected[part] = adapted(pipe, part, targets, seed)
    type(pipe).save_lora_weights(tmp_path, **layers)
    opened_pipe = opened(name, lora=str(tmp_path), lora_scale=0.7)
    for part, wanted in expected.items():
        merged = weights(getattr(opened_pipe, part))
        assert merged.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(merged[key], wanted[key])


def kohya(pipe, alphas):
    """A file of kohya's scripts, where layers have ranks and alphas of their own; and its merge in
    closed form.
    """
    torch.manual_seed(3)
    file, merged = {}, {part: weights(getattr(pipe, part)) for part in ("unet", "text_encoder")}
    unet = "down_blocks.1.attentions.0.transformer_blocks.0"
    layers = {
        ("unet", f"{unet}.attn1.to_q"): f"lora_unet_{unet.replace('.', '_')}_attn1_to_q",
        ("unet", f"{unet}.attn2.to_out.0"): f"lora_unet_{unet.replace('.', '_')}_attn2_to_out_0",
        **{
            ("text_encoder", f"encoder.layers.0.self_attn.{layer}"): f"{TEXT_LAYER}_{layer}"
            for layer in ("q_proj", "k_proj", "v_proj", "out_proj")
        },
        ("text_encoder", "encoder.layers.1.mlp.fc1"): "lora_te_text_model_encoder_layers_1_mlp_fc1",
    }
    for i, ((part, layer), name) in enumerate(layers.items()):
        weight, rank, alpha = merged[part][f"{layer}.weight"], 2 + i % 2, alphas[i % len(alphas)]
        up, down = torch.randn(len(weight), rank), torch.randn(rank, weight.shape[1])
        file |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        if alpha is not None:
            file[f"{name}.alpha"] = torch.tensor(alpha)
        weight += 0.5 * (1 if alpha is None else alpha / rank) * up @ down
    return file, merged


@pytest.mark.parametrize("alphas", [[None], [4.0], [1.0, 4.0, 3.0, 0.5], [4.0, None]])
@torch.no_grad()
def test_files_of_kohya_keep_the_alpha_of_each_layer(alphas, tmp_path):
    file, expected = kohya(tiny.build("stable_diffusion"), alphas)
    save_file(file, tmp_path / "lora.safetensors")
    pipe = opened("stable_diffusion", lora=str(tmp_path / "lora.safetensors"), lora_scale=0.5)
    for part, wanted in expected.items():
        merged = weights(getattr(pipe, part))
        for key in wanted:
            torch.testing.assert_close(merged[key], wanted[key])


def unet_lora(seed=0, **options):
    unet = tiny.build("stable_diffusion").unet
    unet.add_adapter(lora_config(**{"target_modules": ["to_q", "to_v"], **options}))
    return {
        f"unet.{key}": value.contiguous()
        for key, value in peft.get_peft_model_state_dict(unet).items()
    }


def without(pattern, file):
    return {key: value for key, value in file.items() if not re.search(pattern, key)}


TEXT_LAYER = "lora_te_text_model_encoder_layers_0_self_attn"
KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
# Where the layers of a file belong to nothing, or not all of it is LoRA: how the file is made, and
# what is named.
PARTIAL = {
    "of a transformer": (
        lambda file: {key.replace("unet.", "transformer."): v for key, v in file.items()},
        r"none of its weights fits: 32 weights \(transformer\.",
    ),
    "without its prefix": (
        lambda file: {key.removeprefix("unet."): v for key, v in file.items()},
        "none of its weights fits",
    ),
    "of other blocks": (
        lambda file: {key.replace("_blocks.1.", "_blocks.7."): v for key, v in file.items()},
        r"not all of its weights fit: \d+ weights \(unet\.down_blocks\.7\.",
    ),
    "with one layer more": (
        lambda file: file | {"unet.nowhere.lora_A.weight": torch.ones(2, 2)},
        r"not all of its weights fit: 1 weight \(unet\.nowhere\.lora_A\.weight\)",
    ),
    "with a part that takes none": (
        lambda file: file | {"text_encoder_9.q.lora_A.weight": torch.ones(2, 2)},
        r"1 weight \(text_encoder_9\.q",
    ),
    "without the second factors": (
        lambda file: without(r"mid_block.*lora_B", file),
        "is incomplete|could not",
    ),
    "without the first factors": (
        lambda file: without(r"mid_block.*lora_A", file),
        "is incomplete|could not",
    ),
    "of other widths": (
        lambda file: {key: torch.ones(5, 5) for key in file},
        "could not be loaded",
    ),
    "empty": (lambda file: {}, "is empty"),
    "LoHa": (
        lambda file: {f"{KOHYA}.hada_w1_a": torch.ones(8, 2)},
        r"another kind, LoHa: .*hada_w1_a.*denoiser=",
    ),
    "LoKr": (lambda file: {f"{KOHYA}.lokr_w1": torch.ones(8, 2)}, "another kind, LoKr"),
    "LyCORIS's DoRA": (
        lambda file: {
            f"{KOHYA}.lora_up.weight": torch.ones(16, 2),
            f"{KOHYA}.lora_down.weight": torch.ones(2, 16),
            f"{KOHYA}.dora_scale": torch.ones(1, 16),
        },
        r"another kind, DoRA in LyCORIS's form: 1 weight \(.*dora_scale",
    ),
    "a whole weight's difference": (
        lambda file: file | {"lora_unet_conv_in.diff": torch.ones(1)},
        "differences of",
    ),
    # diffusers takes kohya's query for an older format's, and finds its layers only beside an
    # output's.
    "one that diffusers would read in part": (
        lambda file: (
            {
                f"{TEXT_LAYER}_q_proj.lora_{name}.weight": torch.ones(16, 16)
                for name in ("up", "down")
            }
            | {f"{KOHYA}.lora_{name}.weight": torch.ones(8, 8) for name in ("up", "down")}
        ),
        "could not be loaded|not all of its weights fit",
    ),
    "alphas that nobody reads": (
        lambda file: file | {"unet.conv_in.alpha": torch.tensor(1.0)},
        "could not be loaded|not all",
    ),
}


@pytest.mark.parametrize(("change", "message"), PARTIAL.values(), ids=PARTIAL)
def test_a_lora_that_does_not_fit_in_full_is_named(change, message, tmp_path):
    save_file(change(unet_lora()), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=message):
        opened("stable_diffusion", lora=str(tmp_path / "lora.safetensors"))


def flux_lora(width=32):
    down, up = torch.ones(2, width), torch.ones(96, 2)
    return {
        f"{FLUX}.lora_down.weight": down,
        f"{FLUX}.lora_up.weight": up,
        f"{FLUX}.alpha": torch.tensor(3.0),
    }


FLUX = "lora_unet_double_blocks_0_img_attn_qkv"
# What diffusers leaves out of a file for Flux, or makes room for, without a word.
FLUX_PARTIAL = {
    "with T5's layers": (
        {"lora_te2_encoder_block_0.lora_down.weight": torch.ones(2, 2)},
        r"1 weight \(lora_te2_",
    ),
    "of ComfyUI with T5's layers": (
        {"text_encoders.t5xxl.transformer.q.lora_down.weight": torch.ones(2, 2)},
        r"1 weight \(text_encoders\.t5xxl",
    ),
    "of the positions": (
        {"lora_te1_position_embedding.lora_down.weight": torch.ones(2, 2)},
        "position_embedding",
    ),
    "of other inputs": (
        flux_lora(64),
        r"is of a network with other inputs: it enlarges 3 weights \(transformer\.",
    ),
}


@pytest.mark.parametrize(("more", "message"), FLUX_PARTIAL.values(), ids=FLUX_PARTIAL)
def test_what_diffusers_leaves_out_of_a_file_is_named(more, message, tmp_path):
    save_file(flux_lora() | more, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=message):
        opened("flux", lora=str(tmp_path / "lora.safetensors"))


@torch.no_grad()
def test_files_of_kohya_for_flux_keep_their_alpha(tmp_path):
    file = flux_lora()
    save_file(file, tmp_path / "lora.safetensors")
    pipe, plain = opened("flux", lora=str(tmp_path / "lora.safetensors")), tiny.build("flux")
    for layer in ("to_q", "to_k", "to_v"):
        change = (
            getattr(pipe.transformer.transformer_blocks[0].attn, layer).weight
            - getattr(plain.transformer.transformer_blocks[0].attn, layer).weight
        )
        torch.testing.assert_close(change, torch.full_like(change, 3 / 2 * 2))


@torch.no_grad()
def test_dora_in_diffusers_format_acts_as_in_diffusers(tmp_path):
    save_file(unet_lora(use_dora=True), tmp_path / "pytorch_lora_weights.safetensors")
    reference = tiny.build("stable_diffusion")
    reference.load_lora_weights(tmp_path)
    reference.fuse_lora(lora_scale=0.6)
    reference.unload_lora_weights()
    expected, merged = (
        weights(reference.unet),
        weights(opened("stable_diffusion", lora=str(tmp_path), lora_scale=0.6).unet),
    )
    plain = weights(tiny.build("stable_diffusion").unet)
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
    assert any(not torch.equal(merged[key], plain[key]) for key in plain)


def test_folders_of_peft_that_do_not_fit_are_named(tmp_path):
    transformer = save_peft(
        tiny.build("flux").transformer, tmp_path / "flux", target_modules=["to_q"]
    )
    with pytest.raises(
        CheckpointError, match=r"no LoRA of one part of this StableDiffusionPipeline: \d+ weights"
    ):
        opened("stable_diffusion", lora=transformer)
    fitting = save_peft(
        tiny.build("stable_diffusion").unet, tmp_path / "unet", target_modules=["to_q"]
    )
    file = f"{fitting}/adapter_model.safetensors"
    tensors = load_file(file)
    save_file(without("mid_block.*lora_B", tensors), file)
    with pytest.raises(CheckpointError, match=r"does not fit the unet: 2 weights \(.*lora_B"):
        opened("stable_diffusion", lora=fitting)
    save_file(tensors, file)
    settings = tmp_path / "unet" / "adapter_config.json"
    settings.rename(tmp_path / "unet" / "other.json")
    with pytest.raises(
        CheckpointError,
        match=r"none of its weights fits: .*adapter_config\.json of peft is missing",
    ):
        opened("stable_diffusion", lora=fitting)
    loha = peft.LoHaConfig(r=2, target_modules=["to_q"])
    peft.get_peft_model(tiny.build("stable_diffusion").unet, loha).save_pretrained(
        tmp_path / "loha"
    )
    with pytest.raises(CheckpointError, match="another kind, LoHa"):
        opened("stable_diffusion", lora=str(tmp_path / "loha"))
    kind = json.loads((tmp_path / "loha" / "adapter_config.json").read_text())
    assert kind["peft_type"] == "LOHA"


def test_a_folder_with_several_files_is_never_guessed_from(tmp_path):
    for name in ("a", "b"):
        save_file(unet_lora(), tmp_path / f"{name}.safetensors")
    with pytest.raises(
        CheckpointError, match=r"several safetensors files \(a\.safetensors, b\.safetensors\)"
    ):
        opened("stable_diffusion", lora=str(tmp_path))
