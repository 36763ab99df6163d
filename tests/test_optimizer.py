import pytest
import torch
from test_run import settings

from optimizer import learning_rate, make_optimizer


def rates(scheduler, steps=50, **changes):
    """The learning rates of a run of six epochs, `steps` each."""
    told = settings(scheduler=scheduler, **changes)
    return [learning_rate(told, step / steps) for step in range(6 * steps)]


def rates_of_torch(make_scheduler, steps=50):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler, seen = make_scheduler(optimizer), []
    for _ in range(6 * steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(seen) < 6 * steps:
            scheduler.step()
    return seen


def test_cosine_is_pytorchs():
    theirs = rates_of_torch(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 300))
    assert rates("cosine") == pytest.approx(theirs, abs=1e-9)


def test_onecycle_is_pytorchs_but_for_a_step():
    theirs = rates_of_torch(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 300, cycle_momentum=False)
    )
    assert rates("onecycle")[0] == pytest.approx(theirs[0])
    assert rates("onecycle") == pytest.approx(theirs, abs=2e-3)
    assert max(rates("onecycle")) == pytest.approx(0.1) and min(rates("onecycle")) < 1e-5


def test_steps_fall_by_gamma_and_none_stays():
    assert rates("step", 1) == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert set(rates("none")) == {0.1}


@pytest.mark.parametrize(
    "name, kind",
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)],
)
def test_each_optimizer_goes_downhill(name, kind):
    weight = torch.full((3,), 2.0, requires_grad=True)
    optimizer = make_optimizer(settings(optimizer=name, learning_rate=0.05), [weight])
    assert type(optimizer) is kind
    for _ in range(100):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.abs().max() < 0.3
