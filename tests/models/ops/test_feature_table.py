import torch
import torch.nn.functional as F

from detection.models.ops.feature_table import cell_table, level_layout, take_rows, windows_3x3


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


def test_rows_taken_from_a_table_and_the_table_itself_share_one_gradient():
    table = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rows = torch.tensor([4, 0, 4, 5])
    again, taken = take_rows(table, rows)
    assert torch.equal(again, table) and torch.equal(taken, table[rows])
    (expected,) = torch.autograd.grad(table.square().sum() + (3 * table[rows]).exp().sum(), table)
    (found,) = torch.autograd.grad(again.square().sum() + (3 * taken).exp().sum(), table)
    torch.testing.assert_close(found, expected)


def test_either_may_be_left_without_a_gradient():
    table = torch.ones(3, 2, requires_grad=True)
    again, taken = take_rows(table, torch.tensor([1, 1]))
    assert torch.autograd.grad(again.sum(), table)[0].tolist() == [[1, 1]] * 3
    again, taken = take_rows(table, torch.tensor([1, 1]))
    assert torch.autograd.grad(taken.sum(), table)[0].tolist() == [[0, 0], [2, 2], [0, 0]]
