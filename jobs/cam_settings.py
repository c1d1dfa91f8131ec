"""The settings that a heatmap may explain: zero-shot prompts or a free text, saved heads, fine-tuned runs.

Comes in: what was named on the command line, and the loaded encoder. Goes out: one `Explained` each, checked: a head of
another encoder, a head without the label, a run that is none are refused before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from analysis import cam
from analysis.heads import LinearHead
from engine.cache import Cache
from engine.encoder import Encoder, load_encoder
from engine.errors import UsageError
from jobs import finetune, heads, probe_section, study_settings
from jobs.study_settings import Explained

SettingName = Literal["zero-shot", "probe", "fine-tuned"]


class SettingOptions(Protocol):
    """What is read of the options of `fluoro cam`."""

    cache: Path | str
    device: str
    protocol: Literal["sound", "paper"]
    zero_shot: study_settings.ZeroShotSection
    heads: list[Path]
    tuned: list[Path]
    settings: list[SettingName]


def settings_at_hand(
    config: SettingOptions, encoder: Encoder, labels: Sequence[str], texts: Sequence[str] = ()
) -> list[Explained]:
    """Return zero-shot, the heads that were named, and the fine-tuned towers that were named.

    Parameters
    ----------
    labels : sequence of str
        Of the data set; every setting must know them.
    texts : sequence of str
        Free texts, which only zero-shot can explain.

    Raises
    ------
    UsageError
        A setting that nothing was named for, a label that a head does not have, a folder that is no run.
    ModelError
        A head of another encoder.
    """
    asked: list[str] = list(config.settings) or [
        "zero-shot",
        *(["probe"] if config.heads else []),
        *(["fine-tuned"] if config.tuned else []),
    ]
    for name, given, option in (("probe", config.heads, "--head"), ("fine-tuned", config.tuned, "--tuned")):
        if name in asked and not given:
            raise UsageError(f"the setting {name!r} needs {option}: a saved head, or the run that trained it")
    if texts and "zero-shot" not in asked:
        raise UsageError(f"the free text {texts[0]!r} needs the setting 'zero-shot'; a head knows its labels only")
    settings: list[Explained] = []
    if "zero-shot" in asked:
        settings.append(_zero_shot(config, encoder, labels, texts))
    if "probe" in asked:
        settings += [_probe(config, encoder, path) for path in config.heads]
    if "fine-tuned" in asked:
        settings += [_tuned(config, encoder, folder) for folder in config.tuned]
    for setting in settings:
        for label in labels:
            setting.target(label)  # says now, and not after an hour, that a head lacks a label
    return settings


def target_of(setting: Explained, label: str) -> cam.Target | None:
    """Return what a setting's map explains; None for a free text that a head does not know."""
    return setting.target(label) if setting.head is None or label in setting.label_names else None


def _zero_shot(config: SettingOptions, encoder: Encoder, labels: Sequence[str], texts: Sequence[str]) -> Explained:
    sound = config.protocol == "sound"
    cache = Cache(config.cache)
    vectors = []
    if labels:
        vectors.append(study_settings.label_texts(config.zero_shot, config.protocol, labels, encoder, cache))
    if texts:
        vectors.append(cache.text_features(texts, encoder, normalize=sound))
    names = (*labels, *texts)
    return Explained(study_settings.ZERO_SHOT, config.protocol, encoder, names, text=np.concatenate(vectors))


def _probe(config: SettingOptions, encoder: Encoder, path: Path) -> Explained:
    head = heads.open_head(path, encoder)
    shown = [path.name if path.is_dir() else path.stem] if len(config.heads) > 1 else []
    said = ", ".join([kind for kind in [probe_section.kind_of(head)] if kind] + shown)
    name = f"{probe_section.LINEAR_PROBE} ({said})" if said else probe_section.LINEAR_PROBE
    return Explained(name, config.protocol, encoder, head.label_names, head=head)


def _tuned(config: SettingOptions, encoder: Encoder, folder: Path) -> Explained:
    model = folder / finetune.MODEL_FOLDER
    if not model.is_dir():
        raise UsageError(f"{str(folder)!r} is no run of fluoro finetune: it has no folder {model.name!r}")
    tower = load_encoder(f"local-dir:{model.resolve()}", device=config.device, precision=encoder.precision)
    file = model / finetune.HEAD_FILE
    head = heads.checked(LinearHead.load(file), tower, file)
    name = study_settings.FINE_TUNING if len(config.tuned) == 1 else f"{study_settings.FINE_TUNING} ({folder.name})"
    return Explained(name, config.protocol, tower, head.label_names, head=head)
