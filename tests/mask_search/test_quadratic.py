import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e3pruner.mask_search.quadratic import QuadraticModel, Spreads


def truth(layers, seed):
    generator = torch.Generator().manual_seed(seed)
    linear = 0.1 + torch.rand(layers, generator=generator, dtype=torch.float64)
    size = (linear[:, None] * linear).sqrt()
    pairs = 0.2 * size * torch.randn(layers, layers, generator=generator, dtype=torch.float64)
    pairs = (pairs + pairs.T).fill_diagonal_(0)
    return linear, pairs


def masks_of(layers, drop):
    rows = [[float(i in chosen) for i in range(layers)] for chosen in itertools.combinations(range(layers), drop)]
    return torch.tensor(rows, dtype=torch.float64)


def value(linear, pairs, masks):
    return masks @ linear + (masks @ pairs * masks).sum(-1) / 2


def fitted(linear, pairs, masks):
    """A model that has seen every mask, on two batches, one a fifth harder than the other."""
    model = QuadraticModel(linear, batches=2)
    both, batches = masks.repeat(2, 1), torch.arange(2).repeat_interleave(len(masks))
    model.fit(both, batches, value(linear, pairs, both) * (1 + 0.2 * batches))
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
    model = QuadraticModel(linear, batches=2)
    masks = masks_of(6, 2)
    pairs = (masks * linear).where(masks == 1, torch.ones(())).prod(1).sqrt()
    torch.testing.assert_close(model.predict(masks), masks @ linear + 0.1 * pairs)


def test_it_is_gaussian_process_regression_on_the_model_as_written():
    """Mean and deviation against the weights themselves, w, u, W and noise, as one Gaussian vector."""
    layers, batches = 5, 3
    prior, _ = truth(layers, 4)
    place = torch.arange(layers, dtype=torch.float64)
    alike = torch.exp(-(place[:, None] - place).square() / 2)
    couples = list(itertools.combinations(range(layers), 2))
    field = [[alike[a, c] * alike[b, d] + alike[a, d] * alike[b, c] for c, d in couples] for a, b in couples]
    size = torch.tensor([(prior[a] * prior[b]).sqrt() for a, b in couples])
    of_pairs = 0.25**2 * size[:, None] * torch.tensor(field) * size
    of_batch = 0.1**2 * prior[:, None] * prior + (0.25 * prior).square().diag()
    weights = torch.block_diag((0.05 * prior).square().diag(), of_pairs, *[of_batch] * batches)
    mean = torch.cat([prior, 0.1 * size, torch.zeros(batches * layers, dtype=torch.float64)])

    def features(masks, shares):
        together = torch.stack([masks[:, a] * masks[:, b] for a, b in couples], 1)
        return torch.cat([masks, together, *(masks * share[:, None] for share in shares.T)], 1)

    masks = masks_of(layers, 2)
    batch = torch.arange(len(masks)) % 2
    seen = features(masks, torch.nn.functional.one_hot(batch, batches).double())
    found = torch.linspace(0.5, 2, len(masks), dtype=torch.float64)
    asked = masks_of(layers, 3)
    wanted = features(asked, torch.full((len(asked), batches), 1 / batches, dtype=torch.float64))
    noise = (0.02 * masks @ prior).square().diag()
    gain = wanted @ weights @ seen.T @ torch.linalg.inv(seen @ weights @ seen.T + noise)
    left = wanted @ weights @ wanted.T - gain @ seen @ weights @ wanted.T
    apart = left.diagonal() + left[0, 0] - 2 * left[:, 0]

    model = QuadraticModel(prior, batches)
    model.fit(masks, batch, found)
    torch.testing.assert_close(model.predict(asked), wanted @ mean + gain @ (found - seen @ mean))
    torch.testing.assert_close(model.deviation(asked, asked[0]), apart.clamp(min=0).sqrt(), atol=1e-7, rtol=1e-6)


def test_layers_that_do_nothing_are_no_trouble():
    model = QuadraticModel(torch.zeros(5, dtype=torch.float64), batches=1)
    masks = masks_of(5, 2)
    model.fit(masks, torch.zeros(len(masks), dtype=torch.int64), torch.zeros(len(masks), dtype=torch.float64))
    assert model.predict(masks).isfinite().all()
    assert model.descend(masks[0]).sum() == 2


def test_spreads_are_learnt_from_measurements_that_have_others():
    """Measurements drawn from the model itself, its pairs and batches three times as spread: those spreads grow towards
    what they are, the likelihood rises, and where nothing speaks they stay."""
    layers, batches = 10, 4
    prior = 0.1 + torch.rand(layers, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    masks = masks_of(layers, 4)[::2].repeat(batches, 1)
    batch = torch.arange(batches).repeat_interleave(len(masks) // batches)
    begun = QuadraticModel(prior, batches)
    wide = QuadraticModel(prior, batches, spreads=Spreads(pair=0.75, layer=0.75))
    covariance = sum(getattr(wide.spreads, name) ** 2 * part for name, part in wide._parts(masks, batch).items())
    factor = torch.linalg.cholesky(covariance)
    noise = torch.randn(len(masks), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found = begun.predict(masks) + factor @ noise
    learnt = QuadraticModel(prior, batches)
    learnt.relearn(masks, batch, found)
    assert 0.4 < learnt.spreads.pair < 1.2
    assert 0.4 < learnt.spreads.layer < 1.2
    assert likelihood(learnt, masks, batch, found) > likelihood(begun, masks, batch, found) + 10
    alone = QuadraticModel(prior, batches)
    alone.relearn(torch.eye(layers, dtype=torch.float64), torch.zeros(layers, dtype=torch.int64), prior)
    assert alone.spreads.pair == pytest.approx(0.25)  # no pair was measured


def likelihood(model, masks, batch, found):
    """The log density of what was measured, by the model's own spreads, before it has seen it."""
    covariance = sum(getattr(model.spreads, name) ** 2 * part for name, part in model._parts(masks, batch).items())
    mean = QuadraticModel(model.prior, 4, spreads=model.spreads).predict(masks)
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(found)


def test_swaps_are_the_masks_one_exchange_away():
    linear, _ = truth(6, 3)
    mask = masks_of(6, 2)[0]
    near = QuadraticModel(linear, batches=1).swaps(mask)
    assert len(near.unique(dim=0)) == len(near) == 2 * 4
    assert ((near - mask).abs().sum(1) == 2).all()
    of_kinds = QuadraticModel(linear, 1, torch.tensor([0, 1, 0, 1, 0, 1])).swaps(mask)
    assert len(of_kinds) == 2 * 2  # layers 0 and 1 go: each has two others of its kind
