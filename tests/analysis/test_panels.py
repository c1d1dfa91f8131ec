"""What a sheet that compares settings must and must not show."""

from __future__ import annotations

import numpy as np
import pytest

from analysis import overlays, panels
from engine.errors import DataError

GREY = np.full((120, 150), 110, dtype=np.uint8)


def heat_at(row: int, column: int, crop: bool = False) -> np.ndarray:
    heat = np.zeros(GREY.shape, dtype=np.float32)
    heat[row : row + 30, column : column + 30] = 4.0
    if crop:
        heat[:, :20] = np.nan
    return heat


def test_difference_is_of_maps_brought_to_one() -> None:
    apart = panels.difference(heat_at(20, 40), 0.01 * heat_at(20, 55))
    assert apart[30, 45] == 1 and apart[30, 80] == -1
    assert apart[30, 60] == pytest.approx(0)
    assert np.isnan(panels.difference(heat_at(20, 40), heat_at(20, 40, crop=True))[5, 5])


def test_difference_of_an_empty_map_is_the_other_one() -> None:
    apart = panels.difference(np.zeros(GREY.shape), heat_at(20, 40))
    assert (apart.min(), apart.max()) == (-1, 0)


def test_difference_overlay_tells_more_from_less_and_leaves_the_rest_alone() -> None:
    apart = panels.difference(heat_at(20, 40), heat_at(70, 100))
    picture = panels.difference_overlay(GREY, apart, side=150).astype(int)
    red, green, blue = picture[35, 55]
    assert red > green > blue, "more heat: orange"
    red, green, blue = picture[85, 115]
    assert blue > red and blue > green, "less heat: blue"
    assert (picture[100, 20] == 110).all()


def test_difference_overlay_hatches_what_was_not_seen() -> None:
    apart = panels.difference(heat_at(20, 40, crop=True), heat_at(70, 100))
    picture = panels.difference_overlay(GREY, apart, side=150)
    assert picture[:, :20].max() < 110


def test_comparison_stands_in_two_rows_with_as_many_pictures_as_there_are_to_see() -> None:
    maps = [panels.Map(name, heat_at(20, 10 * place + 30), ("peak hits", "12 %")) for place, name in enumerate("ABC")]
    box = overlays.Box(40, 30, 50, 40, "")
    sheet = panels.comparison(GREY, maps, boxes=[box], title="Edema", side=150)
    only = panels.comparison(GREY, maps[:1], boxes=[box], title="Edema", side=150)
    assert sheet.shape[1] > only.shape[1] and sheet.shape[0] > only.shape[0] + 100, "a second row of differences"
    unmarked = panels.comparison(GREY, maps, title="Edema", side=150)
    assert sheet.shape[1] - unmarked.shape[1] == 150 + round(14 / 2), "no annotation, no picture of it"


def test_comparison_without_maps_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        panels.comparison(GREY, [])
