"""Several data sets in one run: the classes of both, the same order on any number of processes, exact resumes, and
figures of each set by itself."""

import json
import re
import shutil

import pytest

from detection.config import ConfigError, parse_arguments
from detection.engine import RunError
from detection.evaluation import evaluate_results
from tests.data.layouts import exports

NEW_NAMES = {"circle": "disc", "cross": "CROSS", "star": "star"}


@pytest.fixture(scope="session")
def second_set(shapes_set, tmp_path_factory):
    """The same images in another folder, with other classes: discs, crosses in capitals and stars; ids reversed."""
    folder = tmp_path_factory.mktemp("second") / "second"
    shutil.copytree(shapes_set, folder)
    for file in folder.glob("annotations/*.json"):
        content = json.loads(file.read_text())
        kept = [each for each in content["categories"] if each["name"] in NEW_NAMES]
        new_id = {each["id"]: 100 - number for number, each in enumerate(kept)}
        content["categories"] = [{"id": new_id[each["id"]], "name": NEW_NAMES[each["name"]]} for each in kept]
        boxes = [each for each in content["annotations"] if each["category_id"] in new_id]
        content["annotations"] = [each | {"category_id": new_id[each["category_id"]]} for each in boxes]
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def words(shapes_set, second_set):
    """Options for both sets, with norms that do not depend on the number of processes."""
    sets = ["--data-path", shapes_set, second_set, "--class-map", "CROSS=cross", "--set-shares", "shapes=1", "second=3"]
    return [*map(str, sets), "--norm", "gn", "--global-batch-size", "6", "--checkpoint-iterations", "1"]


