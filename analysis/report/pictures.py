"""What the report shows of single samples: heatmap panels and neighbours, their pictures embedded in the page.

Comes in: the entries of heatmaps.json and retrieval.json. Goes out: captions, alt texts and data URLs; a path
that leads out of the run folder is left out.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from analysis import run_record

# A picture is embedded in the page, some 100 kB each: more of them and it opens slowly.
MOST_CASES = 24
MOST_QUERIES = 12


def case_view(record: run_record.RunRecord, case: dict[str, Any]) -> dict[str, Any]:
    """Return a heatmap case: its title, and picture, caption and alt text of each panel."""
    label = case["label"]
    panels = [
        {
            "image": picture(record.folder, case["image"]),
            "setting": "Original",
            "caption": "",
            "alt": f"Radiograph {case['id']} with the annotated region of {label}",
        }
    ]
    for panel in case["panels"]:
        if panel.get("caption"):
            caption = panel["caption"]
        elif panel.get("empty"):
            caption = panel.get("note") or "the map is empty: its gradient is zero everywhere"
        elif panel.get("pointing") is None:
            caption = "the region lies outside what the model sees"
        else:
            share = float(panel["pointing"])
            hit = {1.0: "peak hits", 0.0: "peak misses"}.get(share, f"{share:.2f} of a tied peak hits")
            caption = f"{hit} · energy {panel['energy']:.2f} · IoU {panel['iou']:.2f}"
            caption += f" · {panel['value']}" if panel.get("value") else ""
            caption += f" · {panel['note']}" if panel.get("note") else ""
        panels.append(
            {
                "image": picture(record.folder, panel["file"]),
                "setting": panel["setting"],
                "caption": caption,
                "alt": f"Heatmap of {label}, {panel['setting']}: {caption}",
            }
        )
    shown = f"{label} (protocol: {case['protocol']})" if len(record.protocols) > 1 else label
    return {"id": case["id"], "label": shown, "panels": panels}


def query_view(record: run_record.RunRecord, query: dict[str, Any]) -> dict[str, Any]:
    """Return a query and its neighbours with thumbnails, right and wrong ones told apart."""
    asked = query["query"]
    title = (
        f"Text “{asked['text']}”"
        if "text" in asked
        else f"Image {asked['id']} ({', '.join(asked.get('labels', [])) or 'no label'})"
    )
    hits = []
    for hit in query["hits"]:
        labels = ", ".join(hit["labels"]) or "no label"
        hits.append(
            {
                "image": picture(record.folder, hit["thumbnail"]) if hit.get("thumbnail") else "",
                "alt": f"Neighbour {hit['id']}: {labels}",
                "score": f"{hit['score']:.3f}",
                "labels": labels,
                "style": "yes" if hit["match"] else "no",
            }
        )
    labels = ", ".join(asked.get("labels", [])) or "no label"
    return {
        "title": title,
        "hits": hits,
        "right": sum(hit["style"] == "yes" for hit in hits),
        "image": picture(record.folder, asked["thumbnail"]) if asked.get("thumbnail") else "",
        "labels": labels,
        "alt": f"The image asked with, {asked.get('id', '')}: {labels}",
    }


def picture(folder: Path, relative: str) -> str:
    """Return a picture of the run folder as a data URL; "" where there is none or the path leads out of it."""
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return ""
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
