"""Derivatives of all six operations on every backend: right, or an error that says what to do; never silently zero."""

from functools import partial

import operations
import pytest
import torch
from operations import OPERATIONS, small_call
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import e3kernels as e3k

CASES = [(operation, {}) for operation in OPERATIONS]
CASES += [(operation, {"reduction": "none"}) for operation in operations.LOSSES]


@pytest.fixture(params=CASES, ids=lambda case: "-".join((case[0], *case[1].values())))
def call(request: pytest.FixtureRequest, any_backend: str) -> operations.Call:
    operation, options = request.param
    return small_call(operation, **options)


def test_reverse_mode_under_transforms(call):
    expected = call.gradients()
    every = tuple(range(len(call.inputs)))
    assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
    assert_close(torch.func.grad(call.total, every)(*call.inputs), expected)
    value, pull_back = torch.func.vjp(call.total, *call.inputs)
    for _ in range(2):  # a pull-back may be called again
        assert_close(pull_back(torch.ones_like(value)), expected)
    rows = torch.func.jacrev(lambda *inputs: call.total(*inputs).expand(2), every)(*call.inputs)
    assert_close(tuple(row[1] for row in rows), expected)


def test_vmap_of_the_gradient_is_a_loop(call):
    batches = [torch.stack((tensor, tensor.flip(0))) for tensor in call.inputs]
    every = tuple(range(len(batches)))
    batched = torch.vmap(torch.func.grad(call.total, every))(*batches)
    for index in range(2):
        alone = torch.func.grad(call.total, every)(*(batch[index] for batch in batches))
        torch.testing.assert_close(tuple(gradient[index] for gradient in batched), alone)


def test_vmap_over_leaves_that_need_a_gradient(call):
    first, others = call.inputs[0], call.inputs[1:]
    leaf = torch.stack((first, first.flip(0)), 1).requires_grad_()
    torch.vmap(call.total, (1, *(None,) * len(others)))(leaf, *others).sum().backward()
    for index, single in enumerate(leaf.detach().unbind(1)):
        alone = single.clone().requires_grad_()
        (expected,) = torch.autograd.grad(call.total(alone, *others), alone)
        torch.testing.assert_close(leaf.grad[:, index], expected)


def test_batched_gradients(call):
    leaves = call.leaves()
    incoming = torch.tensor([1.0, -2.0])
    value, expected = call.total(*leaves), call.gradients()
    for batched in (
        torch.autograd.grad(value, leaves, incoming, retain_graph=True, is_grads_batched=True),
        torch.vmap(lambda one: torch.autograd.grad(value, leaves, one, retain_graph=True))(incoming),
    ):
        for index in range(2):
            torch.testing.assert_close(
                tuple(gradient[index] for gradient in batched),
                tuple(incoming[index] * gradient for gradient in expected),
            )


def test_a_leaf_outside_the_transform_keeps_its_gradient(call):
    if len(call.inputs) == 1:
        pytest.skip("one differentiable input cannot be both inside and outside")
    leaves = call.leaves()
    inside = leaves[1].detach()
    value, pull_back = torch.func.vjp(lambda second: call.total(leaves[0], second, *leaves[2:]), inside)
    expected = call.gradients()
    torch.testing.assert_close(torch.autograd.grad(value, leaves[0], retain_graph=True)[0], expected[0])
    (gradient,) = pull_back(torch.ones_like(value))
    torch.testing.assert_close(gradient.detach(), expected[1])
    with pytest.raises(RuntimeError, match="its gradient has no gradient"):
        gradient.sum().backward()


def _tangents(call: operations.Call) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.ones_like, call.inputs))


def _dual_level(call: operations.Call) -> None:
    with forward_ad.dual_level():
        call.function(*map(forward_ad.make_dual, call.inputs, _tangents(call)))


def _dual_leaf(call: operations.Call) -> None:
    with forward_ad.dual_level():
        call.function(forward_ad.make_dual(call.leaves()[0], _tangents(call)[0]), *call.inputs[1:])


def _along_the_incoming_gradient(call: operations.Call) -> None:
    value, pull_back = torch.func.vjp(call.total, *call.inputs)
    torch.func.jvp(pull_back, (torch.ones_like(value),), (torch.ones_like(value),))


