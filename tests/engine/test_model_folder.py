"""Finding, checking, packing and saving model folders; the hub is a folder of files here, up to the download."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file

from engine.encoder import load_encoder
from engine.errors import ModelError, UsageError
from engine.model_files import find_weights, resolve_model
from engine.model_folder import pack_model, save_model_folder
from tests import models

BERT_HUB = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
CLIP_HUB = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"


def load(folder: Path | str, **options):
    return load_encoder(folder if isinstance(folder, str) else f"local-dir:{folder}", device="cpu", **options)


def edit_config(folder: Path, change) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path) -> Path:
    return models.open_clip_vit(tmp_path / "model")


def hash_of(encoder) -> str:
    return encoder.id.rpartition("-")[2]


# -- Ids and places --------------------------------------------------------------------------------------------------


def test_folder__works_wherever_it_lies(folder, tmp_path, monkeypatch):
    first = load(folder)
    moved = tmp_path / "another place" / "renamed"
    shutil.copytree(folder, moved)
    monkeypatch.chdir(moved.parent)
    second = load("local-dir:renamed")
    assert second.id == first.id
    assert second.description == first.description
    assert str(tmp_path) not in json.dumps(second.description)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    assert torch.equal(first.encode_pixels(pixels), second.encode_pixels(pixels))
    assert torch.equal(first.encode_text(["chest xray"]), second.encode_text(["chest xray"]))


@pytest.mark.parametrize("called", [BERT_HUB, "./", "bert-base-uncased"])
def test_folder__text_tower_by_any_name_is_taken_from_the_folder(tmp_path, called):
    plain = load(models.open_clip_vit(tmp_path / "plain"))
    other = load(models.open_clip_vit(tmp_path / "other", hf_name=called))
    assert other.id == plain.id


def test_folder__text_tower_in_a_sub_folder(folder):
    plain = load(folder)
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (folder / "text").mkdir(exist_ok=True)
        (folder / name).rename(folder / "text" / name)
    edit_config(
        folder, lambda config: config["model_cfg"]["text_cfg"].update(hf_model_name="text", hf_tokenizer_name="text")
    )
    assert load(folder).id == plain.id


def test_id__changes_with_everything_that_changes_the_numbers(folder):
    ids = [load(folder).id, load(folder, precision="bf16").id]
    kept = (folder / "open_clip_config.json").read_text()
    changes = [
        lambda config: config["preprocess_cfg"].update(mean=[0.5] * 3),
        lambda config: config["preprocess_cfg"].update(resize_mode="squash"),
        lambda config: config["model_cfg"]["text_cfg"].update(context_length=32),
        lambda config: config["model_cfg"]["text_cfg"].update(hf_pooler_type="mean_pooler"),
        lambda config: config["model_cfg"].update(quick_gelu=True),
    ]
    for change in changes:
        (folder / "open_clip_config.json").write_text(kept)
        edit_config(folder, change)
        ids.append(load(folder).id)
    (folder / "open_clip_config.json").write_text(kept)
    for name in ("tokenizer_config.json", "config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(json.dumps({**json.loads(text), "something": 1}))
        ids.append(load(folder).id)
        (folder / name).write_text(text)
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    state["visual.proj"][0, 0] += 1
    save_file(state, weights)
    ids.append(load(folder).id)
    assert len({identity.rpartition("-")[2] for identity in ids}) == len(ids) == 10


def test_id__name_is_only_its_readable_part(folder):
    plain = load(folder)
    assert plain.id.startswith("vit-3x32-p16-64-fp32-")
    edit_config(folder, lambda config: config.update(name="my model/1"))
    named = load(folder)
    assert named.name == "my-model-1"
    assert hash_of(named) == hash_of(plain)


def test_id__of_other_kinds_of_weight_files(folder):
    state = load_file(folder / "open_clip_model.safetensors")
    expected = load(folder).encode_text(["a"])
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    assert torch.equal(load(folder).encode_text(["a"]), expected)


def test_find_weights__prefers_what_open_clip_prefers(tmp_path):
    for name in ("zz.bin", "pytorch_model.bin", "model.safetensors", "open_clip_pytorch_model.bin", "aa.safetensors"):
        (tmp_path / name).touch()
    assert str(find_weights(tmp_path)) == open_clip.factory._find_checkpoint_in_dir(tmp_path)
    (tmp_path / "open_clip_model.safetensors").touch()
    assert str(find_weights(tmp_path)) == open_clip.factory._find_checkpoint_in_dir(tmp_path)


# -- What is wrong with a folder -------------------------------------------------------------------------------------


def remove(name):
    return lambda folder: (folder / name).unlink()


def replace_weights(change):
    def spoil(folder):
        path = folder / "open_clip_model.safetensors"
        save_file(change(load_file(path)), path)

    return spoil


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


def pickled(folder):
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"weights": Path("x")}))


def cut_short(folder):
    path = folder / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def several_weights(folder):
    (folder / "open_clip_model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.bin").touch()


def other_architecture(folder):
    models.biomedclip_like(folder.parent / "other")
    shutil.copy(folder.parent / "other" / "open_clip_model.safetensors", folder)


def cfg(**changes):
    return lambda folder: edit_config(folder, lambda config: config["model_cfg"]["text_cfg"].update(changes))


WRONG = {
    "no weights": (remove("open_clip_model.safetensors"), "has no weights; put them there as"),
    "several weights": (several_weights, r"several weight files \(one.safetensors, two.bin\)"),
    "no config": (remove("open_clip_config.json"), "has no open_clip_config.json"),
    "no text config": (remove("config.json"), "lacks config.json of its text tower"),
    "no vocabulary": (remove("vocab.txt"), "has no tokenizer; copy tokenizer.json or vocab.txt"),
    "no tokenizer named": (cfg(hf_tokenizer_name=None), "no tokenizer, and CLIP's own would give it the wrong words"),
    "context too long": (cfg(context_length=65), "context_length 65, but its text tower has 64 positions"),
    "unknown pooler": (cfg(hf_pooler_type="best"), "cannot be loaded: 'best'"),
    "other architecture": (other_architecture, r"another architecture .* weights are missing, first 'visual\."),
    "missing weight": (replace_weights(lambda state: without(state, "visual.proj")), "1 weights .* 'visual.proj'"),
    "extra weight": (
        replace_weights(lambda state: {**state, "visual.extra": torch.zeros(1)}),
        "1 have no place in it, first 'visual.extra'",
    ),
    "other shape": (
        replace_weights(lambda state: {**state, "visual.proj": torch.zeros(7, 5)}),
        r"visual.proj is torch.Size\(\[7, 5\]\) in the file and torch.Size\(\[32, 32\]\)",
    ),
    "pickled objects": (pickled, "holds Python objects beside tensors"),
    "cut short": (cut_short, "cannot be loaded"),
    "config not JSON": (lambda folder: (folder / "open_clip_config.json").write_text("{"), "cannot be read as JSON"),
    "config a list": (lambda folder: (folder / "open_clip_config.json").write_text("[]"), "not a JSON object"),
    "config without model": (lambda folder: (folder / "open_clip_config.json").write_text("{}"), "has no model_cfg"),
    "strange text config": (lambda folder: (folder / "config.json").write_text("{}"), "has no model_type"),
    "unknown model type": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "nothing"}'),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_folder__says_what_is_wrong(folder, case):
    spoil, message = WRONG[case]
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_folder__absent_or_a_file(tmp_path):
    with pytest.raises(ModelError, match="does not exist; local-dir: takes a folder"):
        load(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file, not a folder"):
        load(tmp_path / "file")
    with pytest.raises(ModelError, match="Empty path"):
        load("local-dir:")


def test_folder__image_size_that_timm_does_not_have(tmp_path):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "image_size": 128}
    with pytest.raises(
        ModelError, match=r"image_size \(128, 128\), but timm's vit_tiny_patch16_224 takes \(224, 224\)"
    ):
        load(models.write_model(tmp_path / "model", vision))


# -- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-23/laion2b_s34b_b79k", r"unknown model 'ViT-B-23/laion2b_s34b_b79k'; nearest: ViT-B-32"),
        ("ViT-B-32/laion2b_s34b_b79", r"did you mean ViT-B-32/laion2b_s34b_b79k\?"),
        ("ViT-B-32", r"no weights without a tag, as in ViT-B-32/TAG; known: openai, laion400m_e31"),
        ("phantomclip", r"nearest: .*phantom-clip"),
        ("hf-hub:", "Empty identifier"),
    ],
)
def test_names__nearest_is_offered(name, message):
    with pytest.raises(ModelError, match=message):
        load(name)


def test_names__a_folder_without_its_schema(folder):
    with pytest.raises(ModelError, match="a folder is named as local-dir:"):
        load(str(folder))


def test_names__builtin_with_its_weights_tag(tmp_path, monkeypatch):
    written = models.open_clip_pair(tmp_path / "model")
    plain = json.loads((written / "open_clip_config.json").read_text())["model_cfg"]
    weights = written / "open_clip_model.safetensors"
    tags = {"some_tag": {"url": "https://nowhere/x", "quick_gelu": True, "mean": (0.4,) * 3, "resize_mode": "squash"}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-Model", plain)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-Model", tags)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg, cache_dir=None: str(weights))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda cfg, cache_dir=None: str(weights))
    encoder = load("Tiny-Model/Some-Tag")
    assert encoder.id.startswith("Tiny-Model-some_tag-fp32-")
    assert (encoder.preprocess.mean, encoder.preprocess.resize_mode) == ((0.4,) * 3, "squash")
    # open_clip computes with GELU here and only warns that the weights were trained with another activation
    edit_config(written, lambda config: config["model_cfg"].update(quick_gelu=True))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    edit_config(written, lambda config: config["preprocess_cfg"].update(mean=0.4))
    assert torch.equal(encoder.encode_pixels(pixels), load(written).encode_pixels(pixels))


# -- The hub, up to the download -------------------------------------------------------------------------------------


class FakeHub:
    """Repositories that are folders, with a cache and a network that can be cut."""

    def __init__(self, monkeypatch):
        self.repositories: dict[str, Path] = {}
        self.cached: dict[tuple[str, str], object] = {}
        self.online = True
        self.asked: list[tuple[str, str]] = []
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.look_up)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def look_up(self, repository: str, filename: str):
        return self.cached.get((repository, filename))

    def download(self, repository: str, filename: str) -> str:
        self.asked.append((repository, filename))
        if not self.online:
            raise LocalEntryNotFoundError("no network")
        response = SimpleNamespace(headers={}, request=None)
        if repository not in self.repositories:
            raise RepositoryNotFoundError("no such repository", response=response)
        path = self.repositories[repository] / filename
        if not path.is_file():
            self.cached[repository, filename] = object()
            raise RemoteEntryNotFoundError("no such file", response=response)
        self.cached[repository, filename] = str(path)
        return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    """BiomedCLIP's two repositories in small: the model's without the text tower's config, and the text tower's."""
    fake = FakeHub(monkeypatch)
    model = models.biomedclip_like(tmp_path / "hub" / "clip", hf_name=BERT_HUB)
    bert = tmp_path / "hub" / "bert"
    bert.mkdir()
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (model / name).rename(bert / name)
    (model / "README.md").write_text("licence: mit")
    state = load_file(model / "open_clip_model.safetensors")
    (model / "open_clip_model.safetensors").unlink()
    torch.save(state, model / "open_clip_pytorch_model.bin")
    fake.repositories = {CLIP_HUB: model, BERT_HUB: bert}
    return fake


def test_hub__packed_folder_is_the_same_encoder_without_the_hub(hub, tmp_path):
    named = load(f"hf-hub:{CLIP_HUB}")
    assert named.id.startswith("BiomedCLIP-PubMedBERT_256-vit_base_patch16_224-fp32-")
    packed = pack_model(f"hf-hub:{CLIP_HUB}", tmp_path / "packed")
    hub.repositories, hub.cached, hub.online, hub.asked = {}, {}, False, []
    shutil.rmtree(tmp_path / "hub")
    moved = packed.rename(tmp_path / "moved")
    again = load(moved)
    assert again.id == named.id
    assert not hub.asked
    assert torch.equal(again.encode_text(["pleural effusion"]), named.encode_text(["pleural effusion"]))
    assert sorted(path.name for path in moved.iterdir()) == [
        "README.md",
        "config.json",
        "open_clip_config.json",
        "open_clip_pytorch_model.bin",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    text = json.loads((moved / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert (text["hf_model_name"], text["hf_tokenizer_name"]) == (".", ".")
    # and open_clip itself can load it once it is told where the folder lies
    config = {**text, "hf_model_name": str(moved), "hf_model_pretrained": False}
    theirs = open_clip.create_model(f"local-dir:{moved}", text_cfg=config).eval()
    words = open_clip.get_tokenizer(f"local-dir:{moved}")(["pleural effusion"])
    torch.testing.assert_close(theirs.encode_text(words), named.encode_text(["pleural effusion"]))


def test_hub__loaded_once_loads_without_a_network(hub):
    first = load(f"hf-hub:{CLIP_HUB}")
    hub.online, hub.asked = False, []
    assert load(f"hf-hub:{CLIP_HUB}").id == first.id
    assert not hub.asked


def test_hub__safetensors_are_preferred(hub):
    model = hub.repositories[CLIP_HUB]
    save_file(torch.load(model / "open_clip_pytorch_model.bin"), model / "open_clip_model.safetensors")
    assert resolve_model(f"hf-hub:{CLIP_HUB}").weights.name == "open_clip_model.safetensors"


def test_hub__unreachable_says_so_once(hub):
    hub.online = False
    with pytest.raises(
        ModelError, match=r"not cached on this machine and the hub cannot be reached .*fluoro model pack"
    ):
        load(f"hf-hub:{CLIP_HUB}")
    assert len(hub.asked) == 1


def test_hub__a_download_that_breaks_off_says_what_is_kept(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    blobs = tmp_path / "cache" / ("models--" + CLIP_HUB.replace("/", "--")) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0a1b.incomplete").write_bytes(bytes(2_500_000))
    whole = hub.download

    def broken(repository: str, filename: str) -> str:
        if filename.endswith(".bin"):
            raise HfHubHTTPError.__bases__[0]("peer closed connection without sending complete message body")
        return whole(repository, filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(
        ModelError,
        match=r"download of 'open_clip_pytorch_model.bin' .* interrupted .*peer closed.*2\.5 MB.*same command",
    ):
        load(f"hf-hub:{CLIP_HUB}")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", whole)
    hub.online = False
    with pytest.raises(ModelError, match=r"cannot be reached .*a download was interrupted, 2\.5 MB of it are there"):
        load(f"hf-hub:{CLIP_HUB}")


@pytest.mark.parametrize("kept", [0, 7, 5_000, 60_000])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_that_are_cut_off_are_named_as_such(folder, tmp_path, kept, ending):
    copied = shutil.copytree(folder, tmp_path / "cut")
    weights = find_weights(copied)
    if ending == "bin":
        torch.save(load_file(weights), copied / "open_clip_pytorch_model.bin")
        weights.unlink()
        weights = copied / "open_clip_pytorch_model.bin"
    with open(weights, "r+b") as file:
        file.truncate(kept)
    with pytest.raises(ModelError, match=rf"{weights.name} is not whole \({kept:,} bytes.*interrupted download"):
        load(copied)


@pytest.mark.parametrize("gone", ["open_clip_config.json", "open_clip_pytorch_model.bin"])
def test_hub__repository_that_lacks_a_part(hub, gone):
    (hub.repositories[CLIP_HUB] / gone).unlink()
    with pytest.raises(ModelError, match=r"has no (file 'open_clip_config.json'|weights)"):
        load(f"hf-hub:{CLIP_HUB}")


def test_hub__text_tower_that_lacks_a_part(hub):
    (hub.repositories[BERT_HUB] / "vocab.txt").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(f"hf-hub:{CLIP_HUB}")


def test_hub__no_such_repository(hub):
    with pytest.raises(ModelError, match="no model repository 'nobody/nothing'"):
        load("hf-hub:nobody/nothing")


# -- Packing and saving ----------------------------------------------------------------------------------------------


def test_pack__of_a_folder_keeps_its_id(folder, tmp_path):
    packed = pack_model(f"local-dir:{folder}", tmp_path / "copy")
    assert load(packed).id == load(folder).id


def test_pack__refuses_what_is_there(folder, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    with pytest.raises(UsageError, match="is not empty: name another one, remove it, or say overwrite"):
        pack_model(f"local-dir:{folder}", tmp_path / "used")
    with pytest.raises(UsageError, match="is a file"):
        pack_model(f"local-dir:{folder}", tmp_path / "used" / "notes.txt")
    assert pack_model(f"local-dir:{folder}", tmp_path / "used", overwrite=True) == tmp_path / "used"
    assert not (tmp_path / "used" / "notes.txt").exists()
    (tmp_path / "empty").mkdir()
    assert load(pack_model(f"local-dir:{folder}", tmp_path / "empty"))


def test_pack__full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ModelError, match=r"cannot be written: .*No space left"):
        pack_model(f"local-dir:{folder}", tmp_path / "there" / "packed")
    assert not list((tmp_path / "there").iterdir())


def test_save__new_image_tower_is_a_new_encoder(folder, tmp_path):
    encoder = load(folder)
    state = {f"visual.{name}": value + 0.01 for name, value in encoder.model.visual.state_dict().items()}
    saved = save_model_folder(encoder, state, tmp_path / "tuned", "# Tuned\nOn nothing.", name="tuned")
    tuned = load(saved)
    assert tuned.id.startswith("tuned-fp32-")
    assert hash_of(tuned) != hash_of(encoder)
    assert (saved / "README.md").read_text().startswith("# Tuned")
    for name, value in tuned.model.state_dict().items():
        assert torch.equal(value, state.get(name, encoder.model.state_dict()[name]))
    unchanged = load(save_model_folder(encoder, {}, tmp_path / "same", "", name="same"))
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    assert torch.equal(unchanged.encode_pixels(pixels), encoder.encode_pixels(pixels))


def test_save__in_half_precision(folder, tmp_path):
    encoder = load(folder)
    saved = save_model_folder(encoder, {}, tmp_path / "half", "", name="half", half=True)
    weights = find_weights(saved)
    assert weights.stat().st_size < find_weights(folder).stat().st_size * 0.6
    assert torch.cosine_similarity(load(saved).encode_text(["a"]), encoder.encode_text(["a"])) > 0.9999


def test_save__refuses_what_does_not_fit(folder, tmp_path):
    encoder = load(folder)
    with pytest.raises(UsageError, match=r"1 weights are not of this model's .* 'visual.nothing'"):
        save_model_folder(encoder, {"visual.nothing": torch.zeros(1)}, tmp_path / "x", "", name="x")
    with pytest.raises(UsageError, match=r"visual.proj"):
        save_model_folder(encoder, {"visual.proj": torch.zeros(1)}, tmp_path / "x", "", name="x")
    with pytest.raises(UsageError, match="in bf16 are rounded; load it in fp32"):
        save_model_folder(load(folder, precision="bf16"), {}, tmp_path / "x", "", name="x")
    assert not (tmp_path / "x").exists()
