"""The Triton kernels under Triton's interpreter: parity in a few cases each, and what only these kernels have.

The operations' own tests run on this backend too; there they are slow (see conftest.py).
"""

import math
from functools import partial

import pytest
import torch
import triton
import triton.language as tl

import e3kernels as e3k
from e3kernels import backends
from e3kernels.reference.gumbel_topk import scores
from e3kernels.tiled.linear import TileKernel, kernels
from e3kernels.triton import launch, linear_entropy_kl, linear_topk_kl, tune
from e3kernels.triton.gumbel_topk import gumbel_noise
from e3kernels.triton.on_chip import suits_chip

INF = math.inf


def logits(rows, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (4 * torch.randn(rows, vocabulary, generator=generator).to(dtype) for _ in range(2))
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[1:2] = -100
    mask = torch.ones(rows, dtype=torch.bool)
    mask[2:3] = False
    return student, teacher, labels, mask


def both(function, inputs, with_gradients):
    """(ours, the same in fp64 by the reference): values and gradients of `function`'s inputs."""
    with e3k.use_backend("triton"):
        ours = with_gradients(function, inputs, len(inputs))
    with e3k.use_backend("reference"):
        return ours, with_gradients(function, [x.double() for x in inputs], len(inputs))


def assert_close(ours, exact, dtype=torch.float32):
    rounding = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(ours[0].double(), exact[0].double(), rtol=4e-6, atol=1e-6)
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert (mine.double() - truth).abs().max() <= rounding * truth.abs().max() + 1e-9


DENSE = [
    (3, 300, torch.float32, {"divergence": "forward", "kd_ratio": 0.6}),
    (3, 129, torch.bfloat16, {"divergence": "reverse", "weighting": "inverse", "student_softcap": 6.0}),
    (3, 300, torch.float16, {"divergence": "jsd", "beta": 0.3, "teacher_scale": 0.5}),
    (6, 64, torch.float32, {"weighting": "mix", "reduction": "sum"}),
    (6, 129, torch.bfloat16, {"weighting": "none", "kd_ratio": 0.3, "teacher_softcap": 5.0}),
    (6, 64, torch.float16, {"divergence": "reverse", "reduction": "none", "kd_ratio": 0.0}),
    (6, 65, torch.float32, {"divergence": "jsd", "num_items": 3, "kd_ratio": 0.5}),
    (3, 300, torch.bfloat16, {"divergence": "adaptive", "kd_ratio": 0.6}),
    (1, 1, torch.float32, {"kd_ratio": 0.5, "reduction": "sum"}),
]


@pytest.mark.parametrize(("rows", "vocabulary", "dtype", "options"), DENSE)
def test_entropy_kl(with_gradients, rows, vocabulary, dtype, options):
    student, teacher, labels, mask = logits(rows, vocabulary, dtype)

    def loss(z):
        return e3k.entropy_kl(z, teacher.to(z.dtype), labels, token_mask=mask, temperature=1.7, gamma=1.3, **options)

    assert_close(*both(loss, [student], with_gradients), dtype)


@pytest.mark.parametrize(("rows", "reduction"), [(3, "mean"), (6, "sum")])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "adaptive"])
def test_entropy_kl_excluded_words(with_gradients, divergence, rows, reduction):
    """By both paths: words that one model or both exclude, and NaN in a row that does not count."""
    student, teacher, labels, _ = logits(rows, 140, seed=1)
    labels[0] = 5
    teacher[:, 7] = student[:, 7] = -INF
    if divergence in ("forward", "jsd"):
        teacher[:, 9] = -INF
    if divergence in ("reverse", "jsd"):
        student[:, 11] = -INF
    student[1], teacher[1] = torch.nan, torch.nan

    def loss(z):
        return e3k.entropy_kl(
            z, teacher.to(z.dtype), labels, kd_ratio=0.5, divergence=divergence, reduction=reduction, weighting="none"
        )

    ours, exact = both(loss, [student], with_gradients)
    assert_close(ours, exact)
    assert ours[1].isfinite().all()
    teacher[0, 2], student[0, 3] = torch.nan, -INF
    with e3k.use_backend("triton"):
        broken = e3k.entropy_kl(student, teacher, labels, divergence=divergence, reduction="none")
    assert broken[0].isnan()
    assert broken[1] == 0


