"""Maps as pictures: every sample is drawn once, rare names share a colour, and what does not fit is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from analysis import map_figure
from engine.errors import DataError


def test_every_sample_is_drawn_once_and_the_largest_group_undermost():
    names = np.repeat([f"label {n}" for n in range(9)], [90, 30, 20, 9, 8, 7, 3, 2, 1])
    groups = map_figure.colour_groups(names)
    assert sorted(np.concatenate([members for _, _, members in groups])) == list(range(len(names)))
    assert groups[0][:2] == ("label 0", map_figure.MUTED)
    assert groups[1][0] == map_figure.OTHERS and len(groups[1][2]) == 6
    assert len({colour for _, colour, _ in groups}) == len(groups) == 7


def test_pictures_are_png_and_the_same_again():
    places = np.random.default_rng(0).normal(size=(50, 2))
    names = np.where(np.arange(50) % 2, "train", "test")
    made = map_figure.map_picture({"PCA": places, "t-SNE": places}, names, title="split", note="read with care")
    assert made == map_figure.map_picture({"PCA": places, "t-SNE": places}, names, title="split", note="read with care")
    picture = Image.open(io.BytesIO(made))
    assert picture.format == "PNG" and picture.width > picture.height
    colours = {tuple(colour) for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert len(colours) > 20


def test_one_sample_is_drawn_and_mismatched_rows_are_refused():
    assert map_figure.map_picture({"PCA": np.zeros((1, 2))}, np.array(["a"]), title="label")
    with pytest.raises(DataError, match="two coordinates a sample"):
        map_figure.map_picture({"PCA": np.zeros((3, 2))}, np.array(["a", "b"]), title="label")
    with pytest.raises(DataError, match="shapes none"):
        map_figure.map_picture({}, np.array([]), title="label")
