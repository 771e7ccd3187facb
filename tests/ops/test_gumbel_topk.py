import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import e3kernels as e3k
from e3kernels.ops.gumbel_topk import _direct
from e3kernels.reference.fixed_log import fixed_log
from e3kernels.reference.gumbel_topk import scores
from e3kernels.reference.philox import philox4x32, uniform

OPERATION = "gumbel_topk"
RELAXATIONS = ("threshold", "softmax", "successive")
INF = math.inf


def words(*values):
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123, philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(word.item() for word in philox4x32(words(*counter), key)) == expected


def test_uniform_counts_step_row_and_column():
    seed, step = (0x299F31D0 << 32) | 0xA4093822, (0x85A308D3 << 32) | 0x243F6A88
    u = uniform(3, 10, seed, step, torch.device("cpu"))
    for row, column in ((0, 0), (2, 3), (1, 4), (2, 9)):
        counter = words(0x243F6A88, 0x85A308D3, row, column // 4)
        word = philox4x32(counter, (0xA4093822, 0x299F31D0))[column % 4].item()
        assert u[row, column].item() == ((word >> 8) + 0.5) / 2**24


@given(st.floats(min_value=2.0**-25, max_value=1e308))
def test_fixed_log_is_a_logarithm(x):
    expected = math.log(x)
    assert abs(fixed_log(torch.tensor([x], dtype=torch.float64)).item() - expected) <= 4e-16 * max(
        abs(expected), 1e-300
    )


@pytest.mark.parametrize("x", [1 - 2.0**-25, 2.0**-25, 1 - 2.0**-24 * 1.5, 0.5, 1.0, 2.0**0.5])
def test_fixed_log_at_the_ends_of_u(x):
    assert fixed_log(torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(math.log(x), rel=4e-16, abs=0)


def test_noise_is_gumbel_distributed():
    g = scores(torch.zeros(1000, 100), 1.0, 3, 4)
    assert g.isfinite().all()
    assert g.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert g.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


ROWS = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(0, 10**6))
TAUS = st.sampled_from([0.02, 0.5, 1.0, 10.0])


def make(rows, length, seed, dtype=torch.float64):
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(shape=ROWS, share=st.floats(0, 1), tau=TAUS, relaxation=st.sampled_from(RELAXATIONS))
def test_k_ones_and_mass_k(backend, dtype, shape, share, tau, relaxation):
    logits = make(*shape, dtype)
    k = round(share * shape[1])
    mask, probs = e3k.gumbel_topk(logits, k, tau=tau, seed=shape[2], step=7, relaxation=relaxation)
    assert mask.dtype == probs.dtype == dtype
    assert mask.sum(-1).eq(k).all()
    assert ((mask == 0) | (mask == 1)).all()
    rounding = {torch.float64: 1e-9, torch.float32: 1e-6}.get(dtype, 4e-3)
    assert (probs.double().sum(-1) - k).abs().max() <= rounding * (k + 1)
    s = scores(logits, 1.0, shape[2], 7)
    assert torch.where(mask == 1, s, INF).amin(-1).ge(torch.where(mask == 0, s, -INF).amax(-1)).all()


@given(shape=ROWS, share=st.floats(0, 1), tau=TAUS, relaxation=st.sampled_from(RELAXATIONS))
def test_equals_the_reference(backend, dtype, shape, share, tau, relaxation):
    logits = make(*shape, dtype).requires_grad_()
    options = {"tau": tau, "noise_scale": 0.7, "seed": shape[2], "step": 2**40 + 1, "relaxation": relaxation}
    k = round(share * shape[1])
    incoming = make(*shape, dtype)

    def sample(theta):
        mask, probs = e3k.gumbel_topk(theta, k, **options)
        (grad,) = torch.autograd.grad(mask, theta, incoming.to(theta))
        return mask, probs, grad

    mask, probs, grad = sample(logits)
    with e3k.use_backend("reference"):
        exact = sample(logits.detach().double().requires_grad_())
    assert torch.equal(mask.double(), exact[0])
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2.0**-8)
    torch.testing.assert_close(probs.double(), exact[1], rtol=rounding, atol=rounding)
    # a = p(1 − p) is taken from the rounded p; 1 − p has then an absolute error of one rounding.
    torch.testing.assert_close(grad.double(), exact[2], rtol=8 * rounding, atol=16 * rounding * shape[1] / tau)


