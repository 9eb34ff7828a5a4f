"""Folders and files that people have as checkpoints: they open, or are named as what they are;
nothing asks a Hub.
"""

import json
import shutil
import socket
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flowgym_gym import FlowTensor
from flowgym_gym.errors import CheckpointError, OptionError
from flowgym_gym.models import from_pipeline, from_pretrained
from flowgym_gym.models.checkpoints import check_files
from flowgym_gym.models.recognition import find_variant
from flowgym_gym.sources import Source
from tests.models import tiny
from tests.models.original import save_original


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A connection is an error at once, whatever a library does with HF_HUB_OFFLINE."""

    def connect(*args):
        raise AssertionError("a local file or folder must not reach the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def outputs(model):
    """What a model predicts and draws."""
    x = FlowTensor(torch.randn(1, *model.state_shape, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        _, kwargs = model.preprocess(x, prompt=["a red heart"])
        return torch.cat(
            [
                model(x, torch.tensor([0.5]), **kwargs).data.flatten(),
                model.postprocess(x).data.flatten(),
            ]
        )


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A checkpoint in float16 whose weights are there as ``fp16`` alone, and the same with plain
    names.
    """
    folder = tmp_path_factory.mktemp("half")
    pipe = tiny.build("stable_diffusion").to(torch.float16)
    pipe.save_pretrained(folder / "plain")
    pipe.save_pretrained(folder / "fp16", variant="fp16")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_a_variant_are_found_and_have_the_number_format_that_is_asked_for(half, dtype):
    model = from_pretrained(str(half / "fp16"), dtype=dtype)
    assert {model.denoiser.dtype, model.pipe.vae.dtype, model.pipe.text_encoder.dtype} == {
        getattr(torch, dtype)
    }
    assert torch.equal(outputs(model), outputs(from_pretrained(str(half / "plain"), dtype=dtype)))


def test_parts_may_be_there_in_different_variants_and_plain_weights_come_first(half, tmp_path):
    folder = Path(shutil.copytree(half / "plain", tmp_path / "mixed"))
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_suffix(".bf16.safetensors"))
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    wrong = {name: torch.zeros_like(value) for name, value in load_file(vae).items()}
    save_file(wrong, vae.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    assert torch.equal(
        outputs(from_pretrained(str(folder))), outputs(from_pretrained(str(half / "plain")))
    )


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["model.safetensors"], None),
        (["model.fp16.safetensors"], "fp16"),
        (["model.fp16.safetensors", "model.safetensors"], None),
        (
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
            "fp16",
        ),
        (
            ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"],
            "fp16",
        ),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (
            [
                "diffusion_pytorch_model.non_ema.safetensors",
                "diffusion_pytorch_model.fp16.safetensors",
            ],
            "fp16",
        ),
        ([], None),
    ],
)
def test_variants_by_the_names_that_diffusers_gives_files(names, variant, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    assert find_variant(tmp_path) == variant


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a folder into an empty cache of the Hub, and returns its place there."""
    for module in (
        "huggingface_hub.constants",
        "huggingface_hub.file_download",
        "diffusers.utils.constants",
    ):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path), raising=False)

    def put(name, folder):
        repository = tmp_path / f"models--somebody--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0123abc")
        return Path(shutil.copytree(folder, repository / "snapshots" / "0123abc"))

    return put


def test_a_hub_id_with_a_variant_alone_opens_from_the_local_cache(half, hub):
    hub("half", half / "fp16")
    model = from_pretrained("somebody/half")
    assert torch.equal(outputs(model), outputs(from_pretrained(str(half / "plain"))))


def test_a_hub_id_without_its_tokenizer_has_no_empty_one(hub):
    shutil.rmtree(hub("mute", tiny.folder("stable_diffusion")) / "tokenizer")
    with pytest.raises(
        CheckpointError,
        match=r"Hub id 'somebody/mute' has no tokenizer.json or vocab.json in 'token",
    ):
        from_pretrained("somebody/mute")


@pytest.fixture
def whole(tmp_path):
    """A whole checkpoint in one file in the original format."""
    save_original(tiny.build("stable_diffusion"), tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors"


@pytest.mark.parametrize("where", ["tuned", "."])
def test_a_whole_checkpoint_in_one_file_opens_with_the_configuration_beside_it(whole, where):
    shutil.copytree(
        tiny.folder("stable_diffusion"),
        whole.parent / where,
        ignore=shutil.ignore_patterns("*.safetensors"),
        dirs_exist_ok=True,
    )
    model = from_pretrained(str(whole))
    assert torch.equal(outputs(model), outputs(from_pretrained(tiny.folder("stable_diffusion"))))
    assert from_pretrained(str(whole), dtype="bfloat16").denoiser.dtype == torch.bfloat16


# What a single file may lack or have beyond its configuration, and what of it the message names.
UNFIT = {
    "without a weight of the U-Net": (
        {"model.diffusion_model.out.2.weight": None},
        "weights of a network are missing",
    ),
    "without a weight of the autoencoder": (
        {"first_stage_model.decoder.conv_out.weight": None},
        "weights of a network are missing",
    ),
    "without a weight of the text encoder": (
        {"cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight": None},
        r"'text_encoder' lacks 1 weight \(.*layers\.1\.mlp\.fc1\.weight",
    ),
    "with a block of the U-Net": (
        {"model.diffusion_model.middle_block.5.x": 3},
        "numbers for 'unet', of which",
    ),
    "with scales of float8": (
        {"model.diffusion_model.out.2.scale_weight": 1},
        "numbers for 'unet', of which",
    ),
    "with a block of the autoencoder": (
        {"first_stage_model.decoder.up.7.block.0.x": 3},
        "numbers for 'vae', of which",
    ),
    "with a layer of the text encoder": (
        {"cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.weight": 3},
        "numbers for 'text_encoder', of which",
    ),
}


def configuration(whole):
    """The folder beside a single file with everything but weights."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(
        shutil.copytree(tiny.folder("stable_diffusion"), whole.with_suffix(""), ignore=ignored)
    )


