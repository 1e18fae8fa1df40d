import torch
import torch.nn.functional as F

from detection.models.ops.feature_table import cell_table, level_layout, windows_3x3


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