@pytest.mark.parametrize("length", [1, 5, 30, 128, 1000])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("tau", [1e-12, 0.05, 1.0, 1e4])
def test_threshold_solver_reaches_k(backend, length, scale, tau):
    logits = torch.cat((make(8, length, 1), make(8, length, 2).round())) * scale
    for k in {0, 1, length // 2, length - 1, length}:
        probs = e3k.gumbel_topk(logits.float(), k, tau=tau, noise_scale=0).probs
        assert (probs.double().sum(-1) - k).abs().max() <= 1e-6 * (k + 1)
        assert probs.ge(0).all()
        assert probs.le(1).all()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_gradcheck(relaxation, k):
    logits = make(2, 7, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda theta: e3k.gumbel_topk(theta, k, tau=0.7, seed=3, step=5, relaxation=relaxation).probs, logits
    )


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_mask_has_the_gradient_of_probs(backend, relaxation):
    logits = make(2, 9, 4, torch.float32).requires_grad_()
    incoming = make(2, 9, 5, torch.float32)
    sample = e3k.gumbel_topk(logits, 4, relaxation=relaxation)
    (through_mask,) = torch.autograd.grad(sample.mask, logits, incoming, retain_graph=True)
    (through_probs,) = torch.autograd.grad(sample.probs, logits, incoming, retain_graph=True)
    (through_both,) = torch.autograd.grad((sample.mask + sample.probs).sum(), logits)
    assert torch.equal(through_mask, through_probs)
    assert through_mask.ne(0).any()
    assert through_both.isfinite().all()


def test_threshold_is_the_textbook_fixed_point():
    logits = make(3, 11, 6).requires_grad_()
    probs = e3k.gumbel_topk(logits, 4, tau=0.6, noise_scale=0).probs
    offset = logits - 0.6 * torch.logit(probs)
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset), rtol=0, atol=1e-9)


def test_softmax_and_successive_are_the_textbook():
    logits = make(3, 11, 7)
    expected = 4 * torch.softmax(logits / 0.6, -1)
    torch.testing.assert_close(e3k.gumbel_topk(logits, 4, tau=0.6, noise_scale=0, relaxation="softmax").probs, expected)
    total, state = torch.zeros_like(logits), logits.clone()
    for _ in range(4):
        choice = torch.softmax(state / 0.6, -1)
        total += choice
        state = state + (1 - choice).log()
    torch.testing.assert_close(e3k.gumbel_topk(logits, 4, tau=0.6, noise_scale=0, relaxation="successive").probs, total)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("all_or_none", [0, 1])
def test_none_and_all_are_constant(backend, relaxation, all_or_none):
    logits = make(2, 6, 8, torch.float32).requires_grad_()
    mask, probs = e3k.gumbel_topk(logits, 6 * all_or_none, relaxation=relaxation)
    assert mask.eq(all_or_none).all()
    assert probs.eq(all_or_none).all()
    (mask + probs).sum().backward()
    assert logits.grad.eq(0).all()


def test_ties_go_to_the_lower_index(backend):
    assert e3k.gumbel_topk(torch.tensor([1.0, 2, 2, 2, 0]), 2, noise_scale=0).mask.tolist() == [0, 1, 1, 0, 0]
    assert e3k.gumbel_topk(torch.zeros(70), 33, noise_scale=0).mask.tolist() == [1.0] * 33 + [0.0] * 37


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_infinite_logits_are_always_or_never_kept(backend, relaxation):
    logits = torch.tensor([0.3, INF, -INF, 0.1, 0.2]).requires_grad_()
    mask, probs = e3k.gumbel_topk(logits, 2, noise_scale=0.3, relaxation=relaxation, seed=1)
    assert mask[1] == 1
    assert mask[2] == 0
    assert probs[2] == 0
    if relaxation != "softmax":
        assert probs[1] == 1
        assert probs.sum().item() == pytest.approx(2)
    probs.sum().backward()
    assert logits.grad.isfinite().all()
    for value in (INF, -INF):
        mask, probs = e3k.gumbel_topk(torch.full((4,), value), 2, relaxation=relaxation)
        assert mask.tolist() == [1, 1, 0, 0]
        assert probs.tolist() == [0.5] * 4


def test_nan_in_gives_nan_out(backend):
    logits = torch.tensor([[1.0, math.nan, 0.0], [1.0, 2.0, 0.0]])
    mask, probs = e3k.gumbel_topk(logits, 2)
    assert mask.isnan().tolist() == probs.isnan().tolist() == [[True] * 3, [False] * 3]


def test_rows_draw_independent_noise_and_steps_repeat(backend):
    theta = torch.zeros(64, requires_grad=True)
    first = e3k.gumbel_topk(theta.expand(5, 64), 32, seed=1, step=2)
    again = e3k.gumbel_topk(theta.expand(5, 64), 32, seed=1, step=2)
    assert torch.equal(first.mask, again.mask)
    assert len({tuple(row.tolist()) for row in first.mask}) == 5
    assert torch.equal(e3k.gumbel_topk(theta, 32, seed=1, step=2).mask, first.mask[0])
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 1, "step": 2 + 2**32}):
        assert not torch.equal(e3k.gumbel_topk(theta.expand(5, 64), 32, **other).mask, first.mask)
    (first.mask * torch.arange(64)).sum().backward()
    assert theta.grad.shape == (64,)


