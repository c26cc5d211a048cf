"""The page as text: its policy, its tables and the data of its script."""

import json
import re

import matplotlib
import numpy as np
import pandas as pd

from explain2me.report.page.render import as_json, render
from explain2me.report.page.viewer import map_cells, viewer_data
from explain2me.report.sheets.data import precision


def test_the_page_loads_nothing_and_says_so_in_its_policy(reported):
    page = (reported.folder / "report" / "index.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;; img-src data:")
    assert "unsafe" not in policy[1]
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"\son\w+=", re.sub(r"<script.*?</script>", "", page, flags=re.S))
    assert not re.search(r'\sstyle="', page)


def test_the_viewer_has_the_maps_that_the_run_has(reported):
    import base64

    page = (reported.folder / "report" / "index.html").read_text()
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.S)[1])
    assert data["detectors"] == ["first-detector", "second"]
    assert len(data["images"]["id"]) == 26
    item = data["shown"][0]
    maps = reported.maps().to_pandas()
    model = reported.models_of("second")[0]
    rows = maps[(maps.detector == "second") & (maps.run == model.run) & (maps.image == item["image"])]
    first_run = item["maps"][1][0]
    cells = np.frombuffer(base64.b64decode(first_run["cells"]), np.uint8).reshape(len(data["conditions"]), -1)
    assert len(cells) == len(rows)
    for quantised, row in zip(cells, rows["map"], strict=True):
        if row is not None and row.max() > 0:
            scaled = (row - row.min()) / max(np.ptp(row), 1e-12)
            assert np.abs((quantised - 1) / 254 - scaled).max() < 0.01


def test_an_image_beyond_the_table_keeps_its_name_in_the_viewer(reported, monkeypatch, material):
    monkeypatch.setattr("explain2me.report.page.viewer.MOST_ROWS", 2)
    data = viewer_data(material, matplotlib.colormaps["viridis"])
    assert len(data["images"]["id"]) == 2
    assert max(item["image"] for item in data["shown"]) >= 2
    for item in data["shown"]:
        row = reported.image_table.slice(item["image"], 1).to_pylist()[0]
        assert (item["id"], item["label"], item["source"]) == (row["image_id"], row["label"], row["source"])


def test_the_deviation_of_each_similarity_is_named(material):
    row = {"detector": "second", "measure": "noise", "variant": "predicted", "max_difference": 0.25}
    row |= {"mean_difference": 0.125, "num_one_sided": 3}
    rows = [row | {"similarity": "ssim"}, row | {"similarity": "pearson"}]
    rows.append(row | {"measure": "auroc", "variant": None, "similarity": None})
    material.tables.precision = pd.DataFrame(rows)
    page = render(material, {}, [precision(material.tables)], [], matplotlib.colormaps["viridis"])
    for measure, variant, similarity in (
        ("noise", "predicted", "ssim"),
        ("noise", "predicted", "pearson"),
        ("auroc", "-", "-"),
    ):
        labels = "".join(f'<th scope="row">{label}</th>' for label in ("second", measure, variant, similarity))
        assert f'{labels}<td class="n">0.250</td><td class="n">0.125</td><td class="n">3</td>' in page


def test_json_cannot_end_its_element():
    text = as_json({"a": "</script><!-- & \u2028"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028"}


def test_cells_of_a_dead_map_are_zero_and_large_maps_are_averaged():
    assert map_cells(np.zeros((3, 3)))[0] == bytes(9)
    assert map_cells(np.full((3, 3), np.nan))[0] == bytes(9)
    data, size = map_cells(np.random.default_rng(0).random((56, 28)))
    assert size == (14, 14)
    assert min(data) == 1
    assert max(data) == 255
