"""Writing model folders that open_clip's `local-dir:` loads anywhere: packed from the hub, or with new weights.

A folder is written beside its place and moved there whole, so a killed or failed write leaves nothing that could be
taken for a model.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import open_clip
import safetensors.torch
import torch

from engine.errors import ModelError, UsageError
from engine.hub import HubRepository
from engine.model_files import CONFIG_FILE, TEXT_CONFIG_FILE, WEIGHT_FILES, ModelFiles, resolve_model

if TYPE_CHECKING:
    from engine.encoder import Encoder

CARD_FILES = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md")


def pack_model(name: str, directory: Path, *, overwrite: bool = False) -> Path:
    """Write a model as a folder that loads anywhere without a network, with the same encoder id.

    Parameters
    ----------
    name : str
        ``hf-hub:OWNER/NAME``, or another folder: ``local-dir:PATH``.
    directory : Path
        A new or an empty folder, unless `overwrite`.

    Raises
    ------
    ModelError
        The model cannot be found or lacks a part.
    UsageError
        The folder exists and holds something.
    """
    check_free(directory, overwrite)
    files = resolve_model(name)
    if files.builtin is not None:
        raise UsageError(
            f"{name!r} is one of open_clip's built-in names; pack it by its hub repository: hf-hub:OWNER/NAME"
        )
    weights_name = files.weights.name
    if weights_name not in WEIGHT_FILES:
        weights_name = next(name for name in WEIGHT_FILES if name.endswith(files.weights.suffix))

    def write(folder: Path) -> None:
        shutil.copyfile(files.weights, folder / weights_name)
        for path in _card_files(files):
            shutil.copyfile(path, folder / path.name)
        _write_towers(files, folder, files.config.get("name"))

    _write_whole(directory, write, overwrite)
    return directory


def save_model_folder(
    encoder: Encoder,
    state: Mapping[str, torch.Tensor],
    directory: Path,
    card: str,
    *,
    name: str,
    half: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write new weights of a loaded encoder's architecture as a model folder of their own.

    Parameters
    ----------
    encoder : Encoder
        Gives config, tokenizer and preprocessing, and the weights that `state` lacks; loaded in fp32, unless the state
        is whole.
    state : mapping of parameter name to Tensor
        Names as in ``encoder.model.state_dict()``; a part, such as ``visual.*``, is enough.
    directory : Path
        A new or an empty folder, unless `overwrite`.
    card : str
        The folder's README.md: what the model is, what it was trained on, what it must not be used for.
    name : str
        Readable name; becomes the first part of the encoder's id.
    half : bool
        Store floating-point weights in float16.

    Raises
    ------
    UsageError
        The folder holds something, or the state has names or shapes that the model does not have.
    """
    check_free(directory, overwrite)
    own = encoder.model.state_dict()
    strangers = [key for key, value in state.items() if key not in own or own[key].shape != value.shape]
    if strangers:
        raise UsageError(
            f"{len(strangers)} weights are not of this model's names and shapes, the first is {strangers[0]!r}"
        )
    lacking = [key for key in own if key not in state]
    if lacking and encoder.precision != "fp32":
        raise UsageError(
            f"the state lacks {len(lacking)} weights, and those of an encoder in {encoder.precision} are rounded; "
            "load it in fp32 to save a folder from it"
        )

    def stored(value: torch.Tensor) -> torch.Tensor:
        kept = value.detach().to("cpu", copy=True).contiguous()
        return kept.half() if half and kept.is_floating_point() else kept

    def write(folder: Path) -> None:
        weights = {key: stored(state.get(key, value)) for key, value in own.items()}
        safetensors.torch.save_file(weights, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
        _write_towers(encoder.files, folder, name)
        (folder / "README.md").write_text(card, encoding="utf-8")

    _write_whole(directory, write, overwrite)
    return directory


def check_free(directory: Path, overwrite: bool) -> None:
    """Raise UsageError where a folder would be written over."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{str(directory)!r} is a file; name a folder to write the model to")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise UsageError(
            f"model folder {str(directory)!r} is not empty: name another one, remove it, or say overwrite to replace it"
        )


def _card_files(files: ModelFiles) -> list[Path]:
    """Return readme and licence, which have to go with the weights."""
    schema, identifier = open_clip.factory.parse_model_name(files.source)
    if schema == "hf-hub":
        return HubRepository(identifier).find_all(CARD_FILES)
    assert files.folder is not None
    return [files.folder / name for name in CARD_FILES if (files.folder / name).is_file()]


def _write_towers(files: ModelFiles, folder: Path, name: str | None) -> None:
    """Write config, text tower config and tokenizer, with the text tower named as lying in the folder."""
    config = deepcopy(dict(files.config))
    text = config["model_cfg"]["text_cfg"]
    if files.text_config is not None:
        text["hf_model_name"] = "."
        shutil.copyfile(files.text_config / TEXT_CONFIG_FILE, folder / TEXT_CONFIG_FILE)
    if files.tokenizer is not None:
        text["hf_tokenizer_name"] = "."
        for path in files.tokenizer_files:
            shutil.copyfile(path, folder / path.name)
        if files.text_config is None and (files.tokenizer / TEXT_CONFIG_FILE).is_file():
            shutil.copyfile(files.tokenizer / TEXT_CONFIG_FILE, folder / TEXT_CONFIG_FILE)
    config.pop("name", None)
    named = {"name": name} if name else {}
    (folder / CONFIG_FILE).write_text(json.dumps({**named, **config}, indent=2) + "\n", encoding="utf-8")


def _write_whole(directory: Path, write: Callable[[Path], None], overwrite: bool) -> None:
    """Write a folder beside its place and move it there in one step, so that nobody finds half a model."""
    made = directory.parent / f".{directory.name}-{uuid.uuid4().hex[:8]}.partial"
    try:
        made.mkdir(parents=True)
        write(made)
        if overwrite and directory.exists():
            shutil.rmtree(directory)
        os.replace(made, directory)
    except OSError as error:
        raise ModelError(f"model folder {str(directory)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