FORWARD_MODE = {
    "jvp": lambda call: torch.func.jvp(call.total, call.inputs, _tangents(call)),
    "jvp without gradients": torch.no_grad()(lambda call: torch.func.jvp(call.total, call.inputs, _tangents(call))),
    "jacfwd": lambda call: torch.func.jacfwd(call.total)(*call.inputs),
    "dual level": _dual_level,
    "dual leaf": _dual_leaf,
    "forward over reverse": lambda call: torch.func.hessian(call.total)(*call.inputs),
    "along the incoming gradient": _along_the_incoming_gradient,
}


@pytest.mark.parametrize("way", FORWARD_MODE)
def test_forward_mode_raises(call, way):
    with pytest.raises(RuntimeError, match=r"has no forward-mode derivative .* reverse mode"):
        FORWARD_MODE[way](call)


def _penalty(call: operations.Call) -> None:
    leaves = call.leaves()
    value = call.total(*leaves)
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    (value + sum(gradient.square().sum() for gradient in gradients)).backward()


def _through_the_incoming_gradient(call: operations.Call) -> None:
    leaves, factor = call.leaves(), torch.ones((), requires_grad=True)
    (gradient, *_) = torch.autograd.grad(factor * call.total(*leaves), leaves, create_graph=True)
    torch.autograd.grad(gradient.sum(), factor)


def _batched_penalty(call: operations.Call) -> None:
    leaf = torch.stack((call.inputs[0], call.inputs[0])).requires_grad_()
    in_dims = (0, *(None,) * (len(call.inputs) - 1))
    gradient = torch.vmap(torch.func.grad(call.total), in_dims)(leaf, *call.inputs[1:])
    (leaf.sum() + gradient.square().sum()).backward()


def _gradient_of_the_gradient(call: operations.Call) -> None:
    torch.func.grad(lambda *inputs: torch.func.grad(call.total)(*inputs).square().sum())(*call.inputs)


SECOND_DERIVATIVES = {
    "penalty": _penalty,
    "through the incoming gradient": _through_the_incoming_gradient,
    "batched penalty": _batched_penalty,
    "gradient of the gradient": _gradient_of_the_gradient,
    "reverse over reverse": lambda call: torch.func.jacrev(torch.func.jacrev(call.total))(*call.inputs),
    "hvp": lambda call: torch.autograd.functional.hvp(call.total, call.inputs, _tangents(call)),
}


@pytest.mark.parametrize("way", SECOND_DERIVATIVES)
def test_second_derivatives_raise(call, way):
    with pytest.raises(RuntimeError, match="its gradient has no gradient"):
        SECOND_DERIVATIVES[way](call)


def test_gradient_operators_are_not_differentiable(any_backend):
    operator = getattr(torch.ops.e3.gated_residual_backward, any_backend)
    hidden, branch_out, gate = small_call("gated_residual").inputs
    incoming = torch.ones_like(hidden, requires_grad=True)
    with pytest.raises(RuntimeError, match="its gradient has no gradient"):
        operator(incoming, hidden, branch_out, gate)[0].sum().backward()
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda g: operator(g, hidden, branch_out, gate)[0], (hidden,), (hidden,))


def test_a_graph_of_the_gradient_that_nobody_differentiates_costs_nothing(call):
    leaves = call.leaves()
    call.total(*leaves).backward(create_graph=True)
    torch.testing.assert_close(tuple(leaf.grad.detach() for leaf in leaves), call.gradients())
    gradients = torch.autograd.grad(call.total(*leaves), leaves, create_graph=True)
    with torch.no_grad():
        for gradient in gradients:
            gradient.mul_(2)


def test_a_changed_gradient_changes_no_later_backward_pass(call):
    leaves, expected = call.leaves(), call.gradients()
    output = call.function(*leaves)
    ones = torch.ones_like(output)
    once = torch.autograd.grad(output, leaves, ones, retain_graph=True)
    kept = [gradient.clone() for gradient in once]
    for gradient in once:
        gradient.fill_(torch.nan)
    again = torch.autograd.grad(output, leaves, ones, retain_graph=True)
    torch.testing.assert_close(list(again), kept)
    value = call.total(*leaves)
    value.backward(retain_graph=True)
    torch.nn.utils.clip_grad_norm_(leaves, 1e-3)
    for leaf in leaves:
        leaf.grad = None
    value.backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), expected)


