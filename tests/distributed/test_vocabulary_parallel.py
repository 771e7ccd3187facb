"""The losses with the vocabulary shared out to two processes, against the same loss in one piece."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import e3kernels as e3k
from e3kernels import backends

_triton = backends.services.get(("triton", "entropy_kl"))
needs_interpreter = pytest.mark.skipif(
    _triton is None or "cpu" not in (_triton.devices or ()), reason="needs Triton's interpreter"
)
BACKENDS = ["reference", pytest.param("triton", marks=needs_interpreter)]
TOKENS, WIDTH, VOCABULARY = 14, 6, 37
CUTS = {"uneven": [0, 20, 37], "one column": [0, 1, 37]}
OPTIONS = [
    {"weighting": weighting, "divergence": divergence, "temperature": temperature, "kd_ratio": ratio}
    for weighting, divergence, temperature, ratio in product(
        ("entropy", "inverse", "mix", "none"), ("forward", "reverse", "jsd"), (1.0, 2.0), (1.0, 0.6)
    )
    if weighting != "mix" or ratio == 1.0
]
OTHERS = [
    {"student_softcap": 4.0, "teacher_softcap": 5.0, "student_scale": 0.5, "teacher_scale": 2.0, "kd_ratio": 0.5},
    {"num_items": 5, "gamma": 3.0},
    {"reduction": "sum", "kd_ratio": 0.3},
    {"reduction": "none", "kd_ratio": 0.3, "weighting": "inverse"},
    {"divergence": "jsd", "beta": 0.2},
]


def some(options, backend):
    """All of `options`, or those that Triton's interpreter has the time for."""
    options = list(options)
    return options if backend == "reference" else options[::9] + options[-2:]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels() -> torch.Tensor:
    ids = torch.randint(0, VOCABULARY, (2, TOKENS // 2), generator=torch.Generator().manual_seed(9))
    ids[0, 1] = ids[1, 3] = -100
    return ids


def run(loss, inputs, options, **more):
    """(loss, stats, gradients) for leaves of the tensors in `inputs`."""
    leaves = [tensor.detach().clone().requires_grad_() if tensor is not None else None for tensor in inputs]
    value, stats = loss(leaves, **options, return_stats=True, **more)
    value.sum().backward()
    return value.detach(), tuple(stats), [leaf.grad for leaf in leaves if leaf is not None]


def dense(leaves, **options):
    return e3k.entropy_kl(leaves[0], leaves[1].detach(), labels(), **options)


def linear(leaves, **options):
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = leaves
    return e3k.linear_entropy_kl(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        labels(),
        student_bias=bias,
        teacher_bias=teacher_bias,
        **options,
    )


def stored(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, ids) of the teacher in `dense_inputs`, some entries padding."""
    logprobs, ids = dense_inputs()[1].log_softmax(-1).topk(k)
    logprobs[0, 2, k // 2 :] = -torch.inf
    return logprobs, ids


def sparse(leaves, k=5, **options):
    return e3k.topk_kl(leaves[0], *stored(k), labels(), **options)


def linear_sparse(leaves, **options):
    hidden, weight, bias = leaves
    return e3k.linear_topk_kl(hidden, weight, *stored(5), labels(), student_bias=bias, **options)


def sparse_options():
    """Those of the dense losses with each tail that takes them."""
    for options, tail in product(OPTIONS[::3] + OTHERS, ("bucket", "renorm", "truncated")):
        own = {name: value for name, value in options.items() if not name.startswith("teacher")}
        if tail != "truncated" or own.get("divergence", "forward") == "forward":
            yield own | {"tail": tail}


def dense_inputs():
    return [3 * random(2, TOKENS // 2, VOCABULARY, seed=seed) for seed in (0, 1)]


def linear_inputs(bias=True):
    heads = []
    for seed in (0, 5):
        hidden, weight = random(2, TOKENS // 2, WIDTH, seed=seed), random(VOCABULARY, WIDTH, seed=seed + 1)
        heads += [hidden, weight, random(VOCABULARY, seed=seed + 2) if bias else None]
    return heads


def assert_near(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def own_columns(cuts):
    rank = dist.get_rank()
    return slice(cuts[rank], cuts[rank + 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", CUTS)
def test_dense_equals_the_whole(cuts, backend, tmp_path):
    def compare():
        own = own_columns(CUTS[cuts])
        for options in some(OPTIONS + OTHERS, backend):
            value, stats, (grad, _) = run(dense, dense_inputs(), options)
            shards = [tensor[..., own] for tensor in dense_inputs()]
            with e3k.use_backend(backend):
                actual = run(dense, shards, options, group=dist.group.WORLD)
            assert_near(actual[:2], (value, stats))
            assert_near(actual[2][0], grad[..., own])

    on_ranks(2, compare, tmp_path)


@pytest.mark.parametrize(
    ("backend", "cuts", "k"),
    [
        *product(BACKENDS[:1], CUTS, [1, 5, VOCABULARY]),
        pytest.param("triton", "uneven", 5, marks=needs_interpreter),
        pytest.param("triton", "one column", VOCABULARY, marks=needs_interpreter),
    ],
)
def test_stored_predictions_equal_the_whole(backend, cuts, k, tmp_path):
    def compare():
        own = own_columns(CUTS[cuts])
        for options in some(sparse_options(), backend):
            options |= {"k": k}
            value, stats, (grad,) = run(sparse, dense_inputs()[:1], options)
            with e3k.use_backend(backend):
                actual = run(sparse, [dense_inputs()[0][..., own]], options, group=dist.group.WORLD)
            assert_near(actual[:2], (value, stats))
            assert_near(actual[2][0], grad[..., own])

    on_ranks(2, compare, tmp_path)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, cut alike on both ranks although they hold different numbers of columns."""
    monkeypatch.setattr("e3kernels.distributed.losses.REFERENCE_LOGITS", 4 * VOCABULARY)
    if _triton is not None:
        monkeypatch.setattr("e3kernels.triton.TILE_LOGITS", 4 * VOCABULARY)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_stored_predictions_equal_the_whole(backend, tmp_path, small_tiles):
    def compare():
        own, mesh = own_columns(CUTS["uneven"]), init_device_mesh("cpu", (2,))
        for options in some(sparse_options(), backend):
            inputs = linear_inputs()[:3]
            value, stats, expected = run(linear_sparse, inputs, options)
            parts = [inputs[0], *(x[own] for x in inputs[1:])]
            with e3k.use_backend(backend):
                actual = run(linear_sparse, parts, options, group=dist.group.WORLD)
            assert_near(actual[:2], (value, stats))
            assert_near(actual[2], [expected[0], expected[1][own], expected[2][own]])
        for loss, of_mesh in ((linear_sparse, inputs), (sparse, dense_inputs()[:1])):
            value, stats, expected = run(loss, of_mesh, options)
            places = [Replicate(), Shard(0), Shard(0)] if loss is linear_sparse else [Shard(2)]
            shards = [distribute_tensor(x, mesh, [place]) for x, place in zip(of_mesh, places, strict=True)]
            actual = run(loss, shards, options)
            assert_near(actual[:2], (value, stats))
            assert_near([g.full_tensor() for g in actual[2]], expected)

    on_ranks(2, compare, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", CUTS)
def test_linear_equals_the_whole(cuts, backend, tmp_path, small_tiles):
    def compare():
        own = own_columns(CUTS[cuts])
        for options in some(OPTIONS + OTHERS, backend):
            value, stats, expected = run(linear, linear_inputs(), options)
            inputs = [x if x.dim() == 3 else x[own] for x in linear_inputs()]
            with e3k.use_backend(backend):
                actual = run(linear, inputs, options, group=dist.group.WORLD)
            assert_near(actual[:2], (value, stats))
            hidden, weight, bias = actual[2][:3]
            assert_near((hidden, weight, bias), (expected[0], expected[1][own], expected[2][own]))

    on_ranks(2, compare, tmp_path)


def test_a_shared_head_of_one_rank_s_rows(tmp_path):
    def compare():
        own = own_columns(CUTS["uneven"])
        hidden, weight, _, teacher_hidden, *_ = linear_inputs()
        grads = []
        for part, more in ((weight.clone(), {}), (weight[own].clone(), {"group": dist.group.WORLD})):
            part.requires_grad_()
            e3k.linear_entropy_kl(hidden, part, teacher_hidden, part, **more).backward()
            grads.append(part.grad)
        assert_near(grads[1], grads[0][own])

    on_ranks(2, compare, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_ranks_and_the_edges(backend, tmp_path):
    """Minus infinity in a whole shard of the teacher or the student, masked tokens, none at all, bf16."""

    def compare():
        own = slice(12 * dist.get_rank(), 12 * dist.get_rank() + 12)
        student, teacher = (x[..., :36] for x in dense_inputs())
        mask = torch.ones(2, TOKENS // 2, dtype=torch.bool)
        mask[0, :2] = False
        teacher[0, 3, :12] = -torch.inf
        student[0, 4, 13] = -torch.inf
        student[1, 0], teacher[1, 0] = (
            x[1, 0].index_fill(0, torch.arange(24, 36), -torch.inf) for x in (student, teacher)
        )
        ids = labels().clamp(max=11)
        for token_mask, dtype in product((None, mask, torch.zeros_like(mask)), (torch.float32, torch.bfloat16)):
            results = []
            for columns, group in ((slice(None), None), (own, dist.group.WORLD)):
                part = student[..., columns].to(dtype).requires_grad_()
                with e3k.use_backend(backend if group else "reference"):
                    value, stats = e3k.entropy_kl(
                        part, teacher[..., columns].to(dtype), ids, token_mask=token_mask, kd_ratio=0.7, group=group,
                        reduction="none", return_stats=True,
                    )  # fmt: skip
                value[value.isfinite()].sum().backward()
                results.append((value, *stats, part.grad))
            *expected, grad = results[0]
            assert_near(results[1], (*expected, grad[..., own]), tolerance=1e-5 if dtype == torch.float32 else 1e-2)

    on_ranks(3, compare, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stored_predictions_where_the_student_has_none(backend, tmp_path):
    """A rank whose columns are all minus infinity, and ids among them; a token whose stored entries are all padding."""

    def compare():
        student, (logprobs, ids) = dense_inputs()[0], stored(5)
        student[0, 1, 20:] = student[0, 3, :20] = -torch.inf
        logprobs[1, 2] = -torch.inf
        for tail in ("bucket", "renorm", "truncated"):
            results = []
            for columns, group in ((slice(None), None), (own_columns(CUTS["uneven"]), dist.group.WORLD)):
                part = student[..., columns].clone().requires_grad_()
                with e3k.use_backend(backend if group else "reference"):
                    value, stats = e3k.topk_kl(
                        part, logprobs, ids, tail=tail, reduction="none", return_stats=True, group=group
                    )
                value[value.isfinite()].sum().backward()
                results.append((value, stats.kl, stats.teacher_entropy, stats.weight, part.grad))
            *expected, grad = results[0]
            assert_near(results[1], (*expected, grad[..., own_columns(CUTS["uneven"])]))

    on_ranks(2, compare, tmp_path)


def test_dtensors_imply_their_group(tmp_path):
    def compare():
        mesh = init_device_mesh("cpu", (2,))
        for options in OPTIONS[::5] + OTHERS:
            value, stats, (grad, _) = run(dense, dense_inputs(), options)
            shards = [distribute_tensor(x, mesh, [Shard(2)]) for x in dense_inputs()]
            actual = run(dense, shards, options)
            assert_near(actual[:2], (value, stats))
            assert actual[2][0].placements == (Shard(2),)
            assert_near(actual[2][0].full_tensor(), grad)

            value, stats, expected = run(linear, linear_inputs(), options)
            inputs = [distribute_tensor(x, mesh, [Replicate() if x.dim() == 3 else Shard(0)]) for x in linear_inputs()]
            actual = run(linear, inputs, options)
            assert_near(actual[:2], (value, stats))
            assert_near([g.full_tensor() for g in actual[2][:3]], expected[:3])

    on_ranks(2, compare, tmp_path)


def test_what_does_not_fit_together_is_refused(tmp_path):
    def refused(error, message, call):
        with pytest.raises(error, match=message):
            call()

    def compare():
        rank, world = dist.get_rank(), dist.group.WORLD
        mesh = init_device_mesh("cpu", (2,))
        whole, teacher = dense_inputs()
        refused(ValueError, r"ranks hold \[7, 14\] tokens", lambda: e3k.entropy_kl(
            whole[: rank + 1], teacher[: rank + 1], group=world))  # fmt: skip
        empty = whole[..., : 37 * rank]
        refused(ValueError, r"ranks hold \[0, 37\] columns", lambda: e3k.entropy_kl(empty, empty, group=world))
        outside = torch.full(whole.shape[:-1], 2 * VOCABULARY)
        refused(ValueError, r"labels holds 74", lambda: e3k.entropy_kl(whole, teacher, outside, group=world))
        shard = distribute_tensor(whole, mesh, [Shard(2)])
        refused(TypeError, r"teacher_logits is a plain tensor", lambda: e3k.entropy_kl(shard, teacher))
        alone = distribute_tensor(
            whole, init_device_mesh("cpu", (2, 1), mesh_dim_names=("rows", "columns"))["columns"], [Shard(2)]
        )
        refused(ValueError, r"student_logits lies on .* none of whose dimensions is group, the ranks \[0, 1\]", lambda:
            e3k.entropy_kl(alone, alone, group=world))  # fmt: skip
        with e3k.use_backend("native"):
            refused(RuntimeError, r"'native' cannot serve", lambda: e3k.entropy_kl(whole, teacher, group=world))

    on_ranks(2, compare, tmp_path)