def test_layout_does_not_matter(backend):
    logits = make(6, 10, 9, torch.float32)
    expected = e3k.gumbel_topk(logits, 3, seed=4)
    transposed = e3k.gumbel_topk(logits.t().contiguous().t(), 3, seed=4)
    batched = e3k.gumbel_topk(logits.reshape(2, 3, 10), 3, seed=4)
    for mine, theirs, cube in zip(expected, transposed, batched, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, cube.reshape(6, 10))


def test_the_global_generator_is_left_alone(backend):
    state = torch.get_rng_state()
    e3k.gumbel_topk(torch.zeros(8), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameter_inference_and_no_grad(backend):
    theta = torch.nn.Parameter(torch.zeros(8))
    with torch.inference_mode():
        inside = e3k.gumbel_topk(theta, 3, tau=0.123)
    with torch.no_grad():
        assert not e3k.gumbel_topk(theta, 3, tau=0.123).mask.requires_grad
    outside = e3k.gumbel_topk(theta, 3, tau=0.123)
    outside.mask.sum().backward()
    assert torch.equal(inside.mask, outside.mask.detach())
    assert theta.grad is not None


def test_eager_and_dispatcher_gradients_agree(backend):
    logits = make(2, 9, 10, torch.float32).requires_grad_()
    scalars = torch.tensor([0.5, 1.0], dtype=torch.float64)
    mask, probs = getattr(torch.ops.e3.gumbel_topk, backend)(logits, scalars, 4, 1, 2, 0)
    public = e3k.gumbel_topk(logits, 4, tau=0.5, seed=1, step=2)
    incoming = make(2, 9, 11, torch.float32)
    assert torch.equal(mask, public.mask)
    gradients = [
        torch.autograd.grad((m * incoming).sum() + p.square().sum(), logits)[0] for m, p in ((mask, probs), public)
    ]
    assert torch.equal(*gradients)


def test_without_the_runtime_module_python_gives_the_same(backend, monkeypatch):
    pytest.importorskip("e3kernels._runtime", exc_type=ImportError)  # built for one torch
    logits, incoming = make(2, 9, 10, torch.float32).requires_grad_(), make(2, 9, 11, torch.float32)

    def sampled():
        _direct.cache_clear()
        mask, probs = e3k.gumbel_topk(logits, 4, tau=0.5, seed=1, step=2)
        gradients = [
            torch.autograd.grad(total, logits, incoming, retain_graph=True)[0] for total in (mask, mask + probs)
        ]
        return [mask, probs, *gradients]

    compiled = sampled()
    monkeypatch.setitem(sys.modules, "e3kernels._runtime", None)
    alone = sampled()
    assert all(map(torch.equal, compiled, alone))
    names = [outputs[0].grad_fn.name() for outputs in (compiled, alone)]
    assert (names[0] != names[1]) == (backend == "native")
    _direct.cache_clear()


def test_double_backward_raises(backend):
    logits = make(1, 9, 12, torch.float32).requires_grad_()
    factor = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad((factor * e3k.gumbel_topk(logits, 4).mask[0, 0]), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("relaxation", [0, 2])
def test_opcheck(backend, relaxation):
    scalars = torch.tensor([0.5, 1.0], dtype=torch.float64)
    logits = make(2, 9, 13, torch.float32).requires_grad_()
    opcheck(getattr(torch.ops.e3.gumbel_topk, backend), (logits, scalars, 4, 1, 2, relaxation))


def test_compiles_whole_and_once_for_all_values_of_the_options(backend, compiled_calls):
    logits = make(2, 12, 14, torch.float32)

    def function(theta, k, tau, noise_scale, seed, step):
        return e3k.gumbel_topk(theta, k, tau=tau, noise_scale=noise_scale, seed=seed, step=step)

    calls = [(logits, 3 + i, 1.0 / (i + 1), 0.9 - i / 10, 5 + i, 10 * i + 3) for i in range(6)]
    results, graphs = compiled_calls(function, calls)
    for call, result in zip(calls, results, strict=True):
        torch.testing.assert_close(tuple(result), tuple(function(*call)))
    assert graphs <= 2  # one with the first values as constants, one for all others


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "k is -1; it must be at least 0 and at most L = 5"),
        ({"k": 6}, "k is 6"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"tau": INF}, "tau is inf"),
        ({"tau": math.nan}, "tau is nan"),
        ({"noise_scale": -1.0}, "noise_scale is -1.0"),
        ({"noise_scale": math.nan}, "noise_scale is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"step": 2**63}, f"step is {2**63}"),
        ({"relaxation": "hard"}, "relaxation is 'hard'; choose one of threshold, softmax, successive"),
        ({"logits": torch.zeros(2, 0)}, r"logits has shape \(2, 0\)"),
        ({"logits": torch.tensor(1.0)}, r"logits has shape \(\)"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        e3k.gumbel_topk(**({"logits": torch.zeros(5), "k": 2} | options))


def test_wrong_dtype_is_named():
    with pytest.raises(TypeError, match=r"logits has dtype torch.int64"):
        e3k.gumbel_topk(torch.zeros(5).long(), 2)
