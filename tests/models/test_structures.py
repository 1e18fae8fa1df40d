import pytest
import torch

from detection.models import ModelError, build_model
from detection.models.structures import batch_images, batch_targets

CPU = torch.device("cpu")


def test_images_are_padded_to_common_multiples_of_32():
    images = [torch.full((3, 40, 70), 7, dtype=torch.uint8), torch.full((3, 65, 30), 9, dtype=torch.uint8)]
    batch = batch_images(images, CPU)
    assert batch.pixels.shape == (2, 3, 96, 96)
    assert batch.pixels.dtype == torch.uint8
    assert batch.sizes.tolist() == [[40, 70], [65, 30]]
    assert batch.pixels[0].sum() == 7 * 3 * 40 * 70
    assert batch.pixels[1, :, :65, :30].eq(9).all()


def test_one_float_image_makes_the_whole_batch_float():
    batch = batch_images([torch.zeros(3, 32, 32, dtype=torch.uint8), torch.full((3, 32, 32), 0.5)], CPU)
    assert batch.pixels.dtype == torch.float32
    assert batch.pixels[1, 0, 0, 0] == 0.5


@pytest.mark.parametrize("images", [[], [torch.zeros(1, 8, 8)], [torch.zeros(3, 8)], [torch.zeros(3, 0, 8)]])
def test_what_is_no_image_is_refused(images):
    with pytest.raises(ModelError):
        batch_images(images, CPU)


def test_targets_are_padded_and_their_keys_come_from_the_default_generator():
    targets = [
        {"boxes_xyxy": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), "labels": torch.tensor([3, 0])},
        {"boxes_xyxy": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    torch.manual_seed(5)
    batch = batch_targets(targets, 4, CPU)
    assert batch.boxes_xyxy.shape == (2, 2, 4)
    assert batch.valid.tolist() == [[True, True], [False, False]]
    assert batch.labels[0].tolist() == [3, 0]
    torch.manual_seed(5)
    assert torch.equal(batch.sample_keys, batch_targets(targets, 4, CPU).sample_keys)
    assert not torch.equal(batch.sample_keys, batch_targets(targets, 4, CPU).sample_keys)


def test_masks_are_cropped_and_packed_one_after_another():
    masks = torch.rand(5, 12, 17, generator=torch.Generator().manual_seed(1)) < 0.1
    masks[:, :3], masks[:, :, 11:], masks[2] = False, False, False
    given = [masks[:2], masks[2:], masks[:0].to(torch.uint8)]
    targets = [
        {"boxes_xyxy": torch.ones(len(each), 4), "labels": torch.zeros(len(each), dtype=torch.int64), "masks": each}
        for each in given
    ]
    bits, offsets, rectangles = batch_targets(targets, 4, CPU).masks
    assert bits.dtype == torch.uint8 and offsets.shape == (3, 3) and rectangles.shape == (3, 3, 4)
    for image, of_image in enumerate(given):
        for number in range(3):
            whole = torch.zeros(12, 17, dtype=torch.bool)
            x, y, width, height = rectangles[image, number].tolist()
            first = int(offsets[image, number])
            whole[y : y + height, x : x + width] = bits[first : first + width * height].view(height, width).bool()
            assert torch.equal(whole, of_image[number].bool() if number < len(of_image) else torch.zeros_like(whole))
    assert len(bits) == int(rectangles[..., 2:].prod(dim=2).sum())


@pytest.mark.parametrize("masks", [None, torch.zeros(1, 8, 8, dtype=torch.bool), torch.zeros(2, 8, 8)])
def test_masks_that_do_not_fit_are_refused(masks):
    target = {"boxes_xyxy": torch.ones(2, 4), "labels": torch.zeros(2, dtype=torch.int64)}
    whole = {**target, "masks": torch.zeros(2, 8, 8, dtype=torch.bool)}
    with pytest.raises(ModelError, match="target 1"):
        batch_targets([whole, target if masks is None else {**target, "masks": masks}], 4, CPU)


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), r"\[2, 4\]"),
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), r"\[2, 5\]"),
        (torch.zeros(1, 4), torch.tensor([4]), r"0\.\.3"),
        (torch.zeros(1, 4), torch.tensor([-1]), r"0\.\.3"),
    ],
)
def test_targets_that_do_not_fit_are_refused(boxes, labels, message):
    with pytest.raises(ModelError, match=message):
        batch_targets([{"boxes_xyxy": boxes, "labels": labels}], 4, CPU)


def test_training_without_targets_or_with_too_few_is_refused():
    model = build_model("faster_rcnn_r18_fpn", num_classes=2).train()
    images = [torch.zeros(3, 32, 32)] * 2
    with pytest.raises(ModelError, match="targets"):
        model(images)
    with pytest.raises(ModelError, match="2 images and 1 targets"):
        model(images, [{"boxes_xyxy": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}])