@pytest.mark.parametrize("rows", [3, 6])
def test_no_valid_token_gives_zero_and_no_gradient(with_gradients, rows):
    student, teacher, labels, _ = logits(rows, 70)
    log_p, ids = teacher.log_softmax(-1).topk(4)
    nobody = torch.zeros(rows, dtype=torch.bool)
    student[0] = torch.nan
    losses = (
        lambda z: e3k.entropy_kl(z, teacher, token_mask=nobody),
        lambda z: e3k.entropy_kl(z, teacher, labels, token_mask=nobody, weighting="none", kd_ratio=0.5),
        lambda z: e3k.topk_kl(z, log_p, ids, torch.full_like(labels, -100), kd_ratio=0.5),
    )
    for loss in losses:
        with e3k.use_backend("triton"):
            value, grad = with_gradients(loss, [student], 1)
        assert value == 0
        assert torch.equal(grad, torch.zeros_like(grad))


def test_missing_mass_is_infinite_wherever_it_lies():
    student, teacher, *_ = logits(3, 300)
    student[0, 299], teacher[0, 0] = -INF, 90.0  # what the hole's lane has summed is rescaled to nothing
    student[1, 0], teacher[1, 299] = -INF, 90.0
    with e3k.use_backend("triton"):
        loss = e3k.entropy_kl(student, teacher, reduction="none")
    assert loss.isinf().tolist() == [True, True, False]


SPARSE = [
    (3, 129, 5, torch.float32, {"tail": "bucket", "kd_ratio": 0.6}),
    (3, 300, 10, torch.bfloat16, {"tail": "bucket", "divergence": "reverse", "student_softcap": 6.0}),
    (3, 129, 3, torch.float16, {"tail": "bucket", "divergence": "jsd", "beta": 0.3, "reduction": "none"}),
    (3, 129, 4, torch.float32, {"tail": "renorm", "divergence": "reverse", "weighting": "inverse"}),
    (3, 129, 4, torch.float32, {"tail": "bucket", "divergence": "adaptive", "weighting": "mix"}),
    (3, 64, 1, torch.bfloat16, {"tail": "renorm", "kd_ratio": 0.5, "reduction": "sum"}),
    (3, 129, 8, torch.float32, {"tail": "truncated", "weighting": "mix"}),
    (2, 6, 6, torch.float32, {"tail": "bucket", "kd_ratio": 0.5}),
]


@pytest.mark.parametrize(("rows", "vocabulary", "k", "dtype", "options"), SPARSE)
def test_topk_kl(with_gradients, rows, vocabulary, k, dtype, options):
    student, teacher, labels, _ = logits(rows, vocabulary, dtype)
    log_p, ids = teacher.float().log_softmax(-1).topk(k)
    if 4 < k < vocabulary:
        log_p[0, -1] = -INF
        student[0, ids[0]] += 20  # nearly nothing is left for the tail

    def loss(z):
        return e3k.topk_kl(z, log_p, ids, labels, temperature=1.7, gamma=1.3, **options)

    assert_close(*both(loss, [student], with_gradients), dtype)


