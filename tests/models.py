"""Small `local-dir:` models with random weights, one of each kind of tower, for tests.

Every builder writes a folder that open_clip's own factory could load and returns its path; the same seed gives the same
weights. They are built in well under a second and need no network.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

WORDS = """
    a an the of is no with in on at and or left right lung heart chest xray radiograph showing photo normal mild large
    small enlarged cardiomediastinum cardiomegaly opacity lesion edema consolidation pneumonia atelectasis pneumothorax
    pleural effusion other fracture support devices finding findings impression clear acute disease
"""

BERT_CONTEXT = 64


def write_bert_files(folder: Path, *, width: int = 32, layers: int = 2, context_length: int = BERT_CONTEXT) -> None:
    """Write the text tower's config and its tokenizer: what a Hugging Face BERT folder holds, without weights."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = list(dict.fromkeys([*special, *characters, *(f"##{letter}" for letter in characters), *WORDS.split()]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
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
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(pieces),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": context_length,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_model(
    folder: Path,
    vision: dict[str, Any],
    text: dict[str, Any] | None = None,
    *,
    embed_dim: int = 32,
    preprocess: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hf_name: str = ".",
) -> Path:
    """Write a model folder with random weights.

    Parameters
    ----------
    vision : dict
        open_clip's vision_cfg.
    text : dict, optional
        open_clip's text_cfg; by default a tiny BERT with its files in the folder, pooled as BiomedCLIP's.
    hf_name : str
        What the config calls the BERT: "." or the hub id that its files came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if text is None:
        write_bert_files(folder)
        text = {
            "hf_model_name": hf_name,
            "hf_tokenizer_name": hf_name,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": BERT_CONTEXT,
        }
    config = {
        "model_cfg": {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": preprocess or {},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    resolved = dict(text, hf_model_pretrained=False)
    if "hf_model_name" in text:
        resolved["hf_model_name"] = str(folder.resolve())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class = open_clip.CustomTextCLIP if "hf_model_name" in text else open_clip.CLIP
        model = model_class(embed_dim, vision, resolved)
        randomize_norms(model)
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    return folder


def randomize_norms(model: torch.nn.Module) -> None:
    """Move normalisation layers and running statistics off ones and zeros, so that skipping one of them shows."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.2, 0.2)
                    module.running_var.uniform_(0.5, 1.5)


def biomedclip_like(folder: Path, **options: Any) -> Path:
    """Write BiomedCLIP's structure in small: a timm ViT with token pooling (160 px, 6 blocks) and a BERT."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    return write_model(folder, vision, **options)


def timm_average_vit(folder: Path, **options: Any) -> Path:
    """Write a timm ViT pooled by the average of its patches, with a class token beside them (160 px, 6 blocks)."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    return write_model(folder, vision, **options)


def timm_register_vit(folder: Path, **options: Any) -> Path:
    """Write a timm ViT without class token but with a register token, pooled by the average (160 px, 8 blocks)."""
    vision = {"timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    return write_model(folder, vision, **options)


def open_clip_vit(folder: Path, *, pool_type: str = "tok", image_size: int = 64, **options: Any) -> Path:
    """Write open_clip's own ViT (patch 16, 3 blocks) with a BERT: phantom-clip's structure in small."""
    vision = {
        "image_size": image_size,
        "patch_size": 16,
        "width": 32,
        "head_width": 16,
        "layers": 3,
        "mlp_ratio": 2.0,
        "pool_type": pool_type,
    }
    return write_model(folder, vision, **options)


def open_clip_pair(folder: Path, **options: Any) -> Path:
    """Write open_clip's own ViT and its own text transformer with CLIP's BPE, as ViT-B-32 has them."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16, "layers": 3, "mlp_ratio": 2.0}
    return write_model(folder, vision, text, **options)


def cnn(folder: Path, *, timm_name: str = "test_efficientnet", **options: Any) -> Path:
    """Write a timm CNN (160 px) with a BERT."""
    vision = {"timm_model_name": timm_name, "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    return write_model(folder, vision, **options)


KINDS = {
    "timm_token_vit": biomedclip_like,
    "timm_average_vit": timm_average_vit,
    "timm_register_vit": timm_register_vit,
    "open_clip_token_vit": open_clip_vit,
    "open_clip_pair": open_clip_pair,
    "cnn": cnn,
}
