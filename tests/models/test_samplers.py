import pytest
import torch

from detection.models.ops.matcher import IGNORED, NEGATIVE, POSITIVE
from detection.models.samplers import ROI_STAGE, RPN_STAGE, candidate_keys, sample


def kinds(num_positive, num_negative, num_ignored=0):
    counts = torch.tensor([num_positive, num_negative, num_ignored])
    return torch.tensor([POSITIVE, NEGATIVE, IGNORED]).repeat_interleave(counts)


def draw(kind, keys, num_samples=256, fraction=0.5, stage=RPN_STAGE):
    return sample(kind, keys, stage=stage, num_samples=num_samples, positive_fraction=fraction)


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "expected"),
    [(1000, 1000, (128, 128)), (5, 1000, (5, 251)), (1000, 7, (128, 7)), (0, 1000, (0, 256)), (3, 0, (3, 0))],
)
def test_positives_up_to_their_share_and_negatives_for_the_rest(num_positive, num_negative, expected):
    kind = kinds(num_positive, num_negative, 500)[None]
    chosen = draw(kind, torch.tensor([11]))
    index = chosen.candidate[chosen.chosen]
    assert (int(chosen.positive.sum()), int((chosen.chosen & ~chosen.positive).sum())) == expected
    assert len(index.unique()) == len(index)
    assert torch.equal(kind[0, index] == POSITIVE, chosen.positive[chosen.chosen])
    assert (kind[0, index] != IGNORED).all()


def test_with_a_hardness_the_hardest_of_each_kind_are_taken():
    hardness = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.2, 0.8, 0.3]])
    kind = torch.tensor([[POSITIVE, POSITIVE, POSITIVE, NEGATIVE, NEGATIVE, NEGATIVE, IGNORED]])
    chosen = sample(kind, torch.tensor([1]), stage=ROI_STAGE, num_samples=4, positive_fraction=0.5, hardness=hardness)
    assert sorted(chosen.candidate[0].tolist()) == [1, 2, 3, 5]
    assert chosen.positive.sum() == 2


def test_without_a_number_of_samples_everything_but_the_ignored_is_taken():
    kind = kinds(3, 4, 5)[None]
    chosen = draw(kind, torch.tensor([1]), num_samples=None)
    assert chosen.candidate is None
    assert torch.equal(chosen.positive, kind == POSITIVE)
    assert torch.equal(chosen.chosen, kind != IGNORED)
    values = torch.rand(1, 12, 4)
    assert chosen.take(values) is values


def test_every_candidate_is_drawn_equally_often_and_without_correlation():
    num_draws, num_candidates, num_samples = 4000, 100, 20
    kind = kinds(0, num_candidates)[None].expand(num_draws, -1)
    index = draw(kind, torch.arange(num_draws), num_samples=num_samples).candidate
    hits = torch.zeros(num_draws, num_candidates).scatter_(1, index, 1.0)
    share = num_samples / num_candidates
    variance = num_draws * share * (1 - share)
    chi_squared = ((hits.sum(0) - num_draws * share) ** 2 / variance).sum() * (1 - 1 / num_candidates)
    assert 60 < chi_squared < 149  # 99 degrees of freedom: 0.1 % and 99.9 %
    neighbors = (hits[:, :-1] * hits[:, 1:]).mean()
    assert neighbors.item() == pytest.approx(share * (num_samples - 1) / (num_candidates - 1), rel=0.02)
    successive = (hits[:-1] * hits[1:]).mean()
    assert successive.item() == pytest.approx(share**2, rel=0.02)


def test_keys_are_uniform_distinct_and_differ_between_stages():
    keys = candidate_keys(torch.tensor([7, 8]), RPN_STAGE, 200_000)
    assert all(len(row.unique()) == len(row) for row in keys)
    assert keys.min() >= 0
    for row in keys:
        counts = torch.histc((row / 2**61).float(), 50, 0, 1)
        assert ((counts - 4000) ** 2 / 4000).sum() < 86  # 49 degrees of freedom, 99.9 %
    other_stage = candidate_keys(torch.tensor([7]), ROI_STAGE, 200_000)[0]
    pairs = torch.stack((keys[0], keys[1], other_stage)).double()
    assert torch.corrcoef(pairs).triu(1).abs().max() < 0.01


def test_a_draw_depends_on_its_key_and_not_on_the_place_in_the_batch():
    kind = torch.stack((kinds(40, 300), kinds(10, 330), kinds(200, 140)))
    keys = torch.tensor([5, -(2**62), 2**62 + 1])
    together = draw(kind, keys, 64)
    order = torch.tensor([2, 0, 1])
    shuffled = draw(kind[order], keys[order], 64)
    assert torch.equal(shuffled.candidate, together.candidate[order])
    alone = draw(kind[1:2], keys[1:2], 64)
    assert torch.equal(alone.candidate[0], together.candidate[1])
    assert not torch.equal(draw(kind, keys + 1, 64).candidate, together.candidate)


def test_a_draw_does_not_change_with_padding_behind_the_candidates():
    kind = kinds(40, 300)[None]
    padded = torch.cat((kind, torch.full((1, 60), IGNORED)), dim=1)
    keys = torch.tensor([99])
    assert torch.equal(draw(kind, keys, 64).candidate, draw(padded, keys, 64).candidate)


def test_fewer_candidates_than_samples_leave_no_slot_wrong():
    chosen = draw(kinds(2, 3, 1)[None], torch.tensor([4]), num_samples=512, fraction=0.25, stage=ROI_STAGE)
    assert chosen.candidate.shape == (1, 6)
    assert chosen.chosen.sum() == 5
    assert chosen.positive.sum() == 2
