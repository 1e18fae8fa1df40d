"""The gallery: what is in the page, what it never replaces, and that a browser draws and filters it; and the tensors of
training as scripts/browse_dataset.py shows them.
"""

import base64
import importlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.coco.annotations import CocoAnnotations, read_coco
from data.loading.loader import TrainLoader
from data.tools.gallery import GalleryError, choose, write_gallery

COLORS = ["red", "rgb(0, 128, 0)", "blue"]
NASTY = "</script><script>document.title='stolen'</script> & \"q\""
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def small_set(tmp_path: Path) -> CocoAnnotations:
    """Five images in tmp_path: dog in 0 to 2, a cat in 1, a crowd in 2, none in 3; 4 is no image."""
    images = [{"id": 10 + i, "width": 80, "height": 60, "file_name": f"p{i}.png"} for i in range(5)]
    boxes = [(0, 1, [5, 5, 40, 30], 0), (1, 1, [0, 0, 8, 8], 0), (1, 2, [50, 30, 40, 40], 0), (2, 1, [1, 1, 70, 50], 1)]
    annotations = [
        {"id": n, "image_id": 10 + i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": crowd}
        for n, (i, c, b, crowd) in enumerate(boxes, 1)
    ]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": NASTY}, {"id": 3, "name": "unused"}]
    for i in range(4):
        Image.new("RGB", (80, 60), (60 * i, 90, 90)).save(tmp_path / f"p{i}.png")
    (tmp_path / "p4.png").write_bytes(b"nothing")
    file = tmp_path / "set.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return read_coco(file)


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_the_page_holds_images_boxes_and_figures(small_set, tmp_path):
    file = tmp_path / "out" / "gallery.html"
    summary = write_gallery(file, tmp_path, small_set, colors=COLORS, longest_side=40)
    assert (summary.num_shown, summary.num_images, summary.num_problems) == (5, 5, 1)
    assert summary.num_bytes == file.stat().st_size
    content = data_of(file.read_text())
    assert [image["name"] for image in content["images"]] == [f"p{i}.png" for i in range(5)]
    assert content["images"][1]["boxes"] == [[0, 0, 8, 8, 0, 0], [50, 30, 40, 40, 1, 0]]
    assert content["images"][2]["boxes"][0][5] == 1
    assert "cannot be decoded" in content["images"][4]["problem"]
    kind, encoded = content["images"][1]["src"].split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (40, 30)
    dog, cat, unused = content["classes"]
    assert (dog["boxes"], dog["images"], dog["crowds"]) == (2, 3, 1)
    assert (cat["name"], cat["color"], unused["boxes"]) == (NASTY, "rgb(0, 128, 0)", 0)
    edges = content["edges"]
    sizes = {edges[i]: n for i, n in enumerate(dog["sizes"]) if n}
    assert sizes == {8.0: 1, 32.0: 1}  # sides of 8 and 34.6 pixels
    assert (content["numImages"], content["numEmpty"]) == (5, 2)


def test_the_page_fetches_nothing_and_takes_no_name_for_markup(small_set, tmp_path):
    write_gallery(tmp_path / "g.html", tmp_path, small_set, colors=COLORS, title="{{data}} " + NASTY)
    page = (tmp_path / "g.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=[\"']?http", page)
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert len(data_of(page)["images"]) == 5


def test_an_image_of_another_size_is_a_problem_that_the_card_tells(small_set, tmp_path):
    Image.new("RGB", (60, 80)).save(tmp_path / "p0.png")
    (tmp_path / "p1.png").unlink()
    write_gallery(tmp_path / "g.html", tmp_path, small_set, colors=COLORS)
    first, second, *_ = data_of((tmp_path / "g.html").read_text())["images"]
    assert "60x80 pixels and annotated as 80x60" in first["problem"] and "src" in first
    assert "p1.png" in second["problem"] and "src" not in second


def test_a_limit_keeps_every_class_and_seeds_draw_others(small_set):
    for seed in range(20):
        assert 1 in choose(small_set, 2, seed)  # the only one with the second class
    assert choose(small_set, 3, 0) == choose(small_set, 3, 0) == sorted(choose(small_set, 3, 0))
    assert len({tuple(choose(small_set, 3, seed)) for seed in range(20)}) > 2
    assert choose(small_set, 9, 0) == [0, 1, 2, 3, 4]
    assert len(choose(small_set, 1, 0)) == 1


def test_a_gallery_replaces_galleries_only(small_set, tmp_path):
    file = tmp_path / "g.html"
    write_gallery(file, tmp_path, small_set, colors=COLORS)
    write_gallery(file, tmp_path, small_set, colors=COLORS, count=2)
    assert len(data_of(file.read_text())["images"]) == 2
    file.write_text("<html>my thesis</html>")
    with pytest.raises(GalleryError, match="is not a gallery"):
        write_gallery(file, tmp_path, small_set, colors=COLORS)
    assert file.read_text() == "<html>my thesis</html>"
    with pytest.raises(GalleryError):
        write_gallery(tmp_path, tmp_path, small_set, colors=COLORS)
    assert not list(tmp_path.glob(".g.html*"))


@pytest.fixture
def browse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts"))
    main = importlib.import_module("browse_dataset").main
    return lambda *words: main(list(map(str, words)))


def test_the_script_says_what_is_shown_and_what_is_wrong(small_set, tmp_path, browse, capsys):
    source = ("--images", tmp_path, "--annotations", tmp_path / "set.json", "--html", tmp_path / "g.html")
    browse(*source, "--count", 2)
    assert "2 of 5 images (--count N shows more" in capsys.readouterr().out
    assert browse(*source) == 1
    assert "1 images have a problem" in capsys.readouterr().err
    (tmp_path / "g.html").write_text("mine")
    assert browse(*source) == 1
    assert "choose another name" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page in")
def test_a_browser_draws_the_boxes_and_filters_by_class_and_text(small_set, tmp_path):
    write_gallery(tmp_path / "g.html", tmp_path, small_set, colors=COLORS)
    page = tmp_path / "page.html"
    steps = """<script>
    const seen = () => [document.querySelectorAll("article").length, document.querySelectorAll("rect.box").length,
      [...at("sizes").querySelectorAll("rect")].length > 0, at("shown").textContent];
    const set = (id, value) => { at(id).value = value; at(id).oninput(); return seen(); };
    const out = {all: seen(), cat: set("class", "1"), dog: set("class", "0"), none: set("class", "")};
    out.text = set("search", "P1"); out.nothing = set("search", "p1 p2"); out.cleared = set("search", "");
    out.empty = set("only", "empty"); out.outside = set("only", "outside"); out.problem = set("only", "problem");
    out.every = set("only", "all");
    out.order = (set("order", "most"), document.querySelector("article b").textContent);
    enlarge(0); out.large = at("large").open && at("large").querySelectorAll("rect.box").length;
    out.title = document.title;
    out.color = document.querySelector("rect.box").getAttribute("stroke");
    document.body.replaceChildren(); document.body.textContent = "RESULT" + JSON.stringify(out) + "END";
    </script></body>"""
    page.write_text((tmp_path / "g.html").read_text().replace("</body>", steps))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"RESULT(\{.*\})END", shown.stdout)
    assert found is not None, shown.stderr[-2000:]
    result = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert result["all"] == [5, 4, True, "5 of 5 images, 4 boxes"]
    assert result["cat"] == [1, 1, True, "1 of 5 images, 1 boxes"]
    assert result["dog"][:2] == [3, 3]
    assert result["none"] == result["cleared"] == result["every"] == result["all"]
    assert result["text"][:2] == [1, 2] and result["nothing"][0] == 0
    assert result["empty"][:2] == [2, 0] and result["outside"][0] == 1 and result["problem"][0] == 1
    assert result["order"] == "p1.png"
    assert result["large"] == 1
    assert result["title"] != "stolen" and result["color"]