@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_single_file_fills_its_configuration_and_nothing_is_left_over(
    change, message, dtype, whole
):
    configuration(whole)
    weights = load_file(whole) | {name: torch.ones(size or 1) for name, size in change.items()}
    save_file(
        {name: value for name, value in weights.items() if change.get(name, 1) is not None}, whole
    )
    with pytest.raises(CheckpointError, match=f"does not fit its configuration in .*{message}"):
        from_pretrained(str(whole), dtype=dtype)


def test_what_a_single_file_has_beside_its_parts_is_no_fault(whole):
    configuration(whole)
    more = {
        "model_ema.decay": torch.ones(()),
        "betas": torch.ones(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(32)[None],
    }
    save_file(load_file(whole) | more, whole)
    assert torch.equal(
        outputs(from_pretrained(str(whole))),
        outputs(from_pretrained(tiny.folder("stable_diffusion"))),
    )


def test_a_single_file_is_not_opened_where_nobody_would_see_what_it_lacks(whole, monkeypatch):
    configuration(whole)
    monkeypatch.setattr("diffusers.utils.import_utils.is_accelerate_available", lambda: False)
    with pytest.raises(OptionError, match="needs the package accelerate: pip install"):
        from_pretrained(str(whole))


def test_a_whole_checkpoint_without_its_configuration_says_how_to_convert_it(whole):
    with pytest.raises(
        CheckpointError,
        match=r"a whole checkpoint .* diffusers\.StableDiffusionPipeline\.from_single_file\(",
    ):
        from_pretrained(str(whole))


def test_a_single_file_takes_no_pickled_weights_for_parts_that_it_lacks(whole):
    (configuration(whole) / "text_encoder" / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="only pickled weights, which are not loaded"):
        from_pretrained(str(whole))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["unet.down_blocks.0.to_q.lora_A.weight"], "holds LoRA weights; give it as lora="),
        (["lora_unet_down_blocks_0.lora_up.weight"], "holds LoRA weights; give it as lora="),
        (["lora_unet_down_blocks_0.hada_w1_a"], "holds LoRA weights"),
        (
            ["down_blocks.0.resnets.0.time_emb_proj.weight", "conv_in.weight"],
            r"holds a U-Net; .* denoiser=",
        ),
        (["transformer_blocks.0.attn.to_q.weight"], r"holds a transformer; .* denoiser="),
        (
            ["double_blocks.0.img_attn.qkv.weight"],
            r"holds a transformer in the original format; .* denoiser=",
        ),
        (
            ["model.diffusion_model.input_blocks.0.0.weight"],
            r"holds a network in the original format",
        ),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], r"holds an autoencoder; .* vae="),
        (["text_model.embeddings.token_embedding.weight"], "holds a text encoder"),
        (["controlnet_cond_embedding.conv_in.weight"], "holds a ControlNet"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "holds an IP-Adapter"),
        (["transformer_blocks.0.attn.to_q.qweight"], "Nunchaku"),
        (["emb_params"], "holds a textual inversion"),
        (["a", "b"], r"weights of an unknown kind \(a, b\)"),
    ],
)
def test_a_file_that_is_no_whole_checkpoint_is_named(keys, message, tmp_path):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.ckpt", "holds pickled weights"),
        ("x.gguf", "holds GGUF weights.*from_pipeline"),
        ("x.onnx", "holds ONNX weights"),
        ("x.txt", "holds no safetensors weights"),
        ("x.safetensors", "cannot be read as safetensors"),
    ],
)
def test_a_file_of_another_format_is_named(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(str(tmp_path / name))


def config(**values):
    return json.dumps(values)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modular_model_index.json": "{}"}, "a modular pipeline, which is not supported"),
        ({"sd15/model_index.json": "{}"}, "holds checkpoints in 'sd15'; give one of these folders"),
        (
            {"config.json": config(_class_name="UNet2DConditionModel")},
            "a UNet2DConditionModel; .* denoiser=",
        ),
        (
            {"config.json": config(_class_name="FluxTransformer2DModel")},
            "a FluxTransformer2DModel; .* denoiser=",
        ),
        ({"config.json": config(_class_name="AutoencoderKL")}, "an? AutoencoderKL; .* vae="),
        (
            {"config.json": config(architectures=["CLIPTextModel"])},
            "CLIPTextModel; give the folder of the whole",
        ),
        ({"config.json": "[]"}, "a single part of a pipeline, of an unknown kind"),
        (
            {"scheduler_config.json": config(_class_name="DDIMScheduler")},
            "DDIMScheduler; give the folder of the whole",
        ),
        ({"adapter_config.json": "{}"}, "holds LoRA weights; give it as lora="),
        ({"pytorch_lora_weights.safetensors": ""}, "holds LoRA weights; give it as lora="),
        (
            {"v1-5-pruned.safetensors": ""},
            r"single files \(v1-5-pruned.safetensors\); give one of these files",
        ),
        ({"unet.onnx": ""}, "it holds only ONNX weights"),
        ({"model.ckpt": ""}, "it holds only pickled weights"),
        ({}, "has no model_index.json, so it is not a diffusers pipeline; save one"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_named(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("end", "what"),
    [
        ("msgpack", "Flax"),
        ("onnx", "ONNX"),
        ("xml", "OpenVINO"),
        ("bin", "pickled"),
        ("gguf", "GGUF"),
    ],
)
def test_weights_of_another_format_are_named(end, what, tmp_path):
    folder = Path(shutil.copytree(tiny.folder("stable_diffusion"), tmp_path / "copy"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(f".{end}"))
    with pytest.raises(
        CheckpointError, match=f"no safetensors weights in 'unet', and only {what} weights"
    ):
        from_pretrained(str(folder))


def test_a_modular_repository_of_the_hub_is_named(tmp_path, monkeypatch):
    repository = tmp_path / "models--somebody--blocks"
    (repository / "snapshots" / "0123abc").mkdir(parents=True)
    (repository / "snapshots" / "0123abc" / "modular_model_index.json").write_text("{}")
    (repository / ".no_exist" / "0123abc").mkdir(parents=True)
    (repository / ".no_exist" / "0123abc" / "model_index.json").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"Hub id 'somebody/blocks' has a modular_model_index\.json"
    ):
        from_pretrained("somebody/blocks")


def bert():
    """A StableDiffusionPipeline with BERT as its text encoder."""
    pipe = tiny.build("stable_diffusion")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "heart", "cat"]
    pipe.tokenizer = transformers.BertTokenizer(
        vocab={word: i for i, word in enumerate(words)}, model_max_length=12
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        pipe.text_encoder = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(words),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=12,
            )
        ).eval()
    return pipe