@pytest.mark.parametrize("relaxation", ["threshold", "softmax", "successive"])
@pytest.mark.parametrize(("shape", "k"), [((30,), 22), ((3, 7), 2), ((2, 5), 5), ((1, 4), 0)])
def test_gumbel_topk_has_the_bits_of_the_other_backends(relaxation, shape, k):
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(k))
    theta.view(-1)[:4] = torch.tensor([INF, 0.5, 0.5, -INF])
    incoming = torch.randn(shape, generator=torch.Generator().manual_seed(k + 1))
    results = {}
    for backend in ("triton", "reference", *(["native"] if ("native", "gumbel_topk") in backends.services else [])):
        leaf = theta.clone().requires_grad_()
        with e3k.use_backend(backend):
            sample = e3k.gumbel_topk(leaf, k, tau=0.7, noise_scale=1.3, seed=2**40 + 9, step=5, relaxation=relaxation)
        (sample.mask * incoming).sum().backward()
        results[backend] = sample.mask.detach(), sample.probs.detach(), leaf.grad
    ours, expected = results["triton"], results["reference"]
    assert all(torch.equal(ours[0], other[0]) for other in results.values())
    torch.testing.assert_close(ours[1:], expected[1:], rtol=1e-6, atol=1e-7)


@triton.jit
def draw(out_ptr, seed: tl.int64, step: tl.int64, BLOCK: tl.constexpr):  # noqa: N803
    columns = tl.arange(0, BLOCK)
    noise = gumbel_noise(tl.cast(seed, tl.int64), tl.cast(step, tl.int64), tl.program_id(0), columns)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + columns, noise)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**62 + 12345, 2**33 + 7)])
