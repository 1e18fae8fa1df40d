"""Two processes: what they agree on, and that they do together what one would do alone."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data import CocoDataset, TrainLoader, read_coco


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shapes_set: Path) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    content = json.loads((shapes_set / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][:1]
    kept = content["images"][0]["id"]
    content["annotations"] = [record for record in content["annotations"] if record["image_id"] == kept]
    (folder / "one_image.json").write_text(json.dumps(content))
    # Two images to train on and one to validate on cannot be read.
    shutil.copytree(shapes_set, folder / "broken_set")
    for name in ("train2017/000000000003", "train2017/000000000010", "val2017/000000000002"):
        (file,) = (folder / "broken_set").glob(f"{name}.*")
        file.write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path, program: Callable[..., Any], arguments: Callable[..., list[str]]) -> list[dict[str, Any]]:
    """What two_ranks.py found on rank 0 and on rank 1."""
    words = arguments(folder, "--max-epochs", "1")
    place = words.index("--output-dir")
    del words[place : place + 2]
    with program("distributed/two_ranks.py", folder, json.dumps(free_ports(15)), *words, ranks=2) as processes:
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, out[-3000:] + err[-6000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., int]) -> Callable[..., Path]:
    def train(*words: str) -> Path:
        output = tmp_path_factory.mktemp("alone") / "run"
        assert start(output, "--max-epochs", "1", "--norm", "gn", "--limit-val-batches", "9", *words) == 0
        return output

    return train


def test_an_error_on_one_process_is_the_same_error_on_all(ranks):
    for found in (found["agreed"] for found in ranks):
        assert found["together, one fails"] == "rank 1 does not like it"
        assert found["together, both fail"] == "nobody likes it"  # once
        assert found["main first, main fails"] == "rank 0 does not like it"
        assert found["main first"] == "result 0"
        assert found["broadcast"] == {"rank": 0}
        assert found["largest"] == 1
        assert found["mean"] == [1.5, 5.0]
        assert found["weights"] == [3.0, 7.0]
    assert [found["agreed"]["together"] for found in ranks] == ["result 0", "result 1"]


def test_a_loss_that_is_not_finite_on_one_process_is_told_by_all_with_its_images(ranks):
    message = ranks[0]["non_finite"]
    assert ranks[1]["non_finite"] == message
    assert "iteration 1 " in message
    assert "process 1: loss = nan, loss_cls = nan; image ids [11]" in message
    assert "process 0" not in message


def test_synchronized_batch_norm_equals_one_process_with_the_joint_batch(ranks):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    pixels = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 50
    pixels.requires_grad_()
    outputs = network.train()(pixels)
    outputs.square().mul(torch.arange(1.0, 37.0).view(6, 6)[:4, :4]).sum().backward()
    found = [rank["synchronized_norm"] for rank in ranks]
    close = {"rtol": 2e-4, "atol": 2e-4}
    torch.testing.assert_close(torch.cat([one["outputs"] for one in found]), outputs.detach(), **close)
    largest = float(pixels.grad.abs().max())
    joint = torch.cat([one["input_gradient"] for one in found])
    torch.testing.assert_close(joint / largest, pixels.grad / largest, rtol=1e-3, atol=1e-3)
    for name, parameter in network.named_parameters():
        scale = float(parameter.grad.abs().max()) + 1.0
        torch.testing.assert_close(found[0]["gradients"][name] / scale, parameter.grad / scale, rtol=1e-3, atol=1e-3)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[0]["state"][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[0]["state"][name], found[1]["state"][name])
    torch.testing.assert_close(
        torch.cat([one["evaluated"] for one in found]), network.eval()(pixels).detach(), rtol=1e-3, atol=1e-3
    )


def test_statistics_are_those_of_rank_0_once_they_are_shared(ranks):
    assert [found["shared_buffers"] for found in ranks] == [[5.0, 3], [5.0, 3]]


@pytest.mark.parametrize("case", ["rank 1 has none", "nobody has any"])
def test_a_process_without_boxes_takes_part_and_every_parameter_gets_its_gradient(case: str, ranks):
    found = [rank["without_boxes"][case] for rank in ranks]
    for one in found:
        assert not one["without gradient"]
        assert all(np.isfinite(value) for value in one["losses"].values())
    assert found[1]["losses"]["loss_bbox"] == found[1]["losses"]["loss_rpn_bbox"] == 0
    for name, gradient in found[0]["gradients"].items():
        assert torch.equal(gradient, found[1]["gradients"][name]), name


def test_every_training_ends_with_the_status_it_should_on_both(ranks):
    for found in ranks:
        assert found["trainings"] == {
            "as one process": 0,
            "one image": 0,
            "whole": 0,
            "stopped in training": 75,
            "stopped in validation": 75,
            "resumed": 0,
            "moving": 0,
            "staying": 0,
        }


def test_two_processes_follow_the_losses_of_one_with_the_same_global_batch(ranks, folder, alone, records_of):
    run_on_all_ranks = records_of(folder / "as_one", "train")
    for words in (["--batch-size", "4"], ["--batch-size", "2", "--accumulate", "2"]):
        one = records_of(alone(*words), "train")
        assert len(one) == len(run_on_all_ranks) == 3
        for ours, theirs in zip(run_on_all_ranks, one, strict=True):
            assert ours["lr"] == theirs["lr"]
            for name in ("loss", "loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (words, name)


def test_gradients_that_stay_in_their_buckets_train_as_those_that_move_there(
    ranks, folder, records_of, load, same_state
):
    assert records_of(folder / "staying") == records_of(folder / "moving")
    states = [load(folder / name / "checkpoints" / "last.pt") for name in ("staying", "moving")]
    same_state(states[0]["model"], states[1]["model"])


def test_unequal_shards_are_validated_as_by_one_process(ranks, folder, alone, records_of):
    (ours,), (theirs,) = records_of(folder / "as_one", "val"), records_of(alone("--batch-size", "4"), "val")
    assert ours["num_images"] == theirs["num_images"] == 6
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)  # weights of other rounding, other samples
    results = json.loads((folder / "as_one" / "detections_val.json").read_text())
    ids = [entry["image_id"] for entry in results]
    assert ids == sorted(ids) and len(set(ids)) == 6
    assert max(map(ids.count, set(ids))) <= 10  # an image run twice would have more detections than allowed


def test_a_process_without_an_image_to_validate_takes_part(ranks, folder, records_of):
    (record,) = records_of(folder / "one_image", "val")
    assert record["num_images"] == 1 and "segm_mAP" in record


def test_a_run_stopped_by_a_signal_to_one_process_resumes_to_the_same_bits(ranks, folder, records_of, load, same_state):
    states = [load(folder / name / "checkpoints" / "last.pt") for name in ("whole", "stopped")]
    for state in states:
        del state["config"]
    same_state(*states)
    assert records_of(folder / "whole") == records_of(folder / "stopped")
    # Each process detects with the same statistics, and not with those it has kept for itself.
    for file in ("detections_val.json", "detections_val_segm.json"):
        first, second = ((folder / name / file).read_text() for name in ("whole", "stopped"))
        assert first == second and '"score"' in first


def test_any_division_of_a_global_batch_has_the_same_images_order_and_flips(shapes_set: Path):
    annotations = read_coco(shapes_set / "annotations" / "instances_train2017.json")
    dataset = CocoDataset(shapes_set / "train2017", annotations, training=True)

    def seen(world_size: int, batch_size: int, accumulate: int) -> list[tuple]:
        shape = {"batch_size": batch_size, "accumulate": accumulate, "world_size": world_size}
        sizes = {"min_size": 64, "max_size": 96, "seed": 3}
        loaders = [TrainLoader(dataset, rank=rank, **shape, **sizes) for rank in range(world_size)]
        images = []
        for batches in zip(*(loader.batches(0, 6) for loader in loaders), strict=True):
            for batch in batches:
                pixels, ends = batch.pixels.numpy(), np.cumsum([3 * h * w for h, w in batch.native_sizes])
                parts = [part.tobytes() for part in np.split(pixels, ends[:-1])]
                facts = [batch.image_ids.tolist(), batch.flips, batch.sample_keys.tolist(), batch.places.tolist()]
                boxes = [rows.numpy().tobytes() for rows in batch.boxes_xyxy]
                images += zip([batch.iteration] * len(parts), *facts, parts, boxes, strict=True)
        return images

    alone = seen(1, 4, 1)
    assert len(alone) == 24
    assert seen(2, 2, 1) == seen(1, 2, 2) == seen(2, 1, 2) == seen(4, 1, 1) == alone


def test_missing_data_is_told_once_by_two_processes_without_a_traceback(ranks):
    found = [rank["missing_data"] for rank in ranks]
    assert [one["status"] for one in found] == [1, 1]
    said = found[0]["said"]
    assert said.count("instances_train2017.json") == said.count("scripts/download_coco.py") == 1
    assert "--dataset shapes" in said
    assert not found[1]["said"]
    assert not any(one["wrote"] for one in found)


def test_a_loss_that_is_not_finite_on_one_process_is_skipped_by_both(ranks, folder, records_of):
    assert [found["faults"]["skipping"] for found in ranks] == ["status 0", "status 0"]
    assert [record["skipped_steps"] for record in records_of(folder / "skipping", "train")] == [0, 1, 1]
    first, second = (found["faults"]["weights"] for found in ranks)
    for found in (first, second):
        for name, value in found[0].items():
            assert torch.equal(value, found[1][name]), name
        assert any(not torch.equal(value, found[2][name]) for name, value in found[0].items())
    for one, other in zip(first, second, strict=True):
        for name, value in one.items():
            if "running" not in name and "num_batches" not in name:  # statistics are each process's own
                assert torch.equal(value, other[name]), name
    log = (folder / "skipping" / "train.log").read_text()
    assert log.count("step skipped (1 so far): iteration 1 ") == 1
    assert "process 1: loss = inf, loss_cls = inf; image ids [" in log and "process 0: " not in log


def test_unreadable_images_are_replaced_reported_once_and_counted(ranks, folder, alone, records_of):
    assert [found["faults"]["replacing"] for found in ranks] == ["status 0", "status 0"]
    records = records_of(folder / "replacing", "train")
    assert sum(record.get("replaced_images", 0) for record in records) >= 2
    (validation,) = records_of(folder / "replacing", "val")
    assert validation["unreadable_images"] == 1 and validation["num_images"] == 6
    assert any("could not be read" in note for note in validation["notes"])
    results = json.loads((folder / "replacing" / "detections_val.json").read_text())
    assert {entry["image_id"] for entry in results} == {1, 3, 4, 5, 6}
    log = (folder / "replacing" / "train.log").read_text()
    for image in ("train image id 3 ", "train image id 10 ", "val image id 2 "):
        assert log.count(f"warning: {image}") == 1
    # One process does the same.
    one = alone("--data-path", folder / "broken_set", "--batch-size", "4", "--limit-train-batches", "9", "--norm", "bn")
    assert [r.get("replaced_images") for r in records_of(one, "train")] == [r.get("replaced_images") for r in records]


def test_too_many_unreadable_images_end_both_processes_with_one_message(ranks, folder):
    first, second = (found["faults"]["too many"] for found in ranks)
    assert first == second
    assert "2 images cannot be used, --max-bad-images is 1" in first
    assert "000000000003" in first and "000000000010" in first
    assert not list((folder / "too_many").glob("checkpoints/*.pt"))
    first, second = (found["faults"]["too many to validate"] for found in ranks)
    assert first == second and "--max-bad-images is 0" in first


def test_processes_with_other_annotations_are_refused_before_the_training(ranks, folder):
    first, second = (found["faults"]["other data"] for found in ranks)
    assert first == second
    assert first.startswith("process 1 has another data_digest than process 0\n")
    assert "same annotation files on every machine" in first
    assert not (folder / "other_data" / "metrics.jsonl").exists()
