"""The Triton kernels on a real device: `make gpu`. Never run yet; see README.md."""

import pytest
import torch

import e3kernels as e3k

DEVICE = "xpu" if torch.xpu.is_available() else "cuda"
PRESENT = torch.cuda.is_available() or torch.xpu.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not PRESENT, reason="no CUDA, ROCm or XPU device")]


def logits(rows, vocabulary, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    student, teacher = (
        (4 * torch.randn(rows, vocabulary, generator=generator, device=DEVICE)).to(dtype) for _ in range(2)
    )
    labels = torch.randint(vocabulary, (rows,), generator=generator, device=DEVICE)
    labels[::7] = -100
    return student, teacher, labels


def gradient(loss, *inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_parity(loss, inputs, dtype):
    ours = gradient(loss, *inputs)
    with e3k.use_backend("reference"):
        exact = gradient(loss, *(x.double() for x in inputs))
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    for mine, truth in zip(ours, exact, strict=True):
        assert (mine.double() - truth).abs().max() <= rounding * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "adaptive"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(5, 128256), (300, 50257), (2000, 4096)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_entropy_kl(dtype, divergence, rows, vocabulary, reduction):
    student, teacher, labels = logits(rows, vocabulary, dtype)
    assert_parity(
        lambda z: e3k.entropy_kl(
            z, teacher.to(z.dtype), labels, divergence=divergence, kd_ratio=0.6, temperature=1.7, reduction=reduction
        ),
        [student],
        dtype,
    )


@pytest.mark.parametrize("tail", ["bucket", "renorm", "truncated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_kl(tail, dtype):
    student, teacher, labels = logits(300, 50257, dtype)
    log_p, ids = teacher.float().log_softmax(-1).topk(10)
    assert_parity(lambda z: e3k.topk_kl(z, log_p, ids, labels, tail=tail, kd_ratio=0.6), [student], dtype)


def test_rows_beyond_two_to_the_31():
    """The last row's statistics depend on 64-bit addresses."""
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("needs 20 GiB of device memory")
    vocabulary = 131072
    student = torch.zeros((1 << 31) // vocabulary + 1, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    teacher = torch.zeros_like(student)
    teacher[-1, -1] = 8
    with torch.no_grad():
        loss = e3k.entropy_kl(student, teacher, weighting="none", reduction="none")
        expected = e3k.entropy_kl(student[-1:], teacher[-1:], weighting="none", reduction="none")
    assert loss[:-1].eq(0).all()
    assert torch.equal(loss[-1:], expected)


@pytest.mark.parametrize("relaxation", ["threshold", "softmax", "successive"])
def test_gumbel_topk_has_the_bits_of_the_cpu(relaxation):
    theta = torch.randn(4, 80)
    on_gpu = e3k.gumbel_topk(theta.to(DEVICE), 60, tau=0.7, seed=2**40 + 9, step=5, relaxation=relaxation)
    with e3k.use_backend("reference"):
        on_cpu = e3k.gumbel_topk(theta, 60, tau=0.7, seed=2**40 + 9, step=5, relaxation=relaxation)
    assert torch.equal(on_gpu.mask.cpu(), on_cpu.mask)
    torch.testing.assert_close(on_gpu.probs.cpu(), on_cpu.probs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [512, 4096])
def test_linear_entropy_kl(width):
    generator = torch.Generator(DEVICE).manual_seed(1)
    hidden, teacher = (torch.randn(300, width, generator=generator, device=DEVICE) / width**0.25 for _ in range(2))
    weight = torch.randn(32000, width, generator=generator, device=DEVICE) / width**0.25
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_parity(
        lambda h, w: e3k.linear_entropy_kl(h, w, teacher.to(h.dtype), w.detach()), [hidden, weight], torch.float32
    )
    hidden, weight, teacher = (x.bfloat16() for x in (hidden, weight, teacher))
    with torch.no_grad():
        on_chip = e3k.linear_entropy_kl(hidden, weight, teacher, weight)
        with e3k.use_backend("reference"):
            exact = e3k.linear_entropy_kl(*(x.double() for x in (hidden, weight, teacher, weight)))
    rounded = 1e-4 if width == 512 else 2e-2  # logits in memory have the dtype of the products
    torch.testing.assert_close(on_chip.double(), exact, rtol=rounded, atol=1e-6)


def test_results_are_the_same_every_time():
    student, teacher, labels = logits(6, 128256, torch.bfloat16)
    first, *others = (gradient(lambda z: e3k.entropy_kl(z, teacher, labels), student) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
def test_a_cuda_graph_captures_a_step():
    student, teacher, labels = logits(64, 32000, torch.bfloat16)
    hidden, branch, gate = (torch.randn(shape, device=DEVICE) for shape in ((4, 64, 512), (4, 64, 512), ()))

    def step():
        loss = gradient(lambda z: e3k.entropy_kl(z, teacher, labels, kd_ratio=0.5, temperature=1.3), student)
        mask = e3k.gumbel_topk(hidden[0, 0, :40], 30, tau=0.5, seed=1, step=2).mask
        return [*loss, e3k.gated_residual(hidden, branch, gate), mask]

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_compiled_with_inductor_and_no_recompilation_for_scalars():
    from torch._dynamo.testing import CompileCounterWithBackend

    student, teacher, labels = logits(64, 32000, torch.bfloat16)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        lambda z, t: e3k.entropy_kl(2 * z, teacher, labels, temperature=t), backend=counter, fullgraph=True
    )
    for temperature in (1.0, 1.5, 2.0, 2.5):
        ours = gradient(lambda z, t=temperature: compiled(z, t), student)
        eager = gradient(lambda z, t=temperature: e3k.entropy_kl(2 * z, teacher, labels, temperature=t), student)
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=1e-6)
    assert counter.frame_count <= 2
