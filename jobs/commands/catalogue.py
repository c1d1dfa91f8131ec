"""All verbs of the command line, as plain text: what `fluoro --help` shows without importing any of them."""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """One verb: its words, where its click command is, one line of help and one example."""

    path: str
    target: str
    summary: str
    example: str


GROUPS: dict[str, tuple[Verb, ...]] = {
    "Data": (
        Verb(
            "dataset info",
            "jobs.commands.data:info",
            "Tell what a data set holds",
            "fluoro dataset info iu-xray:~/openi --split study",
        ),
        Verb(
            "dataset write",
            "jobs.commands.data:write",
            "Write phantoms as PNG, XML, labels and boxes",
            "fluoro dataset write 'phantom:2000?seed=1' ~/phantoms",
        ),
        Verb(
            "dataset leaks",
            "jobs.commands.data:leaks",
            "Find images and texts on both sides of a split",
            "fluoro dataset leaks iu-xray:~/openi --split study --model local-dir:~/models/biomedclip",
        ),
    ),
    "Model": (
        Verb(
            "model info",
            "jobs.commands.model:info",
            "Tell what a model is, with its encoder id",
            "fluoro model info local-dir:~/models/biomedclip",
        ),
        Verb(
            "model pack",
            "jobs.commands.model:pack",
            "Write a model as a folder that loads offline",
            "fluoro model pack hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 ~/models/biomedclip",
        ),
        Verb(
            "model train-phantom-clip",
            "jobs.commands.model:train_phantom_clip",
            "Train the demo's model again, from nothing",
            "fluoro model train-phantom-clip --output ~/models/phantom-clip",
        ),
    ),
    "Cache": (
        Verb(
            "embed",
            "jobs.commands.cache:embed",
            "Embed images and texts; compute what is missing",
            "fluoro embed folder:~/images --model ViT-B-32/laion2b_s34b_b79k --what image",
        ),
        Verb("cache ls", "jobs.commands.cache:ls", "List what is cached: arrays, rows, bytes", "fluoro cache ls"),
        Verb(
            "cache verify",
            "jobs.commands.cache:verify",
            "Check every row of the cache, and repair it",
            "fluoro cache verify --repair",
        ),
        Verb(
            "cache compact",
            "jobs.commands.cache:compact",
            "Drop holes, doubles and rows no longer used",
            "fluoro cache compact --unused --dry-run",
        ),
        Verb(
            "cache export",
            "jobs.commands.cache:export",
            "Write embeddings as npy, parquet, FAISS or keys",
            "fluoro cache export embeddings.parquet --dataset phantom:2000",
        ),
        Verb(
            "cache import",
            "jobs.commands.cache:import_",
            "Take in embeddings that others made",
            "fluoro cache import ~/clip-retrieval --name ViT-B-32 --root ~/images",
        ),
        Verb(
            "cache rm",
            "jobs.commands.cache:rm",
            "Remove an encoder with its arrays and indexes",
            "fluoro cache rm phantom-clip-fp32-0123456789ab",
        ),
        Verb(
            "cache forget",
            "jobs.commands.cache:forget",
            "Forget a patient in cache, indexes and runs",
            "fluoro cache forget --dataset phantom:2000 --group P0007 --dry-run",
        ),
        Verb(
            "index",
            "jobs.commands.cache:index",
            "Build a search index over cached embeddings",
            "fluoro index --encoder phantom-clip-fp32-0123456789ab --how exact",
        ),
        Verb(
            "index check",
            "jobs.commands.cache:index_check",
            "Measure what an index misses, and search itself",
            "fluoro index check --how ivf --dataset phantom:2000",
        ),
        Verb(
            "search",
            "jobs.commands.cache:search",
            "Find the samples nearest to a text, file or sample",
            "fluoro search phantom:2000 --model phantom-clip --text 'pleural effusion' -k 10",
        ),
    ),
    "Analysis": (
        Verb(
            "zeroshot",
            "jobs.commands.analysis:zeroshot",
            "Score labels by prompts, without training",
            "fluoro zeroshot phantom:2000 --model phantom-clip --template 'a radiograph showing {label}'",
        ),
        Verb(
            "probe",
            "jobs.commands.analysis:probe",
            "Fit linear heads on cached embeddings, test them",
            "fluoro probe phantom:2000 --model phantom-clip --out runs/probe",
        ),
        Verb(
            "finetune",
            "jobs.commands.finetuning:finetune",
            "Fine-tune the image tower; makes a new encoder",
            "fluoro finetune phantom:2000 --model phantom-clip --out runs/tuned",
        ),
        Verb(
            "finetune wise",
            "jobs.commands.finetuning:wise",
            "Score the points between parent and child",
            "fluoro finetune wise runs/tuned --out runs/wise",
        ),
        Verb(
            "finetune average",
            "jobs.commands.finetuning:average",
            "Average several fine-tuned models of one parent",
            "fluoro finetune average runs/tuned-0 runs/tuned-1 --out runs/soup",
        ),
        Verb(
            "distances",
            "jobs.commands.analysis:distances",
            "Measure how far apart and how wide classes are",
            "fluoro distances phantom:2000 --model phantom-clip",
        ),
        Verb(
            "compare",
            "jobs.commands.comparing:compare",
            "Set finished runs side by side, with paired tests",
            "fluoro compare runs/zeroshot runs/probe",
        ),
        Verb(
            "cam",
            "jobs.commands.analysis:cam",
            "Draw where the model looks for a label; score it",
            "fluoro cam phantom:2000 --model phantom-clip --id SAMPLE --label Cardiomegaly --out runs/cam",
        ),
        Verb(
            "cam sweep",
            "jobs.commands.heatmaps:sweep",
            "Choose heatmap method and layer by annotations",
            "fluoro cam sweep 'phantom:3000?enrich=0.1' --model phantom-clip --out runs/sweep",
        ),
        Verb(
            "cam check",
            "jobs.commands.heatmaps:check",
            "Check heatmaps for sanity and faithfulness",
            "fluoro cam check 'phantom:1000?enrich=0.1' --model phantom-clip --method gradcam --out runs/check",
        ),
    ),
    "Study": (
        Verb(
            "study",
            "jobs.commands.study:study",
            "Run a whole study into one folder with a report",
            "fluoro study configs/demo.yaml --out runs/demo",
        ),
        Verb(
            "report",
            "jobs.commands.study:report",
            "Build a report again, or one that compares runs",
            "fluoro report runs/demo --shareable",
        ),
    ),
    "Machine": (
        Verb(
            "doctor",
            "jobs.commands.machine:doctor",
            "Tell what this machine offers, and how fast it is",
            "fluoro doctor",
        ),
    ),
}

FAMILIES = {
    "dataset": "Data sets: look into one, check its split for leaks, write phantoms.",
    "model": "Models: look into one, pack one for offline use, train the demo's.",
    "cache": "The cache of embeddings: list, verify and repair it, tidy it up, carry it in and out.",
}

VERBS: dict[str, Verb] = {verb.path: verb for verbs in GROUPS.values() for verb in verbs}

FIRST_EXAMPLES = ("study", "embed", "search", "probe", "doctor")
