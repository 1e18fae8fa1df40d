import colorsys
import itertools

import numpy as np
import pytest
from PIL import Image

from detection.reporting import class_color, draw_boxes, mosaic, save_png, side_by_side

NAMES = ["cat", "a very long class name indeed", "dog"]


def gray(height=120, width=160, level=128):
    return np.full((height, width, 3), level, dtype=np.uint8)


def test_a_box_is_drawn_in_its_class_color_and_the_given_image_stays():
    image = gray()
    drawn = draw_boxes(image, np.array([[40.0, 50.0, 100.0, 90.0]]), np.array([2]), NAMES)
    assert (drawn.shape, drawn.dtype) == (image.shape, np.uint8)
    assert tuple(drawn[70, 40]) == class_color(2)
    assert tuple(drawn[89, 60]) == class_color(2)
    assert tuple(drawn[70, 70]) == (128, 128, 128)
    assert (image == 128).all()


def test_without_boxes_the_image_is_the_image():
    image = gray()
    assert (draw_boxes(image, np.zeros((0, 4)), np.zeros(0, dtype=int), NAMES) == image).all()


@pytest.mark.parametrize(
    "box",
    [(0, 0, 20, 15), (140, 0, 160, 15), (0, 100, 10, 120), (150, 110, 160, 120), (0, 0, 160, 120), (-9, -9, 300, 300)],
)
def test_the_whole_name_lies_inside_the_image(box):
    """The ground of the name shows as a filled area of the size that it has in the open middle of an image."""

    def filled_area(image, box):
        drawn = draw_boxes(image, np.array([box], dtype=float), np.array([1]), NAMES)
        return int((drawn == class_color(1)).all(axis=2).sum() + (drawn == 0).all(axis=2).sum())

    free = filled_area(gray(500, 500), (200, 200, 201, 201))
    assert filled_area(gray(), box) >= 0.5 * free


def test_letters_stand_out_from_the_ground_of_their_name():
    for label in range(80):
        drawn = draw_boxes(gray(60, 60), np.array([[30.0, 30.0, 31.0, 31.0]]), np.array([label]), ["Name"] * 80)
        brightness = np.dot(drawn, (0.299, 0.587, 0.114))
        assert abs(brightness - np.dot(class_color(label), (0.299, 0.587, 0.114))).max() > 100, label


def test_names_of_neighboring_boxes_do_not_cover_each_other():
    boxes = np.array([[100.0, 100.0, 130.0, 130.0], [104.0, 102.0, 134.0, 132.0]])
    both = draw_boxes(gray(300, 300), boxes, np.array([0, 2]), NAMES)
    for number, label in enumerate((0, 2)):
        alone = draw_boxes(gray(300, 300), boxes[number : number + 1], np.array([label]), NAMES)
        area = [(image == class_color(label)).all(axis=2).sum() for image in (alone, both)]
        assert area[1] > 0.8 * area[0]


def test_scores_are_shown():
    box, label = np.array([[40.0, 50.0, 100.0, 90.0]]), np.array([0])
    images = [draw_boxes(gray(), box, label, NAMES, np.array([score])) for score in (0.31, 0.97)]
    assert (images[0] != images[1]).any()
    assert (images[0] != draw_boxes(gray(), box, label, NAMES)).any()


def test_a_image_scaled_to_a_longest_side_takes_its_boxes_along():
    drawn = draw_boxes(gray(), np.array([[40.0, 50.0, 100.0, 90.0]]), np.array([2]), NAMES, longest_side=640)
    assert drawn.shape == (480, 640, 3)
    assert tuple(drawn[280, 160]) == class_color(2)


def test_lines_grow_with_the_image():
    def line_pixels(size):
        box = np.array([[0.3, 0.3, 0.9, 0.9]]) * size
        row = draw_boxes(gray(size, size), box, np.array([0]), NAMES)[int(0.7 * size), : size // 2]
        return int((row == class_color(0)).all(axis=1).sum())

    assert line_pixels(100) == 1
    assert line_pixels(1000) == 4


def test_colors_of_eighty_classes_differ_and_neighbors_are_far_apart():
    colors = [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    hues = [colorsys.rgb_to_hsv(*(value / 255 for value in color))[0] for color in colors]
    for one, other in itertools.pairwise(hues):
        assert min(abs(one - other), 1 - abs(one - other)) > 0.3


def test_two_images_stand_side_by_side_under_their_titles():
    left, right = gray(level=10), gray(level=250)
    sheet = side_by_side(left, right)
    assert sheet.shape[1] >= 2 * left.shape[1]
    assert (sheet[-120:, :160] == 10).all()
    assert (sheet[-120:, -160:] == 250).all()
    titles = sheet[:-120]
    assert (titles[:, :160] < 100).any()
    assert (titles[:, -160:] < 100).any()


def test_a_mosaic_takes_images_of_any_size_in_order():
    sizes = [(100, 200), (200, 100), (50, 50), (30, 90), (10, 10)]
    images = [gray(*size, level=10 + 40 * number) for number, size in enumerate(sizes)]
    sheet = mosaic(images, columns=2, cell=64)
    levels = [level for level in dict.fromkeys(sheet[:, :, 0].ravel().tolist()) if level != 255]
    assert sorted(levels) == [10, 50, 90, 130, 170]
    assert tuple(sheet[0, 0]) == (10, 10, 10)
    assert (sheet == 90).all(axis=2).sum() == 64 * 64


def test_a_saved_png_holds_the_same_pixels(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    save_png(tmp_path / "new" / "image.png", image)
    with Image.open(tmp_path / "new" / "image.png") as read:
        assert (np.asarray(read) == image).all()
