import pytest

from data.coco.layout import MissingDataset, coco_layout, standard_layout


def make(root, *, without=()):
    layout = standard_layout(root)
    for folder in (layout.train_images, layout.val_images):
        folder.mkdir(parents=True)
    layout.train_annotations.parent.mkdir()
    layout.train_annotations.write_text("{}")
    layout.val_annotations.write_text("{}")
    for path in without:
        (root / path).rmdir() if (root / path).is_dir() else (root / path).unlink()


def test_complete_layout_gives_the_four_standard_paths(tmp_path):
    make(tmp_path)
    layout = coco_layout(tmp_path)
    assert layout.train_images == tmp_path / "train2017"
    assert layout.train_annotations == tmp_path / "annotations" / "instances_train2017.json"
    assert layout.val_images == tmp_path / "val2017"
    assert layout.val_annotations == tmp_path / "annotations" / "instances_val2017.json"


def test_missing_set_shows_layout_download_script_and_shapes(tmp_path):
    with pytest.raises(MissingDataset) as caught:
        coco_layout(tmp_path / "coco")
    message = str(caught.value)
    for part in (
        str(tmp_path / "coco"),
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        "train2017/",
        "val2017/",
        "python3 scripts/download_coco.py",
        "--dataset shapes",
        "--train-annotations",
    ):
        assert part in message
    assert message.count("MISSING") == 4


def test_only_what_is_missing_is_marked_and_validation_alone_does_not_ask_for_training_files(tmp_path):
    make(tmp_path, without=["train2017", "annotations/instances_train2017.json"])
    (tmp_path / "annotations" / "instances_train2017.json").mkdir()  # a folder in place of the file
    with pytest.raises(MissingDataset) as caught:
        coco_layout(tmp_path)
    marked = [line.split()[0] for line in str(caught.value).splitlines() if line.endswith("MISSING")]
    assert marked == ["annotations/instances_train2017.json", "train2017/"]
    assert coco_layout(tmp_path, train=False).val_images.is_dir()
