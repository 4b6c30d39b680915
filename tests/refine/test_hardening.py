import pytest
import torch

from sliderquant.planning.settings import Settings
from sliderquant.refine.hardening import SCHEDULE, Hardening
from sliderquant.refine.linear import RefinedLinear, generator_for
from sliderquant.schemes import Scheme

W3 = Scheme(3)
SETTINGS = Settings(weights=True, hardening=True, grid="free", rank=0)


def linear(scheme=W3, outs=6, ins=64, settings=SETTINGS):
    weight = torch.randn(outs, ins, generator=torch.Generator().manual_seed(3))
    made = RefinedLinear(weight, None, scheme, torch.bfloat16, settings, generator_for(0, "x"))
    made.start()
    return made


def move(made, generator):
    with torch.no_grad():
        made.offset += torch.randn(made.offset.shape, generator=generator) / 8


def run(made, steps, generator):
    """The offsets after every step."""
    hardening, seen = Hardening(made, steps), []
    for _ in range(steps):
        for one in made:
            move(one, generator)
        hardening.after_step()
        seen.append([one.offset.detach().clone() for one in made])
    return seen


@pytest.mark.parametrize("scheme", [Scheme(3), Scheme(2, 32), Scheme(4, symmetric=True)])
def test_the_shares_of_every_row_stay_from_their_steps_on(scheme):
    made = [linear(scheme), linear(scheme, outs=5)]
    seen = run(made, 20, torch.Generator().manual_seed(1))
    for which in range(2):
        history = torch.stack([offsets[which] for offsets in seen])
        for after, share in SCHEDULE:
            start = int(after * 20) - 1
            until = {8: 11, 12: 15, 16: 19}[int(after * 20)]
            stays = (history[start : until + 1] == history[start]).all(0)
            assert (stays.sum(1) == int(share * 64)).all(), after
    assert not (torch.stack([offsets[0] for offsets in seen[:8]]).diff(dim=0) == 0).any()


def test_those_nearest_to_points_of_the_grid_stay():
    made = linear(Scheme(2, 32))
    generator = torch.Generator().manual_seed(1)
    hardening = Hardening([made], 10)
    for _ in range(4):
        move(made, generator)
        hardening.after_step()
    before = made.offset.detach().clone()
    refined = (made.weight + made.step[:, None] * before).double()
    scale = made.grid(refined.float()).scale.double().repeat_interleave(32, dim=1)
    distance = (refined / scale - torch.round(refined / scale)).abs()
    move(made, generator)
    hardening.after_step()
    stays = made.offset == before
    assert (distance.masked_fill(~stays, 0).amax(1) <= distance.masked_fill(stays, 1).amin(1) + 1e-6).all()


def test_what_does_not_pass_through_the_quantizer_does_not_harden():
    made = linear()
    made.fraction = 0.5
    history = torch.stack([offsets[0] for offsets in run([made], 20, torch.Generator().manual_seed(1))])
    stays = (history[-5:] == history[-1]).all(0)
    assert (stays.sum(1) == int(0.95 * 32)).all()
    assert not stays[:, 32:].any()


def test_linears_without_offsets_are_left_alone():
    plain = linear(settings=Settings())
    hardening = Hardening([plain], 5)
    for _ in range(5):
        hardening.after_step()
    assert hardening.kept == []


def test_hardening_without_offsets_is_refused():
    with pytest.raises(ValueError, match=r"hardening=true .* needs weights=true"):
        Settings(hardening=True)
