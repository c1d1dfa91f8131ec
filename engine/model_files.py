"""Where a model's files lie, and what they are called by their content.

In comes a model's name: ``ViT-B-32/laion2b_s34b_b79k`` (open_clip's architecture and weights), ``hf-hub:OWNER/NAME``,
``local-dir:PATH``, or the name of the shipped ``phantom-clip``. Out go `ModelFiles`: config, weights, text tower config
and tokenizer on this machine, and digests of them all. A folder works wherever it lies: a text tower called "." or by
the hub id that its files came from is taken from the folder, and no network is used.

    open_clip_config.json      model_cfg, preprocess_cfg and, ours, a readable "name"
    open_clip_model.safetensors (or another name that open_clip knows)
    config.json                the Hugging Face text tower's config, if it has one
    tokenizer.json, vocab.txt, tokenizer_config.json ...
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.hub import HubRepository
from engine.resources import resource

CONFIG_FILE = "open_clip_config.json"
TEXT_CONFIG_FILE = "config.json"
# In the order in which open_clip's own factory prefers them.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
HUB_WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# Python's lock is let go of while a block is read or hashed. Small blocks would wait for it more often than they work,
# beside a thread that builds the model.
HASHED_AT_ONCE = 16 << 20

FOLDER = "local-dir:"
SHIPPED = {"phantom-clip": "configs/phantom-clip"}


@dataclass(frozen=True)
class ModelFiles:
    """A model's files on this machine.

    Parameters
    ----------
    source : str
        The name as the user gave it.
    config : dict
        ``model_cfg``, ``preprocess_cfg`` and possibly ``name``, as in ``open_clip_config.json``.
    weights : Path
    folder : Path or None
        Where ``open_clip_config.json`` lies; None for open_clip's built-in architectures.
    builtin : (architecture, weights tag) or None
    text_config, tokenizer : Path or None
        Folders of the Hugging Face text tower's ``config.json`` and tokenizer; None where open_clip's own are used.
    """

    source: str
    config: Mapping[str, Any]
    weights: Path
    folder: Path | None = None
    builtin: tuple[str, str] | None = None
    text_config: Path | None = None
    tokenizer: Path | None = None

    @property
    def model_cfg(self) -> dict[str, Any]:
        """A copy of open_clip's ``model_cfg``."""
        return deepcopy(dict(self.config["model_cfg"]))

    @cached_property
    def name(self) -> str:
        """Short readable name, safe as a file name: it comes from what the files say, never from where they lie."""
        named = self.config.get("name") or _architecture_name(self.config["model_cfg"])
        return re.sub(r"[^A-Za-z0-9._-]+", "-", str(named)).strip("-.")[:64] or "model"

    @property
    def weights_digest(self) -> str:
        """BLAKE2b-256 of the weights file's bytes, in hexadecimal."""
        return self.hashing.result()

    @cached_property
    def hashing(self) -> Future[str]:
        """The digest to come, from a thread that this begins: it takes as long as loading the weights does."""
        digest: Future[str] = Future()

        def run() -> None:
            try:
                digest.set_result(file_digest(self.weights))
            except BaseException as error:
                digest.set_exception(error)

        threading.Thread(target=run, name="digest", daemon=True).start()
        return digest

    @cached_property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer's files that exist, in a fixed order."""
        if self.tokenizer is None:
            return ()
        return tuple(self.tokenizer / name for name in TOKENIZER_FILES if (self.tokenizer / name).is_file())

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the numbers depend on, fit for JSON, without any path."""
        cfg = self.model_cfg
        for section, keys in _NOT_OF_THE_NUMBERS.items():
            for key in keys:
                cfg.get(section, {}).pop(key, None)
        text_tower = None
        if self.text_config is not None:
            text_tower = _read_json(self.text_config / TEXT_CONFIG_FILE)
            for key in ("_name_or_path", "transformers_version"):
                text_tower.pop(key, None)
        return {
            "model": cfg,
            "weights": {"digest": self.weights_digest, "bytes": self.weights.stat().st_size},
            "text_tower": text_tower,
            "tokenizer": {path.name: file_digest(path) for path in self.tokenizer_files} or "open_clip",
        }


_NOT_OF_THE_NUMBERS = {
    "vision_cfg": ("timm_model_pretrained",),
    "text_cfg": ("hf_model_name", "hf_tokenizer_name", "hf_model_pretrained"),
}


def resolve_model(name: str) -> ModelFiles:
    """Find a model's files by its name; only hub and built-in names may use the network.

    Raises
    ------
    ModelError
        Unknown name (the nearest is offered), no such folder, or a folder that lacks a part.
    """
    if name in SHIPPED:
        return _from_folder(resource(SHIPPED[name]), name)
    if name.startswith(FOLDER) and name != FOLDER:
        return _from_folder(Path(name.removeprefix(FOLDER)).expanduser(), name)
    import open_clip  # takes seconds, and folders do without

    try:
        schema, identifier = open_clip.factory.parse_model_name(name)
    except ValueError as error:
        raise ModelError(f"model {name!r}: {error}") from None
    if schema == "hf-hub":
        return _from_hub(identifier, name)
    return _from_builtin(identifier)


def file_digest(path: Path) -> str:
    """Return the BLAKE2b-256 of a file's bytes, in hexadecimal."""
    digest, block = hashlib.blake2b(digest_size=32), memoryview(bytearray(HASHED_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def find_weights(folder: Path) -> Path:
    """Return the weights file of a model folder, the one that open_clip's factory would take.

    Raises
    ------
    ModelError
        There is none, or several with names that say nothing about which is meant.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for suffix in (".safetensors", ".bin", ".pth") for path in folder.glob(f"*{suffix}"))
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(path.name for path in others)
        raise ModelError(f"model folder {str(folder)!r} has several weight files ({names}); call one {WEIGHT_FILES[0]}")
    raise ModelError(f"model folder {str(folder)!r} has no weights; put them there as {' or '.join(HUB_WEIGHT_FILES)}")


# -- By kind of name -------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, source: str) -> ModelFiles:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelError(f"model folder {str(folder)!r} {what}; local-dir: takes a folder with {CONFIG_FILE} in it")
    folder = folder.resolve()
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(
            f"model folder {str(folder)!r} has no {CONFIG_FILE}; "
            "`fluoro model pack hf-hub:OWNER/NAME FOLDER` writes whole folders"
        )
    config = _read_config(folder / CONFIG_FILE)
    text_config, tokenizer = None, None
    tower, vocabulary = _text_names(config, folder / CONFIG_FILE)
    if tower is not None:
        text_config = _text_config_in(folder, tower)
    if vocabulary is not None:
        tokenizer = _tokenizer_in(folder, vocabulary)
    return ModelFiles(source, config, find_weights(folder), folder, None, text_config, tokenizer)


def _from_hub(repository: str, source: str) -> ModelFiles:
    hub = HubRepository(repository)
    config_path = hub.require(CONFIG_FILE)
    config = {"name": repository.rpartition("/")[2], **_read_config(config_path)}
    weights = next((path for name in HUB_WEIGHT_FILES if (path := hub.find(name)) is not None), None)
    if weights is None:
        raise ModelError(f"hub repository {repository!r} has no weights ({' or '.join(HUB_WEIGHT_FILES)})")
    if weights.parent != config_path.parent:
        # the weights were fetched just now and the repository has moved on since its config was cached
        config_path = hub.require(CONFIG_FILE)
        config = {"name": repository.rpartition("/")[2], **_read_config(config_path)}
    text_config, tokenizer = _hub_text_tower(*_text_names(config, f"{CONFIG_FILE} of {source}"))
    return ModelFiles(source, config, weights, config_path.parent, None, text_config, tokenizer)


def _from_builtin(name: str) -> ModelFiles:
    import open_clip

    architecture, slash, tag = name.rpartition("/")
    if not slash:
        architecture, tag = name, ""
    architecture = architecture.replace("/", "-")
    cfg = open_clip.get_model_config(architecture)
    if cfg is None:
        raise ModelError(_unknown_name(name, architecture))
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    pretrained = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if not pretrained:
        near = difflib.get_close_matches(tag, tags, n=1, cutoff=0.4)
        hint = f"did you mean {architecture}/{near[0]}?" if near else f"known: {', '.join(tags) or 'none'}"
        what = f"no weights called {tag!r}" if tag else f"no weights without a tag, as in {architecture}/TAG"
        raise ModelError(f"open_clip's {architecture} has {what}; {hint}")
    tag = tag.lower().replace("-", "_")
    if pretrained.get("quick_gelu"):
        # open_clip only warns when weights meet another activation than theirs, and computes other numbers
        cfg["quick_gelu"] = True
    preprocess = {
        key: pretrained[key]
        for key in ("mean", "std", "interpolation", "resize_mode")
        if pretrained.get(key) is not None
    }
    config = {"name": f"{architecture}-{tag}", "model_cfg": cfg, "preprocess_cfg": preprocess}
    text_config, tokenizer = _hub_text_tower(*_text_names(config, f"open_clip's {architecture}"))
    try:
        weights = Path(open_clip.download_pretrained(pretrained))
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the weights of {name!r} are not cached and cannot be downloaded ({error}); "
            "without a network use a packed folder: local-dir:FOLDER"
        ) from error
    return ModelFiles(name, config, weights, None, (architecture, tag), text_config, tokenizer)


def _hub_text_tower(tower: str | None, vocabulary: str | None) -> tuple[Path | None, Path | None]:
    """Return the folders of a text tower's config and of its tokenizer, by their hub names."""
    text_config = None if tower is None else HubRepository(tower).require(TEXT_CONFIG_FILE).parent
    if vocabulary is None:
        return text_config, None
    # some tokenizers find their class through the model's config.json
    hub = HubRepository(vocabulary)
    found = hub.find_all((*TOKENIZER_FILES, TEXT_CONFIG_FILE))
    if not any(path.name in VOCABULARY_FILES for path in found):
        if hub.unreachable is not None:
            raise hub.unreachable
        raise ModelError(f"hub repository {vocabulary!r} has no tokenizer ({', '.join(VOCABULARY_FILES)})")
    return text_config, found[0].parent


def _text_names(config: Mapping[str, Any], place: str | Path) -> tuple[str | None, str | None]:
    """Return what a config calls its Hugging Face text tower and tokenizer."""
    text = config["model_cfg"]["text_cfg"]
    tower, vocabulary = text.get("hf_model_name"), text.get("hf_tokenizer_name")
    if tower and not vocabulary:
        raise ModelError(
            f"{place} names a Hugging Face text tower ({tower!r}) but no tokenizer, and CLIP's own would give it "
            'the wrong words; add "hf_tokenizer_name" to text_cfg'
        )
    return tower or None, vocabulary or None


def _text_config_in(folder: Path, tower: str) -> Path:
    """Return the folder of a text tower's config: a sub-folder if it is called so, else the model folder itself."""
    for candidate in (_inside(folder, tower), folder, Path(tower)):
        if candidate is None or not (candidate / TEXT_CONFIG_FILE).is_file():
            continue
        if candidate == Path(tower) and not candidate.is_absolute():
            continue
        if "model_type" not in _read_json(candidate / TEXT_CONFIG_FILE):
            raise ModelError(
                f"{candidate / TEXT_CONFIG_FILE} has no model_type, so it is no Hugging Face text tower's config"
            )
        return candidate
    raise ModelError(
        f"model folder {str(folder)!r} lacks {TEXT_CONFIG_FILE} of its text tower {tower!r}; copy it there, or write "
        "the folder anew with `fluoro model pack hf-hub:OWNER/NAME FOLDER`"
    )


def _tokenizer_in(folder: Path, vocabulary: str) -> Path:
    for candidate in (_inside(folder, vocabulary), folder):
        if candidate is not None and any((candidate / name).is_file() for name in VOCABULARY_FILES):
            return candidate
    raise ModelError(
        f"model folder {str(folder)!r} has no tokenizer; copy tokenizer.json or vocab.txt of {vocabulary!r} there"
    )


def _inside(folder: Path, name: str) -> Path | None:
    """Return a sub-folder of that name, if it is one."""
    if name in ("", ".") or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    return folder / name if (folder / name).is_dir() else None


def _unknown_name(name: str, architecture: str) -> str:
    if Path(name).expanduser().is_dir():
        return f"unknown model {name!r}; a folder is named as local-dir:{name}"
    import open_clip

    known = [*open_clip.list_models(), *SHIPPED]
    near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.5) or difflib.get_close_matches(
        name, known, n=3
    )
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return (
        f"unknown model {name!r}{hint}. Names are ARCHITECTURE/WEIGHTS of open_clip, such as "
        "ViT-B-32/laion2b_s34b_b79k, hf-hub:OWNER/NAME, local-dir:FOLDER or phantom-clip"
    )


def _architecture_name(cfg: Mapping[str, Any]) -> str:
    vision = cfg["vision_cfg"]
    if vision.get("timm_model_name"):
        return str(vision["timm_model_name"])
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    if isinstance(layers, list | tuple):
        return f"resnet-{sum(layers)}x{width}"
    return f"vit-{layers}x{width}-p{vision.get('patch_size', 16)}-{vision.get('image_size', 224)}"


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    cfg = config.get("model_cfg")
    if not isinstance(cfg, dict) or not all(key in cfg for key in ("embed_dim", "vision_cfg", "text_cfg")):
        raise ModelError(
            f"{path} has no model_cfg with embed_dim, vision_cfg and text_cfg, so it is no open_clip config"
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
