import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e3pruner.search.quadratic import QuadraticModel


def truth(layers, seed):
    generator = torch.Generator().manual_seed(seed)
    linear = 0.1 + torch.rand(layers, generator=generator, dtype=torch.float64)
    pairs = 0.2 * torch.randn(layers, layers, generator=generator, dtype=torch.float64)
    pairs = (pairs + pairs.T).fill_diagonal_(0)
    return linear, pairs


def masks_of(layers, drop):
    rows = [[float(i in chosen) for i in range(layers)] for chosen in itertools.combinations(range(layers), drop)]
    return torch.tensor(rows, dtype=torch.float64)


def value(linear, pairs, masks):
    return masks @ linear + (masks @ pairs * masks).sum(-1) / 2


def fitted(linear, pairs, masks):
    """A model that has seen every mask, on two batches of different level."""
    model = QuadraticModel(linear)
    both, batches = masks.repeat(2, 1), torch.arange(2).repeat_interleave(len(masks))
    model.fit(both, batches, value(linear, pairs, both) + 3 + batches)
    return model


@given(seed=st.integers(0, 999), drop=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_descent_ends_where_no_swap_is_better(seed, drop):
    linear, pairs = truth(6, seed)
    masks = masks_of(6, drop)
    model = fitted(linear, pairs, masks)
    end = model.descend(masks[-1])
    assert end.sum() == drop
    swaps = masks[(masks - end).abs().sum(1) == 2]
    assert (model.predict(swaps) >= model.predict(end[None]) - 1e-6).all()
    assert model.predict(end[None]) <= model.predict(masks[-1:])


def test_the_fit_orders_masks_it_has_seen_as_they_are():
    linear, pairs = truth(7, 1)
    masks = masks_of(7, 3)
    found = fitted(linear, pairs, masks).predict(masks)
    real = value(linear, pairs, masks)
    assert torch.corrcoef(torch.stack([found, real]))[0, 1] > 0.98
    assert found.argmin() == real.argmin()


def test_marginal_is_the_derivative_of_the_prediction():
    linear, pairs = truth(6, 2)
    masks = masks_of(6, 2)
    model = fitted(linear, pairs, masks)
    point = masks[4].clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.predict(point[None]).sum(), point)
    torch.testing.assert_close(model.marginal(masks[4]), expected)


def test_without_measurements_it_is_the_prior():
    linear, _ = truth(6, 3)
    model = QuadraticModel(linear)
    torch.testing.assert_close(model.predict(masks_of(6, 2)), masks_of(6, 2) @ linear)


def test_layers_that_do_nothing_are_no_trouble():
    model = QuadraticModel(torch.zeros(5, dtype=torch.float64))
    masks = masks_of(5, 2)
    model.fit(masks, torch.zeros(len(masks), dtype=torch.int64), torch.zeros(len(masks), dtype=torch.float64))
    assert model.predict(masks).isfinite().all()
    assert model.descend(masks[0]).sum() == 2