def test_a_checkpoint_with_a_bert_text_encoder_opens(tmp_path):
    pipe = bert()
    pipe.save_pretrained(tmp_path)
    tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    words = json.loads(tokenizer.read_text())["model"]["vocab"]
    tokenizer.unlink()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)))
    model = from_pretrained(str(tmp_path), prompts=["a red heart", "a cat"])
    conditions, vector = model.encode("a red heart")
    expected = pipe.encode_prompt("a red heart", "cpu", 1, False)[0][0]
    torch.testing.assert_close(conditions["encoder_hidden_states"], expected)
    assert vector.shape == (16,)
    assert torch.equal(outputs(model), outputs(from_pipeline(pipe)))


@pytest.mark.parametrize(
    ("kind", "own", "other"),
    [
        ("CLIPTokenizer", "vocab.json", "spiece.model"),
        ("BertTokenizer", "vocab.txt", "vocab.json"),
        ("T5Tokenizer", "spiece.model", "vocab.txt"),
        ("LlamaTokenizer", "tokenizer.model", "vocab.json"),
        ("XLMRobertaTokenizer", "sentencepiece.bpe.model", "tokenizer.model"),
    ],
)
def test_a_tokenizer_without_the_files_of_its_class_is_no_empty_one(kind, own, other, tmp_path):
    """transformers makes up a tokenizer without words from the files of another class."""
    folder = Path(shutil.copytree(tiny.folder("stable_diffusion"), tmp_path / "copy"))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", kind]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "tokenizer" / other).touch()
    with pytest.raises(CheckpointError, match=f"has no tokenizer.json or {own} in 'tokenizer'"):
        from_pretrained(str(folder))
    for name in (own, "tokenizer.json"):
        (folder / "tokenizer" / name).touch()
        check_files(Source(str(folder), local=True), index, folder)
        (folder / "tokenizer" / name).unlink()


def test_names_of_schedulers_are_those_of_diffusers():
    from flowgym_gym.models.fitting import OTHER_SAMPLERS

    assert all(hasattr(diffusers, name) for name in OTHER_SAMPLERS)


def unreadable(path):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", "\ufeff{}", "[" * 100_000, "{" + '"a":' * 9, unreadable]
)
def test_an_index_that_cannot_be_read_is_named(damage, tmp_path, monkeypatch):
    index = tmp_path / "model_index.json"
    index.write_text("" if damage is unreadable else damage, encoding="utf-8")
    if damage is unreadable:
        monkeypatch.setattr(Path, "read_text", lambda path, **options: unreadable(path))
    with pytest.raises(
        CheckpointError, match=r"model_index\.json' cannot be read as a pipeline's index"
    ):
        from_pretrained(str(tmp_path))


def test_a_network_that_is_replaced_need_not_be_there(tmp_path):
    plain = tiny.folder("stable_diffusion")
    folder = shutil.copytree(plain, tmp_path / "copy")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert torch.equal(
        outputs(from_pretrained(str(folder), denoiser=plain)), outputs(from_pretrained(plain))
    )
    with pytest.raises(CheckpointError, match="has no safetensors weights in 'unet'"):
        from_pretrained(str(folder))
