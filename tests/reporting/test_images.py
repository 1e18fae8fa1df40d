import colorsys
import itertools

import numpy as np
import pytest
from PIL import Image

from detection.reporting import class_color, draw_boxes, mosaic, save_png, side_by_side

NAMES = ["cat", "a very long class name indeed", "dog"] + ["Name"] * 77
BOX = (40, 50, 100, 90)
LUMA = (0.299, 0.587, 0.114)


def gray(height=120, width=160, level=128):
    return np.full((height, width, 3), level, dtype=np.uint8)


def draw(image, *boxes, labels=(2,), scores=None, **settings):
    scores = None if scores is None else np.array(scores)
    return draw_boxes(image, np.array(boxes, dtype=float), np.array(labels), NAMES, scores, **settings)


def area_of(image, color):
    return int((image == color).all(axis=2).sum())


def test_a_box_is_drawn_in_its_class_color_and_the_given_image_stays():
    image = gray()
    drawn = draw(image, BOX)
    assert (drawn.shape, drawn.dtype) == (image.shape, np.uint8)
    assert tuple(drawn[70, 40]) == tuple(drawn[89, 60]) == class_color(2)
    assert tuple(drawn[70, 70]) == (128, 128, 128)
    assert (image == 128).all()
    assert (draw(image, labels=()) == image).all()


def test_masks_are_tinted_and_rimmed_in_the_colors_of_their_classes():
    mask = np.zeros((60, 80), bool)  # half the resolution of the image
    mask[30:40, 30:50] = True
    drawn = draw(gray(), BOX, masks=[mask])
    color = np.array(class_color(2))
    np.testing.assert_allclose(drawn[70, 90], 128 + 0.45 * (color - 128), atol=1)
    assert tuple(drawn[70, 60]) == tuple(color) and tuple(drawn[70, 58]) == (128, 128, 128)


@pytest.mark.parametrize(
    "box",
    [(0, 0, 20, 15), (140, 0, 160, 15), (0, 100, 10, 120), (150, 110, 160, 120), (0, 0, 160, 120), (-9, -9, 300, 300)],
)
def test_the_whole_name_lies_inside_the_image(box):
    """The ground of the name shows as a filled area of the size that it has in the open middle of an image."""
    free, at_the_edge = (
        area_of(drawn, class_color(1)) + area_of(drawn, (0, 0, 0))
        for drawn in (draw(gray(500, 500), (200, 200, 201, 201), labels=(1,)), draw(gray(), box, labels=(1,)))
    )
    assert at_the_edge >= 0.5 * free


def test_letters_stand_out_from_the_ground_of_their_name():
    for label in range(80):
        brightness = np.dot(draw(gray(60, 60), (30, 30, 31, 31), labels=(label,)), LUMA)
        assert abs(brightness - np.dot(class_color(label), LUMA)).max() > 100, label


def test_names_of_neighboring_boxes_do_not_cover_each_other():
    boxes = (100, 100, 130, 130), (104, 102, 134, 132)
    both = draw(gray(300, 300), *boxes, labels=(0, 2))
    for box, label in zip(boxes, (0, 2), strict=True):
        alone = draw(gray(300, 300), box, labels=(label,))
        assert area_of(both, class_color(label)) > 0.8 * area_of(alone, class_color(label))


def test_scores_are_shown():
    images = [draw(gray(), BOX, scores=scores) for scores in (None, [0.31], [0.97])]
    assert all((one != other).any() for one, other in itertools.combinations(images, 2))


def test_an_image_scaled_to_a_longest_side_takes_its_boxes_along():
    drawn = draw(gray(), BOX, longest_side=640)
    assert drawn.shape == (480, 640, 3)
    assert tuple(drawn[280, 160]) == class_color(2)


@pytest.mark.parametrize(("size", "width"), [(100, 1), (1000, 4)])
def test_lines_grow_with_the_image(size, width):
    drawn = draw(gray(size, size), (0.3 * size, 0.3 * size, 0.9 * size, 0.9 * size))
    assert int((drawn[int(0.7 * size), : size // 2] == class_color(2)).all(axis=1).sum()) == width


def test_colors_of_eighty_classes_differ_and_neighbors_are_far_apart():
    colors = [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    hues = [colorsys.rgb_to_hsv(*(value / 255 for value in color))[0] for color in colors]
    for one, other in itertools.pairwise(hues):
        assert min(abs(one - other), 1 - abs(one - other)) > 0.3


def test_two_images_stand_side_by_side_under_their_titles():
    sheet = side_by_side(gray(level=10), gray(level=250))
    for columns, level in ((slice(160), 10), (slice(-160, None), 250)):
        assert (sheet[-120:, columns] == level).all()
        assert (sheet[:-120, columns] < 100).any()


def test_a_mosaic_takes_images_of_any_size_in_order():
    sizes = [(100, 200), (200, 100), (50, 50), (30, 90), (10, 10)]
    images = [gray(*size, level=10 + 40 * number) for number, size in enumerate(sizes)]
    sheet = mosaic(images, columns=2, cell=64)
    levels = [level for level in dict.fromkeys(sheet[:, :, 0].ravel().tolist()) if level != 255]
    assert sorted(levels) == [10, 50, 90, 130, 170]
    assert tuple(sheet[0, 0]) == (10, 10, 10)
    assert area_of(sheet, (90, 90, 90)) == 64 * 64


def test_a_saved_png_holds_the_same_pixels(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    save_png(tmp_path / "new" / "image.png", image)
    with Image.open(tmp_path / "new" / "image.png") as read:
        assert (np.asarray(read) == image).all()
