"""Texts cut to their own length class, each once, beside the plain loop over texts padded to the model's context.

    python benchmarks/text.py --data iu-xray:DIR [--model local-dir:DIR] [--sample N] [--rounds 3] [--write]

Without a model, BiomedCLIP's text tower is taken in shape (BERT-base, context 256, 30,522 words) with random weights
and a word-piece vocabulary made of the reports; that is slow in float32 on two cores, so `--sample` takes every so
many-th report for the comparison. The plain loop is open_clip's tokenizer and `encode_text` in batches of 32, in the
data set's order, identical texts again and again. Ours is `Cache.embed` into an empty cache, rows committed and synced.
The rounds take turns; figures are medians. Printed beside it: how far the embeddings are from those of the plain loop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from comparing import write_record

from engine.cache import Cache
from engine.encoder import Encoder, load_encoder
from engine.sources import open_dataset

RESULTS = Path(__file__).parent / "results" / "text.json"
BATCH = 32


def write_biomedclip_shape(folder: Path, texts: list[str]) -> Path:
    """Write a model with BiomedCLIP's text tower in shape and a tiny image tower, random weights."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    words = [word for word, _ in Counter(" ".join(texts).lower().split()).most_common()]
    letters = sorted(set("".join(words)))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    (folder / "vocab.txt").write_text("\n".join(list(dict.fromkeys(vocabulary))[:30_522]) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    tower = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 30_522, "hidden_size": 768}
    tower |= {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(tower | {"max_position_embeddings": 512}))
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "context_length": 256}
    text |= {"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler", "hf_model_pretrained": False}
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 32, "image_size": 64}
    config = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {"size": 64}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


@torch.no_grad()
def plain(encoder: Encoder, texts: list[str]) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    rows = []
    for first in range(0, len(texts), BATCH):
        words = encoder.tokenizer(texts[first : first + BATCH]).to(encoder.device)
        rows.append(encoder.model.encode_text(words).float().cpu().numpy())
    return np.concatenate(rows), time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="data set with texts, such as iu-xray:DIR")
    parser.add_argument("--model", help="BiomedCLIP's shape with random weights unless given")
    parser.add_argument("--sample", type=int, default=1, help="take every so many-th report")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", metavar="NAME", help="store the figures as results/NAME.json")
    options = parser.parse_args(arguments)
    dataset = open_dataset(options.data, **({"images": "ignore"} if options.data.startswith("iu-xray:") else {}))
    dataset = dataset.take(np.flatnonzero((dataset.samples["text"] != "").to_numpy())[:: options.sample])
    texts = [str(text) for text in dataset.samples["text"]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model or f"local-dir:{write_biomedclip_shape(folder / 'model', texts)}"
        encoder = load_encoder(model, device=options.device)
        encoder.encode_text(texts[:BATCH])
        rounds: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(options.rounds):
            expected, seconds = plain(encoder, texts)
            rounds["plain"].append(len(texts) / seconds)
            shutil.rmtree(folder / "cache", ignore_errors=True)
            report = Cache(folder / "cache").embed(dataset, encoder, ["text"])
            rounds["ours"].append(len(texts) / report.seconds)
        found = Cache(folder / "cache").features(dataset, encoder, "text").values
    rates = {name: statistics.median(values) for name, values in rounds.items()}
    ratio = statistics.median(ours / bare for ours, bare in zip(rounds["ours"], rounds["plain"], strict=True))
    half = np.abs(expected) * 2.0**-11 + 2.0**-24  # what storing in float16 rounds away
    beyond = float(np.maximum(np.abs(found - expected) - half, 0).max())
    words = encoder.tokenizer(texts)
    lengths = encoder._text_tower.lengths(words).numpy()
    figures = {
        "texts": len(texts),
        "different": len(set(texts)),
        "context": int(words.shape[1]),
        "mean_tokens": float(lengths.mean()),
        "rates": rates,
        "ratio": ratio,
        "rounds": rounds,
        "largest_difference": beyond,
        "largest_value": float(np.abs(expected).max()),
    }
    print(f"{encoder.name}: {len(texts):,} texts, {len(set(texts)):,} different,", end=" ")
    print(f"{lengths.mean():.0f} tokens of {words.shape[1]}")
    print(f"  plain loop, texts/s{rates['plain']:16.1f}\n  ours, texts/s{rates['ours']:22.1f}")
    print(f"  ours / plain (at least 2.5){ratio:8.2f}")
    print(f"  largest difference beyond float16 {beyond:.2g} of values up to {figures['largest_value']:.3g}")
    if options.write:
        write_record(RESULTS.with_stem(options.write), vars(options), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
