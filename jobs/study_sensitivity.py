"""A study with one choice changed at a time: thresholds, prompts, normalisation, the source of the labels.

Comes in: the settings of a protocol as the study made them. Goes out: two tables and sentences in the section
"sensitivity".

- ``tables/sensitivity-<protocol>.csv``: one row a change, setting that it touches and metric: value with low and high,
  difference to the study's own with its interval, note.
- ``tables/sensitivity-conclusions-<protocol>.csv``: one row a change, metric and pair of settings (or a setting and the
  prevalence ranking): difference, low, high, verdict, before, changes.

Zero-shot is scored and the probe is trained anew from the cached embeddings; a fine-tuned tower is not trained anew:
its scores stay, its thresholds are chosen anew where labels or thresholds change, and the note says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from analysis import baselines, paper, probes, sensitivity, threshold_families, thresholds, zeroshot
from analysis.metrics import Prediction
from analysis.prompts import TEMPLATES, Prompts, build_prompts
from analysis.vectors import normalise_rows
from engine.sources.label_sources import label_sources
from jobs import probe_section, runs, study_settings
from jobs.run_tables import write_table
from jobs.study_records import sentence_rows
from jobs.study_settings import FINE_TUNING, ZERO_SHOT, Material, Setting

SECTION = "sensitivity"
OWN_FAMILY = {"sound": "f1", "paper": "minmax"}
NOT_TRAINED_ANEW = "the fine-tuned tower was not trained anew"
NOT_TRAINED_HERE = "the probe's head was trained before, and stays as it is"


def write_sensitivity(
    material: Material,
    settings: Sequence[Setting],
    zero_shot: study_settings.ZeroShotSection,
    probe: probe_section.StudyProbeSection,
    protocol: str,
    run: runs.Run,
    replicates: int,
    seed: int,
) -> int:
    """Score every variant on test; return how many there were beside the study as it is."""
    maker = _Variants(material, settings, zero_shot, probe, protocol, seed)
    variants = [maker.base(), *maker.thresholds(), *maker.prompts(), *maker.normalisation(), *maker.labels()]
    test = material.rows("test")
    figures, comparisons = sensitivity.sensitivity(
        variants,
        material.dataset.groups[test],
        label_names=material.dataset.label_names,
        replicates=replicates,
        seed=seed,
    )
    write_table(
        run,
        f"sensitivity-{protocol}",
        figures,
        title="Sensitivity",
        text="The study with one choice changed: figures of the settings that it touches, and their paired difference "
        "to the study's own (first rows).",
        section=SECTION,
        protocol=protocol,
    )
    write_table(
        run,
        f"sensitivity-conclusions-{protocol}",
        comparisons,
        title="What the changes do to the conclusion",
        text="Each comparison of settings under each change: above or below where the paired interval lies on one side "
        "of 0, and what it was before.",
        section=SECTION,
        protocol=protocol,
    )
    run.record_all(sentence_rows(SECTION, sensitivity.sensitivity_sentences(comparisons), protocol))
    return len(variants) - 1


class _Variants:
    """Makes the variants of one protocol."""

    def __init__(
        self,
        material: Material,
        settings: Sequence[Setting],
        zero_shot: study_settings.ZeroShotSection,
        probe: probe_section.StudyProbeSection,
        protocol: str,
        seed: int,
    ) -> None:
        self.material, self.settings, self.protocol, self.seed = material, settings, protocol, seed
        self.zero_shot_section, self.probe_section = zero_shot, probe
        self.test = material.rows("test")
        self.own = {each.name: each.prediction for each in settings}
        self.tuned = FINE_TUNING in self.own
        self.probe = study_settings.probe_name(probe, protocol)

    def base(self) -> sensitivity.Variant:
        return self._variant("", "as the study has it", {})

    def thresholds(self) -> list[sensitivity.Variant]:
        made = []
        for family in threshold_families.FAMILIES:
            if family == OWN_FAMILY[self.protocol]:
                continue
            cut = {
                name: Prediction(
                    each.scores,
                    threshold_families.family_decisions(family, self.material.y, each.scores, self.material.split),
                )
                for name, each in self.own.items()
            }
            made.append(self._variant("thresholds", family, cut))
        return made

    def prompts(self) -> list[sensitivity.Variant]:
        names, section = self.material.dataset.label_names, self.zero_shot_section
        asked: list[tuple[str, Prompts]] = [
            (name, build_prompts(names, name, phrases=section.phrases)) for name in TEMPLATES
        ]
        asked.append(("ensemble with absence", build_prompts(names, "ensemble", "ensemble", phrases=section.phrases)))
        own = self._own_prompts()
        return [
            self._variant("prompts", name, {ZERO_SHOT: self._zero_shot(wanted)})
            for name, wanted in asked
            if (wanted.positive, wanted.negative) != (own.positive, own.negative)
        ]

    def normalisation(self) -> list[sensitivity.Variant]:
        normalize = self.protocol != "sound"
        changed = {
            ZERO_SHOT: self._zero_shot(self._own_prompts(), normalize=normalize),
        }
        notes = [NOT_TRAINED_ANEW] if self.tuned else []
        if self._given():
            notes.append(NOT_TRAINED_HERE)
        elif self.protocol == "sound" and self.probe_section.kind != "logistic":
            notes.append(f"a probe of the kind {self.probe_section.kind} is always on embeddings of length one")
        else:
            changed[self.probe] = self._probe(self.material, normalize)
        choice = "embeddings of length one" if normalize else "embeddings as the model gives them"
        return [self._variant("normalisation", choice, changed, "; ".join(notes))]

    def labels(self) -> list[sensitivity.Variant]:
        made = []
        for name, source in label_sources(self.material.dataset).items():
            usable = source.known & (self.material.split != "")
            parts = [set(self.material.split[usable])]
            if (source.values == self.material.y).all() or parts[0] != {"train", "val", "test"}:
                continue
            other = dataclasses.replace(
                self.material, dataset=dataclasses.replace(self.material.dataset, labels=source.values)
            )
            scored = {name: self._cut(other, each.scores) for name, each in self.own.items()}
            if not self._given():
                scored[self.probe] = self._probe(other, self.protocol == "sound")
            notes = [NOT_TRAINED_ANEW] if self.tuned else []
            notes += [NOT_TRAINED_HERE] if self._given() else []
            if not usable.all():
                notes.append(f"{int((~source.known).sum())} samples that this source does not know count as No Finding")
            made.append(self._variant("labels", name, scored, "; ".join(notes), other.y))
        return made

    def _given(self) -> bool:
        """Tell whether the probe is a head that was trained before."""
        return self.protocol == "sound" and self.probe_section.head is not None

    def _variant(
        self,
        changed: str,
        choice: str,
        predictions: Mapping[str, Prediction],
        note: str = "",
        truth: np.ndarray | None = None,
    ) -> sensitivity.Variant:
        y = self.material.y if truth is None else truth
        everything = {**self.own, **predictions}
        return sensitivity.Variant(
            changed,
            choice,
            y[self.test],
            {name: Prediction(each.scores[self.test], each.decisions[self.test]) for name, each in everything.items()},
            baselines.prevalence_ranking(y[self.material.rows("train")], len(self.test)),
            tuple(predictions),
            note,
        )

    def _own_prompts(self) -> Prompts:
        return study_settings.prompts_of(self.zero_shot_section, self.protocol, self.material.dataset.label_names)

    def _zero_shot(self, wanted: Prompts, normalize: bool | None = None) -> Prediction:
        material = self.material
        normalize = self.protocol == "sound" if normalize is None else normalize
        embedded = material.cache.text_features(wanted.texts, material.encoder)
        text, negative = wanted.combine(embedded, normalize=normalize)
        scale = material.encoder.logit_scale if normalize else 1.0
        scores = zeroshot.zero_shot_scores(
            material.features, text, normalize=normalize, logit_scale=scale, negative=negative
        )
        return self._cut(material, scores)

    def _probe(self, material: Material, normalize: bool) -> Prediction:
        train, val = material.rows("train"), material.rows("val")
        x, y, names = material.features, material.y, material.dataset.label_names
        if self.protocol == "sound" and self.probe_section.kind != "logistic":
            section, asked = self.probe_section, self.zero_shot_section
            head, _ = study_settings.probe_head(material, section, "sound", self.seed, asked)
            return self._cut(material, head.probabilities(x))
        if self.protocol == "sound":
            fitted = probes.fit_probe(
                x[train], y[train], x[val], y[val],
                label_names=names, c_grid=self.probe_section.C, normalize=normalize,
            )  # fmt: skip
            scores = fitted.head.probabilities(x)
        else:
            x = normalise_rows(x) if normalize else x
            fitted = paper.linear_probe(x[train], y[train], x[val], y[val], label_names=names, seed=self.seed)
            scores = fitted.head.logits(x)
        return self._cut(material, scores)

    def _cut(self, material: Material, scores: np.ndarray) -> Prediction:
        """Return scores with decisions by the protocol's own rule."""
        if self.protocol == "paper":
            return Prediction(scores, paper.decisions(scores))
        chosen = thresholds.choose_on_validation("f1", material.y, scores, material.split)
        return Prediction(scores, thresholds.decide(scores, chosen))
