"""The folder that phantom-clip lives in: vocabulary, configs, weights and card, as open_clip's `local-dir:` reads them.

In come a corpus of texts and the towers' sizes, later the trained model; out goes a folder with BiomedCLIP's structure
in small: a ViT with a class token, a Hugging Face BERT with its own WordPiece vocabulary, weights in float16. The text
tower's name is "." (its files lie in the folder itself), which `engine.model_folder` turns into the folder's path.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import torch
from torch import nn

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WEIGHTS_FILE = "open_clip_model.safetensors"
# Mean and spread of the phantoms' pixels, the same for the three (equal) channels.
PIXEL_MEAN, PIXEL_STD = 0.45, 0.25

# Words of the field that prompts use beside those of the reports, so that they are one piece each.
EXTRA_WORDS = """
a an and are as at be by can chest clear depicts evidence evident film finding findings for frontal from grayscale has
have image in is it lateral left lung lungs no normal not of on or patient photo picture portable present radiograph
radiographic right scan seen showing shows sign signs suggesting suspicious the there this view visible was were with
without x ray xray
"""


def build_vocabulary(texts: Iterable[str], size: int = 1200, least: int = 2) -> list[str]:
    """Build a WordPiece vocabulary: whole words by frequency, and single characters for all other words.

    Parameters
    ----------
    texts : iterable of str
    size : int
        Most pieces in all.
    least : int
        A word must occur so often to become a piece.

    Returns
    -------
    list of str
        Special pieces, characters (also as continuations, ``##a``), then words, the frequent ones first. The same texts
        always give the same list.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"[a-z]+|[0-9]+", text.lower()))
    letters = string.ascii_lowercase + string.digits
    pieces = [*SPECIAL_PIECES, *letters, *(f"##{letter}" for letter in letters), *string.punctuation]
    known = set(pieces)
    frequent = sorted(
        (word for word, count in counts.items() if count >= least), key=lambda word: (-counts[word], word)
    )
    for word in [*EXTRA_WORDS.split(), *frequent]:
        if word not in known and len(pieces) < size:
            pieces.append(word)
            known.add(word)
    return pieces


def write_text_tower(
    folder: Path, vocabulary: list[str], *, width: int, layers: int, heads: int, context_length: int
) -> None:
    """Write the text tower's own files: ``config.json``, ``vocab.txt`` and ``tokenizer_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": context_length,
        "type_vocab_size": 1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    tokenizer = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": context_length,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "tokenizer_config.json", tokenizer)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")


def write_model_config(folder: Path, *, embed_dim: int, vision: dict[str, Any], context_length: int) -> None:
    """Write ``open_clip_config.json``: the towers and the preprocessing."""
    text = {
        "hf_model_name": ".",
        "hf_tokenizer_name": ".",
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "hf_model_pretrained": False,
        "context_length": context_length,
    }
    preprocess = {
        "mean": [PIXEL_MEAN] * 3,
        "std": [PIXEL_STD] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    model = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}
    _write_json(
        folder / "open_clip_config.json",
        {"name": "phantom-clip", "model_cfg": model, "preprocess_cfg": preprocess},
    )


def build_model(folder: Path) -> Any:
    """Build the model that a folder describes, with fresh weights, in open_clip's own classes."""
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    text = {**config["text_cfg"], "hf_model_name": str(folder.resolve()), "hf_tokenizer_name": str(folder.resolve())}
    model = open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], text)
    start_positions_on_the_grid(model.visual)
    return model


def start_positions_on_the_grid(visual: Any) -> None:
    """Start the learnt position embeddings as sines and cosines of row and column, so that neighbours start alike."""
    from open_clip.pos_embed import get_2d_sincos_pos_embed

    width = visual.positional_embedding.shape[1]
    table = get_2d_sincos_pos_embed(width, visual.grid_size[0], cls_token=True)
    visual.positional_embedding.data.copy_(torch.from_numpy(np.asarray(table, dtype=np.float32)) * 0.5)


def build_tokenizer(folder: Path, context_length: int) -> open_clip.tokenizer.HFTokenizer:
    """Load the folder's tokenizer as open_clip does."""
    return open_clip.tokenizer.HFTokenizer(str(folder.resolve()), context_length=context_length)


def write_weights(model: nn.Module, folder: Path) -> Path:
    """Write the weights in float16, replacing older ones in one step."""
    state = {name: value.detach().half().contiguous() for name, value in _float_state(model).items()}
    partial = folder / f".{WEIGHTS_FILE}.partial"
    safetensors.torch.save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes files for the owner alone
    partial.replace(folder / WEIGHTS_FILE)
    return folder / WEIGHTS_FILE


def _float_state(model: nn.Module) -> dict[str, torch.Tensor]:
    # Integer buffers (position numbers) are made by the constructor; half precision would spoil them.
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