def test_gumbel_noise_bits(seed, step):
    noise = torch.empty(2, 512, dtype=torch.float64)
    draw[(2,)](noise, seed, step, 512)
    assert torch.equal(noise, scores(torch.zeros(2, 512), 1.0, seed, step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate_shape", [(), (2, 1, 1), (3, 1), (700,), (2, 1, 700)])
def test_gated_residual(with_gradients, gate_shape, dtype):
    generator = torch.Generator().manual_seed(3)
    *inputs, incoming = [torch.randn(2, 3, 700, generator=generator).to(dtype) for _ in range(3)]
    inputs.append(torch.rand(gate_shape, generator=generator).to(dtype))
    ours, exact = both(lambda *x: (e3k.gated_residual(*x).double() * incoming.double()).sum(), inputs, with_gradients)
    with e3k.use_backend("triton"):
        ours[0] = e3k.gated_residual(*inputs)
    with e3k.use_backend("reference"):
        exact[0] = e3k.gated_residual(*(x.double() for x in inputs))
    rounding = 4e-6 if dtype == torch.float32 else 2.0**-8
    for mine, truth in zip(ours, exact, strict=True):
        assert mine.shape == truth.shape
        assert (mine.double() - truth).abs().max() <= rounding * truth.abs().max()


def heads(shared, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    hidden, teacher = (torch.randn(5, 24, generator=generator).to(dtype) for _ in range(2))
    weight, other = (torch.randn(70, 24, generator=generator).to(dtype) / 3 for _ in range(2))
    return hidden, weight, teacher, weight if shared else other


LABELS = torch.tensor([3, -100, 69, 0, 12])


@pytest.mark.parametrize(("shared", "reduction"), [(True, "mean"), (False, "none")])
def test_linear_entropy_kl(with_gradients, shared, reduction):
    hidden, weight, teacher, teacher_weight = heads(shared)

    def loss(h, w):
        fixed = w.detach() if shared else teacher_weight.to(h.dtype)
        return e3k.linear_entropy_kl(h, w, teacher.to(h.dtype), fixed, LABELS, kd_ratio=0.7, reduction=reduction)

    assert_close(*both(loss, [hidden, weight], with_gradients))


@pytest.mark.parametrize(("dtype", "divergence"), [(torch.float16, "forward"), (torch.bfloat16, "reverse")])
def test_linear_entropy_kl_with_the_logits_on_chip(monkeypatch, dtype, divergence):
    inputs = heads(False, dtype)
    bias = torch.linspace(-1, 1, 70).to(dtype)
    on_chip, called = linear_entropy_kl.on_chip_tokens, []
    monkeypatch.setattr(linear_entropy_kl, "on_chip_tokens", lambda *a: called.append(1) or on_chip(*a))

    def loss(*inputs):
        return e3k.linear_entropy_kl(
            *inputs, LABELS, student_bias=bias.to(inputs[0].dtype), kd_ratio=0.7, divergence=divergence,
            student_softcap=9.0, return_stats=True,
        )  # fmt: skip

    with torch.no_grad(), e3k.use_backend("triton"):
        ours, stats = loss(*inputs)
    with torch.no_grad(), e3k.use_backend("reference"):
        exact, expected = loss(*(x.double() for x in inputs))
    assert called
    torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=1e-6)
    for name in ("kl", "teacher_entropy", "cross_entropy"):
        mine, truth = getattr(stats, name), getattr(expected, name)
        torch.testing.assert_close(mine.double(), truth.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_linear_topk_kl(with_gradients, tail):
    hidden, weight, teacher, _ = heads(True)
    log_p, ids = (teacher @ weight.t()).log_softmax(-1).topk(6)
    log_p[0, -1] = -INF

    def loss(h, w):
        return e3k.linear_topk_kl(h, w, log_p, ids, LABELS, kd_ratio=0.7, tail=tail, temperature=1.7)

    assert_close(*both(loss, [hidden, weight], with_gradients))
    narrow = hidden.bfloat16(), weight.bfloat16()
    with torch.no_grad(), e3k.use_backend("triton"):
        on_chip = loss(*narrow)
    with torch.no_grad(), e3k.use_backend("reference"):
        exact = loss(*(x.double() for x in narrow))
    torch.testing.assert_close(on_chip.double(), exact.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("begin", [(0, 0), (3, 3), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_begin_anywhere(with_gradients, begin, dtype):
    """At a boundary, behind one by the same distance, and by two: 303 columns, of which some rows hold −∞."""
    student, teacher, labels, _ = logits(3, 303, dtype)
    student[0, 11] = teacher[0, 11] = teacher[2, 300] = -INF
    apart = [
        x.new_empty(x.numel() + at)[at:].view(x.shape).copy_(x) for x, at in zip((student, teacher), begin, strict=True)
    ]
    log_p, ids = teacher.float().log_softmax(-1).topk(5)
    for loss in (
        lambda z: e3k.entropy_kl(z, apart[1].to(z.dtype), labels, kd_ratio=0.5),
        lambda z: e3k.topk_kl(z, log_p, ids, labels, kd_ratio=0.5),
    ):
        assert_close(*both(loss, [apart[0]], with_gradients), dtype)


def test_fp32_products_are_left_to_the_vendor():
    """They have no matrix unit: on chip they took three times as long as its product and the logits' way to memory."""
    matrices = torch.empty(4, 512), torch.empty(70, 512)
    assert not suits_chip(torch.float32, *matrices)
    assert suits_chip(torch.bfloat16, *(x.bfloat16() for x in matrices))


def test_linear_losses_in_tiles_of_two_rows(monkeypatch, with_gradients):
    hidden, weight, teacher, _ = heads(True)
    log_p, ids = (teacher @ weight.t()).log_softmax(-1).topk(6)
    losses = {
        linear_entropy_kl: lambda h, w: e3k.linear_entropy_kl(h, w, teacher.to(h.dtype), w.detach(), LABELS),
        linear_topk_kl: lambda h, w: e3k.linear_topk_kl(h, w, log_p, ids, LABELS),
    }
    kernel = {
        linear_entropy_kl: (linear_entropy_kl.entropy_kl_tile, linear_entropy_kl.entropy_kl_backward),
        linear_topk_kl: (linear_topk_kl.topk_kl, linear_topk_kl.topk_kl_backward),
    }
    for module, loss in losses.items():
        forward, _ = kernels(module.linear_loss, TileKernel(*kernel[module], logits=2 * 70))
        monkeypatch.setattr(module, "_tiled", forward)
        assert_close(*both(loss, [hidden, weight], with_gradients))


def test_a_row_stride_beyond_the_vocabulary(with_gradients):
    student, teacher, labels, _ = logits(3, 96)
    wide = torch.full((3, 200), torch.nan)
    wide[:, :96] = teacher
    loss = partial(e3k.entropy_kl, labels=labels, kd_ratio=0.5)
    with e3k.use_backend("triton"):
        apart = with_gradients(lambda z: loss(z, wide[:, :96]), [student], 1)
        dense = with_gradients(lambda z: loss(z, teacher), [student], 1)
    assert all(torch.equal(a, b) for a, b in zip(apart, dense, strict=True))


def test_configurations_come_from_the_family_file_or_the_heuristic():
    cpu, elsewhere = torch.device("cpu"), torch.device("meta")
    entry = launch.table_of("interpreter")["entropy_kl_gradient"][0]
    assert launch.sweep_of("entropy_kl_gradient", cpu, 2, 99).warps == entry["warps"]
    for itemsize, columns in ((2, 128256), (4, 49152), (2, 64)):
        sweep = launch.sweep_of("entropy_kl_statistics", elsewhere, itemsize, columns)
        assert sweep.vec * itemsize == 16
        assert sweep.lanes == 32 * sweep.warps
    splits, size = launch.split_of(launch.sweep_of("entropy_kl_statistics", elsewhere, 2, 128256), elsewhere, 4, 128256)
    assert 1 < splits <= 32
    assert (splits - 1) * size < 128256 <= splits * size


SWEEPING = (
    *("entropy_kl_statistics", "entropy_kl_mixture", "entropy_kl_gradient", "entropy_kl_row"),
    *("topk_kl_statistics", "topk_kl_gradient"),
)
TILES = (launch.Sweep(4, 4, 1, 1), launch.Sweep(16, 4, 1, 4), launch.Sweep(8, 4, 1, 2))


@pytest.fixture
def few_tiles(monkeypatch):
    monkeypatch.setattr(tune, "VOCABULARIES", (40, 90))
    monkeypatch.setattr(tune, "DTYPES", (torch.float32,))
    monkeypatch.setattr(tune, "candidates", lambda warp, itemsize: iter(TILES))


def test_tuning_writes_the_fastest_tile_that_fits_for_the_next_launch(tmp_path, monkeypatch, few_tiles):
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    called = set()

    def time(call):
        ((kernel, sweep),) = launch.forced.items()
        if sweep.lanes == 16:
            raise triton.OutOfResources(1 << 20, 1 << 16, "registers")
        if kernel not in called:
            called.add(kernel)
            call()
        return -sweep.lanes

    cpu = torch.device("cpu")
    table = tune.measure(cpu, time)
    best = {"itemsize": 4, "warps": 2, "vec": 4, "unroll": 1}
    assert table == {name: [{"columns": 40, **best}, {"columns": None, **best}] for name in SWEEPING}
    assert called == set(SWEEPING)
    try:
        assert tune.record(table, cpu, "a test", tmp_path) == tmp_path / "interpreter.json"
        assert all(launch.sweep_of(name, cpu, 4, 77) == TILES[2] for name in SWEEPING)
    finally:
        launch.table_of.cache_clear()
        launch.configured_sweep.cache_clear()


def test_tuning_refuses_a_device_without_a_clock_or_a_tile(tmp_path, few_tiles):
    def too_large(_):
        raise triton.OutOfResources(1 << 20, 1 << 16, "shared memory")

    with pytest.raises(ValueError, match="device is cpu"):
        tune.tune(torch.device("cpu"), tmp_path)
    with pytest.raises(RuntimeError, match="no candidate tile of entropy_kl_statistics fits"):
        tune.measure(torch.device("cpu"), too_large)
    assert not launch.forced
    assert not list(tmp_path.iterdir())
