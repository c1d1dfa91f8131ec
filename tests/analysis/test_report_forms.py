"""Other forms of a run's report: shareable, Markdown, LaTeX, of large studies; none says more or less than it may."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import curves, figures
from analysis.report import latex, markdown, point_map, render_report, sharing
from analysis.report.blocks import Details, Drawing, Heading, Note, Section, Sentences, tidy
from analysis.report.tables import MOST_ROWS, Cell, Row, Table
from analysis.run_record import read_run, write_scores
from engine.errors import DataError
from tests.analysis.fake_run import write_fake_run

SECRETS = ("Patient0042", "IM-0042-1001", "/home/somebody/xrays", "shadow in the left apex", "name_of_a_file")


@pytest.fixture
def run_with_patients(tmp_path: Path) -> Path:
    """Return a run in which everything that must not be shared has a name that can be looked for."""
    folder = write_fake_run(tmp_path / "run")
    scores = read_run(folder).scores
    ids = np.array(["IM-0042-1001", *(f"IM-{place:04d}-2002" for place in range(len(scores.ids) - 1))])
    groups = np.array(["Patient0042", *(f"Patient{place:04d}b" for place in range(len(ids) - 1))])
    write_scores(folder / "scores.npz", dataclasses.replace(scores, ids=ids, groups=groups))
    (folder / "failures.csv").write_text(
        "id,uri,what,reason\nIM-0042-1001,/home/somebody/xrays/name_of_a_file.png,image,truncated\n"
    )
    (folder / "embedding_map.csv").write_text(
        "id,setting,x,y,label,split\nIM-0042-1001,Zero-shot,0,0,Edema,test\nIM-0001-2002,Zero-shot,1,1,Edema,test\n"
    )
    retrieval = json.loads((folder / "retrieval.json").read_text())
    retrieval[0]["hits"][0]["id"] = "IM-0042-1001"
    retrieval[0]["query"] = {"text": "shadow in the left apex"}
    (folder / "retrieval.json").write_text(json.dumps(retrieval))
    cases = json.loads((folder / "heatmaps.json").read_text())
    cases[0]["id"] = "IM-0042-1001"
    (folder / "heatmaps.json").write_text(json.dumps(cases))
    (folder / "tables").mkdir(exist_ok=True)
    (folder / "tables/readings.csv").write_text("id,text,score\nIM-0042-1001,shadow in the left apex,0.5\n")
    with (folder / "results.jsonl").open("a") as stream:
        line = {
            "kind": "table",
            "name": "readings",
            "title": "Readings",
            "section": "odd",
            "text": "One row a reading.",
        }
        stream.write(json.dumps({**line, "source": "tables/readings.csv"}) + "\n")
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["command"] = "/home/somebody/xrays/bin/fluoro study nih --set data.root=/home/somebody/xrays -o out/x"
    provenance["dataset"]["schema"] = "table:/home/somebody/xrays/manifest.csv"
    (folder / "provenance.json").write_text(json.dumps(provenance))
    config = "model: local-dir:/home/somebody/xrays/model\ndata:\n  source: table:x/name_of_a_file.csv\n"
    (folder / "config.yaml").write_text(config + "  root: /home/somebody/xrays\nprotocols: [sound]\n")
    return folder


def test_shareable__has_no_image_text_id_or_path_of_a_patient(run_with_patients: Path) -> None:
    page = render_report(run_with_patients, shareable=True)
    assert page == run_with_patients / "shareable" / "report.html"
    files = [path for path in page.parent.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".html", ".md", ".csv", ".tex"}
    for path in files:
        text = path.read_text()
        assert not [secret for secret in SECRETS if secret in text], path
        assert not re.search(r"IM-\d{4}|Patient\d|/home", text), path
        assert "data:image" not in text and "<img" not in text
    assert not (page.parent / "tables/readings.csv").exists()
    text = page.read_text()
    # What may be shared is still there.
    assert "Settings against one another" in text and "Precision and recall" in text and 'id="map"' in text
    assert "1 sample failed" in text and "fluoro study nih" in text and "protocols:" in text


def test_the_full_report__has_what_the_shareable_one_leaves_out(run_with_patients: Path) -> None:
    text = render_report(run_with_patients).read_text()
    assert "IM-0042-1001" in text and "shadow in the left apex" in text and "data:image" in text


def test_shareable__is_refused_where_a_title_names_a_patient(run_with_patients: Path) -> None:
    provenance = json.loads((run_with_patients / "provenance.json").read_text())
    provenance["title"] = "What is wrong with Patient0042"
    (run_with_patients / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(DataError, match="still name 'Patient0042'"):
        render_report(run_with_patients, shareable=True)
    assert not (run_with_patients / "shareable").exists()


def test_shared_tables__lose_the_columns_that_name_samples() -> None:
    frame = pd.DataFrame({"id": ["a"], "group": ["b"], "label": ["c"], "value": [1.0]})
    assert list(sharing.shared_frame(frame)) == ["label", "value"]
    assert sharing.is_private(frame) and not sharing.is_private(frame[["label", "value"]])


def test_markdown__has_every_table_with_all_its_cells_in_line(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path)
    render_report(folder)
    lines = (folder / "report.md").read_text().splitlines()
    assert lines[0] == r"# A fake \<run\>"
    width = None
    for line in lines:
        bars = len(re.findall(r"(?<!\\)\|", line))
        if not line.startswith("|"):
            width = None
            continue
        assert width in (None, bars), line
        width = bars
    overall = read_run(folder).rows("metric")
    row = overall[(overall["setting"] == "Fine-tuning") & (overall["metric"] == "lrap")].iloc[0]
    assert any("Fine-tuning" in line and f"{row['value']:.3f} ({row['low']:.3f}" in line for line in lines)


def test_markdown__shows_what_users_wrote_as_it_is() -> None:
    assert markdown.escape("a|b *c* _d_ <e>\n# f") == r"a\|b \*c\* \_d\_ \<e\> \# f"


def test_latex__is_a_table_with_as_many_cells_in_every_row(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path)
    render_report(folder)
    text = (folder / "tables/settings-sound.tex").read_text()
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1]
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 2 * 5  # the head; three settings and two baselines, each with its intervals
    assert all(len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1 for row in rows)
    assert text.count(r"\midrule") == 2 and text.count("{") == text.count("}")
    results = read_run(folder).rows("metric")
    row = results[(results["setting"] == "Random") & (results["metric"] == "map")].iloc[0]
    assert f"{row['value']:.3f}" in text and f"{row['low']:.3f}--{row['high']:.3f}" in text


def test_latex__escapes_its_special_characters() -> None:
    assert latex.escape("50 % & a_b #1 {x} ~^\\<") == (
        r"50 \% \& a\_b \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{}\textless{}"
    )


def test_pages_of_large_studies__show_a_part_and_say_so(tmp_path: Path) -> None:
    labels = tuple(f"Label {place:03d}" for place in range(60))
    folder = write_fake_run(tmp_path, labels, samples=400)
    text = render_report(folder).read_text()
    assert f"The {curves.MOST_LABELS} most frequent of 60 labels are drawn." in text
    long = Table(["a"], [Row([Cell(str(place))]) for place in range(MOST_ROWS + 5)], "long")
    assert len(long.shown) == MOST_ROWS and long.left_out == 5


def test_map__of_many_samples_draws_the_same_part_in_every_panel() -> None:
    count = point_map.MOST_POINTS + 500
    rng = np.random.default_rng(3)
    tables = [
        pd.DataFrame({"id": [f"s{place}" for place in range(count)], "setting": setting, "x": rng.normal(size=count),
                      "y": rng.normal(size=count), "label": "a", "split": "test"})
        for setting in ("one", "two")
    ]  # fmt: skip
    drawn = point_map.point_map(pd.concat(tables), ["a"], shareable=False)
    first, second = json.loads(drawn.data)["panels"]
    assert first["id"] == second["id"] and len(set(first["id"])) == point_map.MOST_POINTS
    assert f"{point_map.MOST_POINTS:,} of {count:,} samples are drawn" in drawn.alt
    assert min(first["x"]) >= 0 and max(first["x"]) <= point_map.SIDE


def test_map__keeps_its_proportions_and_turns_y_upwards() -> None:
    points = pd.DataFrame(
        {
            "id": ["p", "q", "r"],
            "setting": "one",
            "x": [0.0, 10.0, 0.0],
            "y": [0.0, 0.0, 5.0],
            "label": "a",
            "split": "t",
        }
    )
    data = json.loads(point_map.point_map(points, ["a"], shareable=True).data)["panels"][0]
    across, up = data["x"][1] - data["x"][0], data["y"][0] - data["y"][2]
    assert across == pytest.approx(2 * up, abs=2) and up > 0 and data["id"] == []


def test_map__data_cannot_end_its_script() -> None:
    points = pd.DataFrame(
        {"id": ["</script><b>", "q"], "setting": "one", "x": [0.0, 1.0], "y": [0.0, 1.0], "label": "<a>", "split": "t"}
    )
    data = point_map.point_map(points, ["<a>"], shareable=False).data
    assert "<" not in data and json.loads(data)["panels"][0]["id"][0] == "</script><b>"


def test_thinned_curves__keep_both_ends_and_their_order() -> None:
    across = np.linspace(0, 1, 5000)
    kept, up = curves.thinned(across, across**2)
    assert len(kept) <= curves.MOST_POINTS and kept[0] == 0 and kept[-1] == 1
    assert (np.diff(kept) > 0).all() and np.array_equal(up, kept**2)


def test_tidy__gives_equal_drawings_ids_of_their_own() -> None:
    svg = figures.svg(lambda figure: figure.subplots().plot([0, 1], [1, 0]), 3, 2, "a line")
    assert 'id="f' in svg
    sections = tidy(
        [
            Section("a", "A", blocks=[Drawing(svg), Details("d", [Drawing(svg)])]),
            Section("b", "B", blocks=[Drawing(svg)]),
        ]
    )
    drawn = [sections[0].blocks[0].svg, sections[0].blocks[1].blocks[0].svg, sections[1].blocks[0].svg]
    ids = [found for text in drawn for found in re.findall(r'id="([^"]+)"', text)]
    assert len(ids) == len(set(ids)) > 3
    for text in drawn:
        own = set(re.findall(r'id="([^"]+)"', text))
        assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= own


def test_tidy__leaves_out_empty_sections_and_headings_over_nothing() -> None:
    empty = Section("a", "A", blocks=[Note("read this"), Heading("nothing"), None, Sentences([])])
    full = Section(
        "b", "B", blocks=[Heading("gone"), Heading("kept"), Sentences(["x"]), Details("d", [None]), Heading("z")]
    )
    (kept,) = tidy([None, empty, full])
    assert [getattr(block, "text", "said") for block in kept.blocks] == ["kept", "said"]
