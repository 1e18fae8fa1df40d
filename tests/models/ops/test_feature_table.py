import torch
import torch.nn.functional as F

from detection.models import ImageBatch, TargetBatch, build_model
from detection.models.ops.backend import implementation
from detection.models.ops.feature_table import (
    cell_table,
    level_layout,
    maps_of_table,
    rows_of_table,
    shared_table,
    windows_3x3,
)


def test_windows_are_what_a_3x3_convolution_sees():
    sizes = [(5, 7), (3, 4), (1, 2), (1, 1)]
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, *size, generator=generator) for size in sizes]
    table = cell_table(maps)
    num_cells = sum(height * width for height, width in sizes)
    assert table.shape == (2 * num_cells + 1, 3)
    windows = windows_3x3(torch.arange(num_cells).expand(2, -1), level_layout(sizes))
    patches = table[windows]  # [B, cells, 9, C]
    expected = [F.unfold(each, 3, padding=1).view(2, 3, 9, -1).permute(0, 3, 2, 1) for each in maps]
    assert torch.equal(patches, torch.cat(expected, dim=1))
    for one, other in zip(maps_of_table(table, 2, sizes), maps, strict=True):
        assert torch.equal(one, other) and one.is_contiguous(memory_format=torch.channels_last)


def test_readers_of_a_table_add_to_one_gradient_that_is_rounded_once():
    table = torch.randn(40, 3).bfloat16().requires_grad_()
    rows = torch.randint(0, 40, (2, 200))
    weights = torch.randn(3, 200, 3).bfloat16()
    exact = table.detach().double().requires_grad_()
    with implementation(table_gradient="shared"):
        cells, gradient = shared_table(table)
        assert shared_table(table.detach())[1] is None and shared_table(exact)[1] is None

    def loss(cells, read, number, with_plain_reader):
        found = sum((read(some) * weights[i]).sum() for i, some in enumerate(rows[:number]))
        return found + (cells * weights[2, :40]).sum() + cells[:7].sum() if with_plain_reader else found

    # Twice over the same graph, with a reader that leaves its gradient to autograd, and without.
    for number, with_plain_reader in ((2, True), (2, True), (1, False)):
        (expected,) = torch.autograd.grad(loss(exact, exact.__getitem__, number, with_plain_reader), exact)
        ours = loss(cells, lambda some: rows_of_table(cells, some, gradient), number, with_plain_reader)
        (found,) = torch.autograd.grad(ours, table, retain_graph=True)
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4 if not with_plain_reader else 0.02)


def test_a_step_with_a_shared_gradient_has_the_gradients_of_autograd():
    torch.manual_seed(0)
    model = build_model("faster_rcnn_r18_fpn", 3, fpn_channels=16, roi_hidden_channels=16, rpn_samples_per_image=16)
    images = ImageBatch(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96]]))
    boxes = torch.tensor([[[8.0, 8, 40, 44]]])
    targets = TargetBatch(boxes, torch.tensor([[1]]), torch.tensor([[True]]), torch.tensor([5]))
    found = []
    for how in ("autograd", "shared"):
        model.zero_grad()
        with implementation(table_gradient=how):
            sum(model.train()(images, targets).values()).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