@pytest.fixture(scope="session")
def whole(tmp_path_factory, start, words):
    """Output of an undisturbed run on both sets."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert start(output, *words, "--limit-val-batches", "6") == 0
    return output


def test_a_killed_run_resumes_to_the_same_bits(whole, start, start_and_kill, words, load, same_state, tmp_path):
    start_and_kill(4, tmp_path / "run", *words)
    assert start(tmp_path / "run", *words, "--resume") == 0
    one, other = (load(output / "checkpoints" / "last.pt") for output in (whole, tmp_path / "run"))
    same_state(one["model"], other["model"])
    same_state(one["optimizer"], other["optimizer"])
    assert one["class_names"] == ["circle", "ring", "triangle", "square", "star", "cross", "disc"]


def test_each_set_is_validated_by_itself_as_its_own_files_are(whole, shapes_set, second_set, records_of):
    *_, record = records_of(whole, "val")
    assert list(record["sets"]) == ["shapes", "second"] and record["num_images"] == 12
    for name, folder in (("shapes", shapes_set), ("second", second_set)):
        file = folder / "annotations" / "instances_val2017.json"
        alone = evaluate_results(file, whole / f"detections_val_{name}.json")
        figures = record["sets"][name]
        assert [figures[each] for each in ("mAP", "mAP_50", "AR_100")] == pytest.approx(
            [alone[each] for each in ("mAP", "mAP_50", "AR_100")], abs=1e-9
        )
    assert record["sets"]["second"]["per_class"]["circle"] == record["sets"]["shapes"]["per_class"]["disc"] == -1
    assert not (whole / "detections_val.json").exists()


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_take_the_images_of_one_in_its_order_across_a_resume(
    ranks, whole, program, arguments, words, records_of, tmp_path
):
    for more in (["--max-epochs", "1"], ["--resume"]):
        with program("tiny_model.py", *arguments(tmp_path / "run", *words, *more), ranks=ranks) as processes:
            assert [process.wait() for process in processes] == [0] * ranks, processes[0].communicate()[1]
    one, several = (records_of(output, "train") for output in (whole, tmp_path / "run"))
    assert len(one) == 6
    for here, there in zip(one, several, strict=True):
        assert (here["iteration"], here["lr"]) == (there["iteration"], there["lr"])
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-3)


def test_the_start_says_what_is_merged_and_what_each_set_lacks(start, words, tmp_path, capsys):
    assert start(tmp_path / "run", *words, "--dry-run") == 0
    said = capsys.readouterr().out
    assert re.search(r"train: \d+ images of 2 sets\n +shapes train: .*\n +second train: ", said)
    assert "classes   circle, ring, triangle, square, star, cross, disc\n" in said
    assert "instances_train2017.json: has no class 'circle', 'ring'" in said
    assert "sets sampled by shares (shapes=1, second=3): an image comes 0." in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            [],
            r"what may be one class in 2 ways: 'cross' \(.*shapes.*\), 'CROSS' \(.*second.*--class-map CROSS=cr",
        ),
        (["--class-map", "kross=cross"], r"--class-map kross=cross: no set has a class 'kross' \(did you mean 'cross'"),
        (["--classes", "disc,dog", "--class-map", "CROSS=cross"], "no set has 'dog'; there are 'circle'"),
        (["--class-map", "CROSS=cross", "--set-shares", "shapes=1"], "the set 'second' has no share"),
        (["--class-map", "CROSS=cross", "--class-shares", "dog=1"], "there is no class 'dog'"),
    ],
)
def test_what_cannot_be_merged_or_shared_is_named(more, message, start, words, tmp_path):
    given = [*words[:3], *more] if more else words[:3]
    with pytest.raises((RunError, ConfigError), match=message):
        start(tmp_path / "run", *given, "--dry-run")


@pytest.mark.parametrize("lvis_first", [True, False])
def test_several_validation_sets_of_which_one_is_lvis_are_refused(lvis_first, shapes_set, start, tmp_path):
    names, images = "annotations/instances_{}2017.json", shapes_set / "val2017"
    content = json.loads((shapes_set / names.format("val")).read_text())
    for image in content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    lvis, plain = tmp_path / "lvis.json", shapes_set / names.format("val")
    lvis.write_text(json.dumps(content))
    words = ["--train-images", shapes_set / "train2017", "--train-annotations", shapes_set / names.format("train")]
    words += ["--val-images", images, images, "--val-annotations", *([lvis, plain] if lvis_first else [plain, lvis])]
    with pytest.raises(RunError, match=r"lvis\.json: its images were searched for some classes each \(LVIS\)"):
        start(tmp_path / "run", *map(str, words), "--dry-run")


def test_files_and_shares_that_do_not_fit_are_refused_by_the_command_line():
    pairs = ["--train-images", "a", "--train-annotations", "a.json", "b.json"]
    with pytest.raises(ConfigError, match="--train-images names 1 folders and --train-annotations 2 files"):
        parse_arguments(pairs)
    with pytest.raises(ConfigError, match="--set-shares is for several data sets, and there is one"):
        parse_arguments(["--data-path", "a", "--set-shares", "a=1"])
    for flag in ("--class-map", "--class-shares", "--set-shares"):
        with pytest.raises(ConfigError, match=f"{flag} names 'a' twice"):
            parse_arguments(["--data-path", "a", "b", flag, "a=1", "b=1", "a=2"])


def test_lists_of_vocs_image_sets_are_sets_with_all_classes_and_vocs_metric(start, records_of, tmp_path, monkeypatch):
    """As configurations of MMDetection name them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exports.voc_devkit(tmp_path)
    later = tmp_path / "VOCdevkit" / "VOC2012"
    earlier = later.with_name("VOC2007")
    shutil.copytree(later, earlier)
    lists = "ImageSets/Main"
    words = ["--train-images", earlier, later, "--train-annotations", earlier / lists / "train.txt"]
    words += [later / lists / "train.txt", "--val-images", earlier, "--val-annotations", earlier / lists / "val.txt"]
    words += ["--classes", "coin", "key", "wheel", "--voc-metric", "11points", "--best-metric", "voc_mAP"]
    words += ["--min-size", "33", "--max-size", "64", "--max-epochs", "1", "--min-box-side", "2"]
    assert start(tmp_path / "run", *words) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert "train: 8 images of 2 sets" in log and "VOC2007 train: 4 images" in log
    assert "classes   coin, key, wheel\n" in log
    (record,) = records_of(tmp_path / "run", "val")
    assert list(record["voc_per_class"]) == ["coin", "key", "wheel"]
    assert record["voc_per_class"]["wheel"] == -1 != record["voc_mAP"]
    with pytest.raises(RunError, match=r"none\.txt: there is no such list"):
        start(tmp_path / "other", *words[:4], earlier / "none.txt", *words[5:])
