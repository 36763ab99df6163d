import pytest
import torch
from test_run import settings

from optimizer import learning_rate, load_moments, make_optimizer


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


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_moments_of_another_memory_layout_make_the_same_step(kind):
    def step(change):
        """Two steps, between which the optimizer's state is saved, changed and loaded."""
        torch.manual_seed(0)
        weight = torch.rand(4, 3, 3, 3, requires_grad=True)
        told, saved = settings(optimizer=kind), None
        for gradient in torch.rand(2, 4, 3, 3, 3):
            optimizer = make_optimizer(told, [weight])
            if saved:
                load_moments(optimizer, kind, saved)
            weight.grad = gradient
            optimizer.step()
            saved = optimizer.state_dict()
            for name, tensor in saved["state"][0].items():
                saved["state"][0][name] = change(tensor)
        return weight

    turned = step(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() else t)
    assert torch.equal(turned, step(lambda t: t))


@pytest.mark.parametrize("moment", [torch.tensor(0.0), torch.zeros(4, 3, 3, 1), 0.0])
def test_moments_of_another_shape_are_refused(moment):
    weight = torch.rand(4, 3, 3, 3, requires_grad=True)
    optimizer = make_optimizer(settings(), [weight])
    state = {"step": 1, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": moment}
    with pytest.raises((AttributeError, ValueError)):
        load_moments(optimizer, "adam", optimizer.state_dict() | {"state": {0: state}})
    assert not optimizer.state
