"""What an import refuses, and what it says: settings that are wrong or unclear, values that are no weights."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from integrations import planted
from undiffuse.core.errors import ArgumentError, CheckpointError
from undiffuse.integrations.diffusers import diffusers
from undiffuse.integrations.edm import edm
from undiffuse.integrations.guided_diffusion import guided_diffusion, read_flags
from undiffuse.integrations.reading import import_weights, read_file
from undiffuse.integrations.score_sde import score_sde


def test_another_number_of_steps_asks_how_times_were_counted():
    flags = {**planted.GUIDED["improved"], "diffusion_steps": 4000}
    with pytest.raises(ArgumentError, match="--rescale_timesteps True or False"):
        guided_diffusion(planted.weights("improved"), flags)
    scales = [
        guided_diffusion(planted.weights("improved"), {**flags, "rescale_timesteps": given}).net["noise_scale"]
        for given in ("True", False)
    ]
    assert scales == [1000, 4000]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("input_blocks.3.1.qkv.weight", (100, 64, 1)),  # its rows do not divide by head
        ("input_blocks.3.1.proj_out.weight", ()),
        ("time_embed.0.weight", (128, 48)),
    ],
)
def test_weights_that_do_not_fit_name_both_shapes(name, shape):
    flags, state = planted.GUIDED["improved"], dict(planted.weights("improved"))
    assert name in state
    state[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError) as caught:
        guided_diffusion(state, flags)
    said = str(caught.value)
    assert f"'{name}' of shape {shape}" in said
    assert "where this network's" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--image_size '64", "No closing quotation"),
        ("--image_size big", "image_size=big: expected a whole number"),
        ("--image_size 0", "image_size=0: expected 1 or more"),
        ("--dropout none", "dropout=none: expected a number"),
        ("--channel_mult 1,x", "channel_mult=1,x"),
        ("--channel_mult 0,1", "multiples of the first"),
        ("--channel_mult nan,1", "multiples of the first"),
        ("--attention_resolutions 16;8", "attention_resolutions=16;8"),
        ("--class_cond maybe", "class_cond 'maybe': expected true or false"),
    ],
)
def test_a_wrong_flag_is_named(line, message):
    with pytest.raises(ArgumentError, match=message):
        guided_diffusion({}, read_flags(line))


def test_switches_are_written_in_many_ways():
    state = planted.weights("improved")
    for word in ("t", "Y", "yes", "1", "True", "f", "N", "no", "0", "False"):
        flags = {**planted.GUIDED["improved"], "predict_xstart": word}
        assert guided_diffusion(state, flags).prediction == ("data" if word in "t Y yes 1 True" else "noise")


def test_labels_that_the_weights_have_not():
    state = {name: tensor for name, tensor in planted.weights("improved").items() if name != "label_emb.weight"}
    with pytest.raises(CheckpointError, match="class_cond is True, but the weights have no label_emb"):
        guided_diffusion(state, planted.GUIDED["improved"])


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "pointer of git-lfs, .* Run 'git lfs pull'",
        ),
        (b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"checkpoint\nof nothing\nand more\n", "it is text"),
        (b"import os\nos.path\n", "it is text"),
        (b"", "it is empty"),
        (bytes(range(200, 250)) + bytes(50), "cannot be read"),
    ],
)
def test_what_is_no_checkpoint_is_not_called_code(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_file(tmp_path / name)
    assert "names code" not in str(caught.value)
    assert "cannot be read" in str(caught.value)
    # Where it is known what the file is, the reader's own words would mislead: they advise to load it as code.
    if message != "cannot be read":
        assert "weights only" not in str(caught.value).lower().replace("_", " ")


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_recognised_in_every_protocol(protocol, tmp_path):
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"ema": pytest.raises, "kind": print}, protocol))
    with pytest.raises(CheckpointError, match="names code"):
        read_file(tmp_path / "weights.pt")


def test_a_truncated_pickle_of_plain_values_is_damaged(tmp_path):
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"a": list(range(1000))}, 4)[:500])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_file(tmp_path / "weights.pt")
    assert "names code" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        3,
        [1.0],
        None,
        torch.eye(128, 32).to_sparse(),
        torch.zeros(128, 32, dtype=torch.int64),
        torch.zeros(128, 32, device="meta"),
        torch.zeros(1, 1).expand(128, 32),
        torch.zeros(1).expand(10**14),
        torch.full((128, 32), torch.nan),
        torch.full((128, 32), torch.inf),
    ],
    ids=["int", "list", "none", "sparse", "whole", "meta", "expanded", "huge", "nan", "inf"],
)
@pytest.mark.parametrize("name", ["time_embed.0.weight", "label_emb.weight"])
def test_values_that_are_no_weights_are_named(name, value):
    state = {**planted.weights("improved"), name: value}
    with pytest.raises(CheckpointError, match=f"'{name}'.* dense tensor of finite numbers"):
        guided_diffusion(state, planted.GUIDED["improved"])


def test_half_precision_and_views_are_weights():
    state = {name: tensor.half() for name, tensor in planted.weights("improved").items()}
    state["time_embed.0.weight"] = state["time_embed.0.weight"].T.contiguous().T
    assert guided_diffusion(state, planted.GUIDED["improved"]).weights["embedding.first.weight"].dtype == torch.float32


def _edm(**changes):
    kind, arguments = planted.EDM["edm-ddpmpp"]
    return edm({"class": kind, "arguments": {**arguments, **changes}, "weights": planted.weights("edm-ddpmpp")})


def _diffusers(**changes):
    config = {**planted.DIFFUSERS["diffusers"], **changes}
    return diffusers(
        planted.weights("diffusers"), {key: value for key, value in config.items() if value != "absent"}, None
    )


def _song(**parts):
    return score_sde({"model": planted.weights("ncsnpp"), **parts}, planted.SCORE_SDE["ncsnpp"][0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _edm(channel_mult=3), ArgumentError, "channel_mult=3: expected a list"),
        (lambda: _edm(channel_mult=[]), ArgumentError, "channel_mult"),
        (lambda: _edm(attn_resolutions=3), ArgumentError, "EDM's arguments"),
        (lambda: _edm(encoder_type="none"), ArgumentError, "EDM's arguments"),
        (lambda: edm({"class": [], "arguments": {}}), ArgumentError, "EDM's arguments"),
        (lambda: edm({"class": "EDMPrecond", "arguments": []}), CheckpointError, "EDM's arguments: list"),
        (lambda: edm({**_exported(), "weights": 3}), CheckpointError, "EDM's weights: int"),
        (lambda: _diffusers(block_out_channels="absent"), ArgumentError, "config.json: there is no block_out_channels"),
        (lambda: _diffusers(block_out_channels=32), ArgumentError, "block_out_channels=32"),
        (lambda: _diffusers(sample_size="big"), ArgumentError, "config.json"),
        (lambda: diffusers({}, planted.DIFFUSERS["diffusers"], []), CheckpointError, "scheduler_config.json: list"),
        (lambda: _song(ema=[]), CheckpointError, "'ema': list"),
        (lambda: _song(model=3), CheckpointError, "'model': int"),
        (lambda: _song(ema={"shadow_params": 3}), CheckpointError, "shadow_params is a int"),
        (lambda: _song(ema={"shadow_params": [3]}), CheckpointError, r"'shadow_params\.0' is a int"),
        (lambda: _song(model={3: torch.zeros(1)}), CheckpointError, "the name 3 is no text"),
    ],
)
def test_settings_of_another_kind_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def _exported():
    kind, arguments = planted.EDM["edm-ddpmpp"]
    return {"class": kind, "arguments": arguments}


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000, "{"])
def test_a_config_that_is_no_mapping(content, tmp_path):
    save_file(planted.weights("diffusers"), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        import_weights(tmp_path)
