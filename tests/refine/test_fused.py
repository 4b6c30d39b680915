"""What fused refining is made of. That it computes the bits of separate steps: tests of refined weights."""

import torch

from sliderquant.refine.fused import adjacent, joined, low_rank_sum, owners


def test_low_rank_sum():
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(7, 5, generator=generator), torch.randn(5, 33, generator=generator)
    want = (b.double() @ a.double() / 5).float()
    torch.testing.assert_close(low_rank_sum(b, a), want)
    of_rows = torch.stack([a, -a])[owners((3, 4), a.device)]
    torch.testing.assert_close(low_rank_sum(b, of_rows), torch.cat((want[:3], -want[3:])))


def test_joined():
    whole = torch.arange(60.0).view(10, 6)
    parts = whole.split((2, 5, 3))
    assert adjacent(parts)
    assert joined(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(joined(parts), whole)
    for others in ((parts[1], parts[0]), (parts[0], parts[1].clone()), whole.split(3, dim=1), (parts[0], parts[2])):
        assert not adjacent(others)
        assert torch.equal(joined(others), torch.cat(others))