@pytest.mark.slow
def test_the_images_are_those_of_the_training_batches_with_boxes_drawn(make_dataset, tmp_path, browse):
    dataset = make_dataset([(64, 48), (48, 64), (60, 60), (64, 48), (64, 40)])
    out = tmp_path / "out"
    source = ("--images", tmp_path, "--annotations", tmp_path / "annotations.json")
    sizes = ("--min-size", 96, "--max-size", 160, "--batch-size", 2, "--epoch", 1)
    assert browse(*source, *sizes, "--count", 5, "--output-dir", out) == 0
    loader = TrainLoader(dataset, min_size=96, max_size=160, batch_size=2, seed=0)
    batches = [raw.to("cpu") for raw in loader.batches(3, 6)]
    files = sorted(out.iterdir())
    assert len(files) == 5
    fed = [(batch, place) for batch in batches for place in range(2)]
    for file, (batch, place) in zip(files, fed, strict=False):
        assert f"id{int(batch.image_ids[place])}." in file.name
        image = np.asarray(Image.open(file))
        pixels = batch.pixels[place].permute(1, 2, 0).numpy()
        assert image.shape == pixels.shape
        unchanged = (image == pixels).all(axis=2).mean()
        assert 0.2 < unchanged < 1


def test_a_folder_that_is_not_there_is_an_error_without_a_traceback(tmp_path, browse, capsys):
    assert browse("--data-path", tmp_path / "absent") == 1
    assert "absent" in capsys.readouterr().err
    assert browse("--images", tmp_path) == 1
    assert "--annotations" in capsys.readouterr().err
