import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from analysis.report import render_report, theme
from analysis.run_record import read_run
from engine.errors import DataError, UsageError
from tests.analysis.fake_run import SETTINGS, write_fake_run


class Collector(HTMLParser):
    """Gathers what a page would fetch, and its table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.images_without_text = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        named = dict(attrs)
        self.fetched += [value for key, value in named.items() if key in ("src", "data", "poster") and value]
        if tag == "link":
            self.fetched.append(named.get("href", ""))
        if tag == "img" and not named.get("alt"):
            self.images_without_text += 1


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_fake_run(tmp_path_factory.mktemp("run"))
    render_report(folder)
    return folder


def test_report__fetches_nothing_and_describes_its_pictures(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    page = Collector()
    page.feed(text)
    assert page.fetched
    assert all(source.startswith("data:image/") for source in page.fetched if source)
    assert page.images_without_text == 0
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_report__shows_the_numbers_that_the_run_recorded(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    results = read_run(run_folder).rows("metric")
    for setting in SETTINGS:
        row = results[(results["setting"] == setting) & (results["metric"] == "lrap")].iloc[0]
        assert f"{row['value']:.3f}<small>{row['low']:.3f} – {row['high']:.3f}</small>" in text
    assert "zero gradient at blocks[-1].attn.proj" in text
    assert "truncated file" in text


def test_report__escapes_what_users_wrote(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    assert "A fake &lt;run&gt;" in text
    assert "A fake <run>" not in text


def test_report__never_embeds_a_file_from_outside_the_run(run_folder: Path) -> None:
    (run_folder.parent / "outside.jpg").write_bytes(b"secret picture")
    page = render_report(run_folder).read_text()
    assert "c2VjcmV0IHBpY3R1cmU" not in page


def test_report__leaves_a_csv_beside_each_table(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    named = set(re.findall(r"CSV: <code>([^<]+)</code>", text))
    assert {"tables/settings-sound.csv", "tables/labels-sound.csv", "tables/cost.csv"} <= named
    for name in named:
        assert len(pd.read_csv(run_folder / name))
    written = pd.read_csv(run_folder / "tables/settings-sound.csv")
    assert set(written["setting"]) >= set(SETTINGS)


def test_report__shows_what_stands_beside_the_metrics(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    for heading in (
        "Settings against one another",
        "What the threshold does",
        "Subgroups",
        "Shape of the space",
        "The split",
    ):
        assert heading in text
    assert "per-image min-max at 0.5" in text and "images: 30, patients: 20" in text
    assert "image to image, precision@5" in text and "chance 0.150" in text
    assert "needs two classes" in text and "null 0.100, p = 0.005" in text
    for name in ("differences-sound", "thresholds-sound", "subgroups-sound", "space-sound", "split"):
        assert len(pd.read_csv(run_folder / "tables" / f"{name}.csv"))


def test_report__of_a_run_without_them_leaves_their_sections_out(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path)
    lines = (folder / "results.jsonl").read_text().splitlines()
    kinds = ("difference", "threshold", "subgroup", "gap", "space", "split", "retrieval")
    kept = [line for line in lines if not any(f'"kind": "{kind}"' in line for kind in kinds)]
    assert len(kept) < len(lines)
    (folder / "results.jsonl").write_text("\n".join(kept) + "\n")
    text = render_report(folder).read_text()
    assert "Shape of the space" not in text and 'href="#split"' not in text


def test_report__figure_ids_do_not_meet(run_folder: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', (run_folder / "report.html").read_text())
    assert len(ids) == len(set(ids))


def test_read_run__refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"results\.jsonl"):
        read_run(tmp_path)


def test_read_run__names_the_broken_line(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run")
    with (folder / "results.jsonl").open("a") as stream:
        stream.write('{"kind": "metr')
    count = len((folder / "results.jsonl").read_text().splitlines())
    with pytest.raises(DataError, match=f"line {count}"):
        read_run(folder)


def test_colours__are_told_apart_on_every_ground_in_both_themes() -> None:
    for which in (0, 1):
        grounds = [_luminance(theme.COLOURS[name][which]) for name in theme.GROUNDS]
        for name in (*theme.TEXTS, *theme.DRAWN):
            least = 4.5 if name in theme.TEXTS else 3.0
            for ground in grounds:
                ends = sorted((_luminance(theme.COLOURS[name][which]), ground))
                contrast = (ends[1] + 0.05) / (ends[0] + 0.05)
                assert contrast >= least, f"{name} reaches {contrast:.2f} of {least} in theme {which}"


def _luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