@pytest.mark.parametrize("operation", operations.LOSSES)
def test_the_only_backward_pass_copies_nothing(any_backend, operation):
    """The gradient that the forward pass computed is the one handed out: a pass over memory less."""
    operator = getattr(torch.ops.e3, operation)
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            if func.overloadpacket is operator:
                seen.append(results[2])
            return results

    call = small_call(operation)
    leaf, *others = call.leaves()
    with Spy():
        loss = call.function(leaf, *others)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.data_ptr() == seen[0].data_ptr()


@pytest.mark.parametrize("operation", [*operations.LOSSES, "gated_residual"])
def test_the_result_may_be_changed_in_place(any_backend, operation):
    """As in `loss /= steps`; what is saved for the backward pass is not the result, `gumbel_topk`'s excepted."""
    call = small_call(operation)
    leaves = call.leaves()
    output = call.function(*leaves)
    output.mul_(0.5)
    halves = torch.autograd.grad(output, leaves, torch.ones_like(output))
    output = call.function(*leaves)
    expected = torch.autograd.grad(output, leaves, torch.full_like(output, 0.5))
    torch.testing.assert_close(halves, expected)


def test_autograd_asks_for_the_gradients_that_it_wants(any_backend):
    """Whoever calls the operator need not know, as in torch.vmap, which tensors require a gradient."""
    student, teacher = small_call("entropy_kl").inputs[0], small_call("gated_residual").inputs[0]
    scalars = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    operator = getattr(torch.ops.e3.entropy_kl, any_backend)
    gradients = []
    for asked in (False, True):
        leaf = student.clone().requires_grad_()
        operator(leaf, teacher, None, None, scalars, 1, 0, -100, 1, None, asked)[0].backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(call, reentrant):
    leaves = call.leaves()
    checkpoint(call.total, *leaves, use_reentrant=reentrant).backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), call.gradients(), rtol=0, atol=0)


def test_functional_call(any_backend):
    class Gated(torch.nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.gate = torch.nn.Parameter(gate)

        def forward(self, hidden, branch_out):
            return e3k.gated_residual(hidden, branch_out, self.gate).square().sum()

    hidden, branch_out, gate = small_call("gated_residual").inputs
    module = Gated(gate)
    parameters = dict(module.named_parameters())
    gradient = torch.func.grad(lambda p: torch.func.functional_call(module, p, (hidden, branch_out)))(parameters)
    module(hidden, branch_out).backward()
    torch.testing.assert_close(gradient["gate"], module.gate.grad)


def test_compiled_gradient(call, compiled_calls):
    (value,), graphs = compiled_calls(torch.func.grad(call.total), [call.inputs])
    torch.testing.assert_close(value, call.gradients()[0])
    assert graphs == 1


@pytest.mark.parametrize(("operation", "options"), CASES)
def test_gradcheck_of_every_input(operation, options):
    """In fp64, which the reference serves."""
    call = small_call(operation, torch.float64, **options)
    assert torch.autograd.gradcheck(call.total, call.leaves())


@pytest.mark.parametrize("weight_too", [False, True])
def test_a_gradient_that_nobody_needs_again_is_scaled_where_it_lies(any_backend, weight_too):
    """(c·loss).backward() of a loss accumulated over micro-batches: no second tensor of N·V."""
    generator = torch.Generator().manual_seed(8)
    student, teacher = (torch.randn(5, 24, generator=generator) for _ in range(2))
    weight = torch.randn(40, 24, generator=generator)
    leaves = [student.requires_grad_(), *([weight.requires_grad_()] if weight_too else [])]

    def loss():
        if weight_too:
            return e3k.linear_entropy_kl(student, weight, teacher, weight.detach())
        return e3k.entropy_kl(student, teacher)

    expected = [0.25 * grad for grad in torch.autograd.grad(loss(), leaves)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        value = loss()
    again = torch.autograd.grad(0.25 * value, leaves, retain_graph=True)
    assert all(grad.data_ptr() not in saved for grad in again)
    grads = torch.autograd.grad(0.25 * value, leaves)
    assert all(grad.data_ptr() in saved for grad in grads)
    torch.testing.assert_close(grads, tuple(expected))
    assert all(map(torch.equal, grads, again))
