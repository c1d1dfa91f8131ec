"""From a model's files to open_clip's own objects: the model with its weights, in float32 on the CPU, and tokenizer.

open_clip's factory does the work. Added are the paths that it does not resolve, checks of what it lets pass, and errors
that say which weights do not fit.
"""

from __future__ import annotations

import json
import pickle
import re
from typing import Any

import open_clip
import safetensors
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from engine.errors import ModelError
from engine.model_files import TEXT_CONFIG_FILE, ModelFiles

_LOADING_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    StopIteration,
    EOFError,
    OSError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
)


def build_model(files: ModelFiles) -> Any:
    """Build a model by open_clip's factory, on the CPU, in float32, with its weights.

    Raises
    ------
    ModelError
        The weights do not fit the config, hold more than tensors or are broken; or the config asks for what cannot be.
    """
    cfg = files.model_cfg
    options: dict[str, Any] = {"pretrained_image": False, "pretrained_text": False, "weights_only": True}
    if files.text_config is not None:
        _check_context(cfg["text_cfg"], files)
        # open_clip takes the name as it stands, and so relative to wherever the process runs
        options["text_cfg"] = {
            **cfg["text_cfg"],
            "hf_model_name": str(files.text_config),
            "hf_model_pretrained": False,
        }
    if files.builtin is not None:
        architecture, tag = files.builtin
        name, options["pretrained"] = architecture, tag
        options["force_quick_gelu"] = bool(cfg.get("quick_gelu"))
    else:
        name = f"local-dir:{files.folder}"
    try:
        # a few fresh weights are still drawn; that is not to move anyone's random numbers
        with torch.random.fork_rng(devices=[]), _Undrawn():
            model = open_clip.create_model(name, require_pretrained=True, **options)
    except _LOADING_ERRORS as error:
        raise ModelError(_why_not_loaded(files, error)) from error
    _check_image_size(model, files)
    return model


class _Undrawn(TorchFunctionMode):
    """Within this, weights to be drawn keep what their memory held, which saves a second for 150 million of them.

    The stored weights replace every one: open_clip's factory loads them strictly, so a file that lacks one is an error.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in _DRAWING:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


# What torch asks about its own functions before it calls the tensor's, and the tensor's where it does not ask.
_DRAWING = {
    *(nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_),
    *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_),
}


def _check_context(text_cfg: dict[str, Any], files: ModelFiles) -> None:
    assert files.text_config is not None
    tower = json.loads((files.text_config / TEXT_CONFIG_FILE).read_text(encoding="utf-8"))
    context, positions = text_cfg.get("context_length", 77), tower.get("max_position_embeddings")
    if isinstance(positions, int) and context > positions:
        raise ModelError(
            f"model {files.source!r} has context_length {context}, but its text tower has {positions} positions; "
            "lower it in text_cfg"
        )


def _check_image_size(model: Any, files: ModelFiles) -> None:
    """Compare the config's image size with the only one that a timm ViT can take: open_clip does not pass it on."""
    patches = getattr(getattr(model.visual, "trunk", None), "patch_embed", None)
    if patches is None or not getattr(patches, "strict_img_size", False) or not getattr(patches, "img_size", None):
        return
    size = model.visual.image_size
    asked = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(patches.img_size) != asked:
        name = files.model_cfg["vision_cfg"].get("timm_model_name")
        raise ModelError(
            f"model {files.source!r} has image_size {asked}, but timm's {name} takes {tuple(patches.img_size)}; "
            "open_clip cannot change that, so correct image_size in vision_cfg"
        )


def _why_not_loaded(files: ModelFiles, error: BaseException) -> str:
    text = str(error)
    start = f"model {files.source!r} cannot be loaded: "
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"{start}{files.weights} holds Python objects beside tensors, and loading them could run any code; "
            "convert it to safetensors where it comes from"
        )
    other = f"{start}the weights in {files.weights.name} are of another architecture than the config's:"
    mismatched = re.findall(
        r"size mismatch for (\S+): .*?shape (\S+\(.*?\)) .*?current model is (\S+\(.*?\))", text, re.S
    )
    if mismatched:
        key, stored, built = mismatched[0]
        return f"{other} {key} is {stored} in the file and {built} in the config's model"
    missing = re.findall(r'"([^"]+)"', _part(text, "Missing key(s) in state_dict:"))
    unexpected = re.findall(r'"([^"]+)"', _part(text, "Unexpected key(s) in state_dict:"))
    if missing or unexpected:
        told = [f"{len(missing)} weights are missing, first {missing[0]!r}"] if missing else []
        told += [f"{len(unexpected)} have no place in it, first {unexpected[0]!r}"] if unexpected else []
        return f"{other} {'; '.join(told)}"
    reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if re.search(_CUT_OFF, f"{type(error).__name__} {text}", re.IGNORECASE):
        size = files.weights.stat().st_size
        return (
            f"{start}{files.weights} is not whole ({size:,} bytes; {reason}), as after an interrupted download or "
            "copy; fetch it again"
        )
    return f"{start}{reason} (weights {files.weights.name})"


# What safetensors and torch say of a file that ends too early.
_CUT_OFF = (
    "incomplete ?metadata|metadata ?incomplete|header ?too|invalid ?header|file not fully covered"
    "|failed reading zip archive|failed finding central directory|EOFError|unexpected EOF|Errno 22|invalid magic number"
)


def _part(text: str, heading: str) -> str:
    """Return the line of torch's message that follows a heading."""
    _, found, rest = text.partition(heading)
    return rest.splitlines()[0] if found and rest else ""


def build_tokenizer(files: ModelFiles) -> Any:
    """Build open_clip's tokenizer: the Hugging Face one in the model's files, or open_clip's own."""
    text = files.model_cfg["text_cfg"]
    try:
        if files.tokenizer is None:
            name = files.builtin[0] if files.builtin is not None else f"local-dir:{files.folder}"
            return open_clip.get_tokenizer(name)
        return open_clip.tokenizer.HFTokenizer(
            str(files.tokenizer),
            context_length=text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
            tokenizer_mode=text.get("tokenizer_mode"),
            local_files_only=True,
            **(text.get("tokenizer_kwargs") or {}),
        )
    except _LOADING_ERRORS as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"the tokenizer of model {files.source!r} cannot be loaded: {first}") from error
