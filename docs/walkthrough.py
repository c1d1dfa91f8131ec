"""A walk through fluoroscope in three steps: embed, probe, look. From the repository's folder:

    python docs/walkthrough.py OUTPUT [--samples 600]

Everything is drawn and shipped (phantoms and phantom-clip), so nothing is fetched; a minute on two cores. OUTPUT
receives the cache and two pictures: the map of the embeddings, and where the probe looks for one finding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from analysis import cam, overlays
from analysis.baselines import trivial_baselines
from analysis.bootstrap import bootstrap_metrics
from analysis.distances import first_positive
from analysis.embedding_map import describe, embedding_map
from analysis.map_figure import map_picture
from analysis.metrics import Prediction
from analysis.probes import fit_probe_on_split
from analysis.thresholds import choose_on_validation, decide
from engine.cache import Cache
from engine.encoder import load_encoder
from engine.pixels import decode
from engine.sources import open_dataset
from engine.splits import grouped_split

LABEL = "Cardiomegaly"


def main() -> None:
    """Embed, probe, look."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--samples", type=int, default=600)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)

    # 1. Embed. What the cache has is not computed again: run this twice and see.
    dataset = open_dataset(f"phantom:{asked.samples}?seed=11")
    encoder = load_encoder("phantom-clip")
    cache = Cache(asked.output / "cache")
    done = cache.embed(dataset, encoder, what=["image"])
    print(f"embedded {done.computed['image']} images, {done.reused['image']} were there, {len(done.failures)} failed")
    features = cache.features(dataset, encoder, normalize=True)
    truth, groups = dataset.labels[features.rows], dataset.groups[features.rows]

    # 2. Probe. No patient is in two parts; C and thresholds are chosen on validation; the test part is looked at once.
    split = grouped_split(groups, (0.6, 0.15, 0.25), 0)
    fitted = fit_probe_on_split(features.values, truth, split, label_names=dataset.label_names)
    scores = fitted.head.probabilities(features.values)
    decisions = decide(scores, choose_on_validation("f1", truth, scores, split))
    test = split == "test"
    settings = {"probe": Prediction(scores[test], decisions[test])}
    settings |= trivial_baselines(truth[split == "train"], int(test.sum()), seed=0)
    found = bootstrap_metrics(
        truth[test], settings, groups[test], label_names=dataset.label_names, replicates=1000, seed=0
    )
    for name in settings:
        value, low, high = found.interval(name, "lrap")[:3]
        print(f"LRAP of {name}: {value:.3f}, 95 % interval {low:.3f} to {high:.3f}")

    # 3. Look: at the whole space, then where the probe looks in one image, beside the finding's true mask.
    names = np.array([*dataset.label_names, "none"], dtype=object)[first_positive(truth)]
    places = embedding_map(features.values, seed=0)
    picture = map_picture({"Image embeddings": places}, names, title="first label", note=describe(len(places)))
    (asked.output / "map.png").write_bytes(picture)

    row = int(np.flatnonzero(test & (truth[:, dataset.label_position(LABEL)] == 1))[0])
    image = decode(dataset.reader.read(str(dataset.samples["uri"].iloc[row])))
    pixels, geometry = encoder.preprocess(image)
    weight, bias = fitted.head.of_label(LABEL)
    target = cam.HeadTarget(weight, bias, LABEL, fitted.head.normalised)
    heat = cam.heatmap(encoder, pixels, target).on_original(geometry)
    region = dataset.annotations.region(dataset.ids[row], LABEL, image.height, image.width)
    overlays.save_picture(overlays.overlay(np.asarray(image), heat, mask=region), asked.output / "heatmap.png")
    inside, area = heat[region > 0].sum() / heat[np.isfinite(heat)].sum(), region.mean()
    print(
        f"{LABEL} in {dataset.ids[row]}: {100 * inside:.0f} % of the heatmap lies in the finding's {100 * area:.0f} %"
    )
    print(f"look at {asked.output / 'map.png'} and {asked.output / 'heatmap.png'}")


if __name__ == "__main__":
    main()
