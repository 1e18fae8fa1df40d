"""scripts/convert_voc.py: there and back again, splits, and what it never does."""

import importlib
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data.coco.annotations import read_coco
from tests.scripts.convert.conversion_sets import content_of, make_set, names_in


def loose_set(root: Path, count: int = 20) -> Path:
    """XML files beside their images, as LabelImg leaves them."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (60, 48), (number, 0, 0)).save(root / f"p{number:02d}.jpg")
        name = "cat" if number % 2 else "dog"
        (root / f"p{number:02d}.xml").write_text(
            f"<annotation><filename>p{number:02d}.jpg</filename><size><width>60</width><height>48</height></size>"
            f"<object><name>{name}</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>21</xmax><ymax>12</ymax></bndbox>"
            "</object></annotation>"
        )
    return root


@pytest.mark.parametrize("options", [[], ["--copy"], ["--coordinates", "zero-based"]])
def test_coco_to_voc_to_coco_keeps_every_digit(options, convert, tmp_path, capsys):
    sets = make_set(tmp_path / "set")
    assert convert("from-coco", tmp_path / "voc", *sets, *options) == 0
    assert (tmp_path / "voc" / "JPEGImages" / "train_0.png").is_symlink() == ("--copy" not in options)
    assert convert("to-coco", tmp_path / "voc", tmp_path / "back") == 0
    for split in ("train", "val"):
        before = content_of(tmp_path / "set" / f"{split}.json")
        assert content_of(tmp_path / "back" / "annotations" / f"instances_{split}.json") == before
    assert "classes      3" in capsys.readouterr().out


def test_the_last_lines_are_commands_that_name_what_was_written(convert, tmp_path, capsys):
    source = loose_set(tmp_path / "my set")
    assert convert("to-coco", source, tmp_path / "out") == 0
    *_, check, browse, train = capsys.readouterr().out.strip().splitlines()
    for line, program in ((check, "check_dataset.py"), (browse, "browse_dataset.py"), (train, "train.py")):
        words = shlex.split(line)
        assert words[0] == "python3" and Path(words[1]).is_file() and words[1].endswith(program)
        images = words[words.index("--images" if program.startswith("browse") else "--train-images") + 1]
        assert images == str(source)
    check_main = importlib.import_module("check_dataset").main
    assert check_main([*shlex.split(check)[2:], "--fast"]) == 0


def test_the_split_depends_on_seed_and_names_alone(convert, tmp_path):
    loose_set(tmp_path / "a")
    splits = {}
    for name, options in (("one", ()), ("two", ()), ("other", ("--seed", 1)), ("third", ("--val-fraction", 0.3))):
        assert convert("to-coco", tmp_path / "a", tmp_path / name, *options) == 0
        files = [tmp_path / name / "annotations" / f"instances_{split}.json" for split in ("train", "val")]
        splits[name] = [names_in(file) for file in files]
        assert sorted(splits[name][0] + splits[name][1]) == [f"p{number:02d}.jpg" for number in range(20)]
    files = [tmp_path / name / "annotations" / "instances_train.json" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes() and splits["one"] == splits["two"]
    assert [len(part) for part in splits["one"]] == [18, 2]
    assert [len(part) for part in splits["third"]] == [14, 6]
    assert set(splits["one"][1]) < set(splits["third"][1])
    assert splits["other"] != splits["one"]
    # An image that is gone moves no other but at the cut.
    gone = splits["one"][0][0]
    (tmp_path / "a" / gone).unlink()
    (tmp_path / "a" / gone).with_suffix(".xml").unlink()
    assert convert("to-coco", tmp_path / "a", tmp_path / "fewer") == 0
    assert names_in(tmp_path / "fewer" / "annotations" / "instances_val.json") == splits["one"][1]


def test_lists_decide_where_they_are_given_or_lie_in_imagesets(convert, tmp_path, capsys):
    source = loose_set(tmp_path / "a", 5)
    sets = source / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("p00\np01  1\np02 -1\n\n")
    (sets / "val.txt").write_text("p03.jpg\n")
    assert convert("to-coco", source, tmp_path / "out") == 0
    assert names_in(tmp_path / "out" / "annotations" / "instances_train.json") == ["p00.jpg", "p01.jpg", "p02.jpg"]
    assert names_in(tmp_path / "out" / "annotations" / "instances_val.json") == ["p03.jpg"]
    assert "1 images are in none of them and were left out, the first p04" in capsys.readouterr().out
    (tmp_path / "mine.txt").write_text("p04\n")
    lists = ("--train-list", sets / "train.txt", "--val-list", tmp_path / "mine.txt")
    assert convert("to-coco", source, tmp_path / "out2", *lists) == 0
    assert names_in(tmp_path / "out2" / "annotations" / "instances_val.json") == ["p04.jpg"]
    for line, said in (("p99\n", "line 1: 'p99' names no label file"), ("p00\n", "'p00' is in the list of train too")):
        (tmp_path / "mine.txt").write_text(line)
        assert convert("to-coco", source, tmp_path / "out3", *lists) == 1
        assert said in capsys.readouterr().err
    assert convert("to-coco", source, tmp_path / "out3", "--train-list", tmp_path / "mine.txt") == 1
    assert "give both" in capsys.readouterr().err
    assert not (tmp_path / "out3").exists()


def test_folders_named_train_and_valid_are_splits(convert, tmp_path):
    loose_set(tmp_path / "a" / "train", 4)
    loose_set(tmp_path / "a" / "valid", 2)
    assert convert("to-coco", tmp_path / "a", tmp_path / "out") == 0
    val = tmp_path / "out" / "annotations" / "instances_val.json"
    assert names_in(val) == ["valid/p00.jpg", "valid/p01.jpg"]
    assert read_coco(val).class_names == ("cat", "dog")


def test_classes_come_from_the_file_in_its_order_and_others_are_errors(convert, tmp_path, capsys):
    source = loose_set(tmp_path / "a", 4)
    (source / "classes.txt").write_text("dog\ncat\nbird\n")
    assert convert("to-coco", source, tmp_path / "out") == 0
    assert read_coco(tmp_path / "out" / "annotations" / "instances_train.json").class_names == ("dog", "cat", "bird")
    said = capsys.readouterr().out
    assert "bird" in said and "class-unused" in said
    (source / "classes.txt").write_text("dogs\ncat\n")
    assert convert("to-coco", source, tmp_path / "out2") == 1
    streams = capsys.readouterr()
    assert "'dog'; did you mean 'dogs'?" in streams.out
    assert "2 errors" in streams.err and "--skip-errors" in streams.err
    assert not (tmp_path / "out2").exists()


def test_errors_stop_the_conversion_unless_they_are_to_be_skipped(convert, tmp_path, capsys):
    source = loose_set(tmp_path / "a", 6)
    (source / "p02.xml").write_text("<annotation>")
    (source / "p03.jpg").unlink()
    assert convert("to-coco", source, tmp_path / "out") == 1
    streams = capsys.readouterr()
    assert "p02.xml" in streams.out and "p03.jpg" in streams.out and "Traceback" not in streams.err
    assert not (tmp_path / "out").exists()
    assert convert("to-coco", source, tmp_path / "out", "--skip-errors") == 0
    found = [names_in(file) for file in (tmp_path / "out" / "annotations").iterdir()]
    assert sorted(sum(found, [])) == ["p00.jpg", "p01.jpg", "p04.jpg", "p05.jpg"]


def test_nothing_is_overwritten_and_with_overwrite_it_is_moved_aside(convert, tmp_path, capsys):
    source, out = loose_set(tmp_path / "a", 4), tmp_path / "out"
    assert convert("to-coco", source, out) == 0
    first = (out / "annotations" / "instances_train.json").read_bytes()
    assert convert("to-coco", source, out, "--seed", 5) == 1
    assert "exists already" in capsys.readouterr().err
    assert (out / "annotations" / "instances_train.json").read_bytes() == first
    assert convert("to-coco", source, out, "--seed", 5, "--overwrite") == 0
    (aside,) = (out / "annotations").glob("instances_train.json.before_*")
    assert aside.read_bytes() == first
    assert not list(out.glob(".converting*"))

    sets = make_set(tmp_path / "set")
    assert convert("from-coco", tmp_path / "voc", *sets) == 0
    (tmp_path / "voc" / "mine.txt").write_text("precious")
    assert convert("from-coco", tmp_path / "voc", *sets) == 1
    assert convert("from-coco", tmp_path / "voc", *sets, "--overwrite") == 0
    (aside,) = tmp_path.glob("voc.before_*")
    assert (aside / "mine.txt").read_text() == "precious"
    assert convert("from-coco", tmp_path / "set", *sets, "--overwrite") == 1
    assert "holds the images" in capsys.readouterr().err
    assert (tmp_path / "set" / "train.json").is_file()


def test_the_output_may_lie_in_the_source_and_does_not_get_in_the_way_of_the_next_time(convert, tmp_path):
    source = loose_set(tmp_path / "a", 4)
    assert convert("to-coco", source, source) == 0
    assert convert("to-coco", source, source, "--overwrite") == 0
    assert names_in(source / "annotations" / "instances_train.json")


def test_copies_make_a_set_that_needs_its_source_no_more(convert, tmp_path):
    source = loose_set(tmp_path / "a", 4)
    assert convert("to-coco", source, tmp_path / "out", "--copy") == 0
    shutil.rmtree(source)
    for split in ("train", "val"):
        for name in names_in(tmp_path / "out" / "annotations" / f"instances_{split}.json"):
            assert (tmp_path / "out" / split / name).is_file()


def test_images_that_would_share_an_xml_file_are_refused(convert, tmp_path, capsys):
    sets = make_set(tmp_path / "set")
    (tmp_path / "set" / "val" / "val_0.png").rename(tmp_path / "set" / "val" / "train_0.png")
    file = tmp_path / "set" / "val.json"
    file.write_text(file.read_text().replace("val_0.png", "train_0.png"))
    assert convert("from-coco", tmp_path / "voc", *sets) == 1
    assert "train_0.xml" in capsys.readouterr().err
    assert not (tmp_path / "voc").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["to-coco", "absent", "out"], "absent: there is no such folder"),
        (["from-coco", "out"], "no source"),
        (["from-coco", "out", "--train-images", "x"], "go together"),
        (["from-coco", "out", "--train-images", "x", "--train-annotations", "no.json"], "no.json: no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_without_a_traceback(words, said, convert, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert(*words) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
