"""The losses with DTensors, wherever they lie, against the same loss in one process."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import e3kernels as e3k

TOKENS, WIDTH, VOCABULARY, RANKS = 6, 4, 11, 2
# Where weight (V, H) and bias (V,) of a head lie; the mesh of two dimensions has one rank along its first.
PLACES = {
    "rows": ([Shard(0)], [Shard(0)]),
    "columns": ([Shard(1)], [Replicate()]),
    "everywhere": ([Replicate()], [Replicate()]),
    "rows of a plane": ([Replicate(), Shard(0)], [Replicate(), Shard(0)]),
    "rows and columns of a plane": ([Shard(1), Shard(0)], [Replicate(), Shard(0)]),
}
# The weights of all tokens are equal, so that the mean of the ranks' means is the mean over their tokens.
OPTIONS = {"weighting": "none", "kd_ratio": 0.7, "divergence": "jsd"}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels() -> torch.Tensor:
    return torch.arange(RANKS * TOKENS).reshape(RANKS * TOKENS) % VOCABULARY


def stored() -> tuple[torch.Tensor, torch.Tensor]:
    return random(RANKS * TOKENS, VOCABULARY, seed=7).log_softmax(-1).topk(4)


def hidden_states() -> list[torch.Tensor]:
    """Of student and teacher; rank r's tokens are the r-th half."""
    return [random(RANKS * TOKENS, WIDTH, seed=seed) for seed in (0, 1)]


def heads() -> list[torch.Tensor]:
    """Weight and bias of the student, weight and bias of the teacher."""
    return [random(*shape, seed=seed) for seed, shape in enumerate(2 * [(VOCABULARY, WIDTH), (VOCABULARY,)], start=2)]


def linear_entropy_kl(hidden, head, rows=slice(None), **more):
    student, teacher = hidden
    weight, bias, teacher_weight, teacher_bias = head
    biases = {"student_bias": bias, "teacher_bias": teacher_bias}
    return e3k.linear_entropy_kl(student, weight, teacher, teacher_weight, labels()[rows], **biases, **OPTIONS, **more)


def linear_topk_kl(hidden, head, rows=slice(None), **more):
    targets = [tensor[rows] for tensor in stored()]
    return e3k.linear_topk_kl(hidden[0], head[0], *targets, labels()[rows], student_bias=head[1], **OPTIONS, **more)


def entropy_kl(hidden, head, rows=slice(None), **more):
    logits = [F.linear(h, *part) for h, part in zip(hidden, (head[:2], head[2:]), strict=True)]
    return e3k.entropy_kl(*logits, labels()[rows], **OPTIONS, **more)


def topk_kl(hidden, head, rows=slice(None), **more):
    targets = [tensor[rows] for tensor in stored()]
    return e3k.topk_kl(F.linear(hidden[0], *head[:2]), *targets, labels()[rows], **OPTIONS, **more)


LINEAR = {"linear_entropy_kl": linear_entropy_kl, "linear_topk_kl": linear_topk_kl}
DENSE = {"entropy_kl": entropy_kl, "topk_kl": topk_kl}


def own_rows() -> slice:
    return slice(TOKENS * dist.get_rank(), TOKENS * (dist.get_rank() + 1))


def in_one_process(loss, rows=slice(None), learning=True):
    """(loss, gradients of the student's hidden states, weight and bias) of plain tensors."""
    hidden, head = [h[rows].requires_grad_() for h in hidden_states()], heads()
    for part in head[:2]:
        part.requires_grad_(learning)
    value = loss(hidden, head, rows)
    value.backward()
    return value.detach(), [hidden[0].grad, *(part.grad for part in head[:2])]


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def placed(place: str) -> list[DTensor]:
    weight_place, bias_place = PLACES[place]
    mesh = init_device_mesh("cpu", (RANKS,) if len(weight_place) == 1 else (1, RANKS))
    return [distribute_tensor(x, mesh, weight_place if x.dim() == 2 else bias_place) for x in heads()]


@pytest.mark.parametrize("place", PLACES)
def test_every_rank_s_own_tokens(place, tmp_path):
    """Plain hidden states are the rank's own: its loss is of them, and the head's gradient the mean of the ranks'."""

    def compare():
        for (_, loss), learning in product(LINEAR.items(), (True, False)):
            head = placed(place)
            for part in head[:2]:
                part.requires_grad_(learning)
            hidden = [h[own_rows()].requires_grad_() for h in hidden_states()]
            value = loss(hidden, head, own_rows())
            value.backward()
            expected, (grad_hidden, *_) = in_one_process(loss, own_rows())
            assert_near((value.detach(), hidden[0].grad), (expected, grad_hidden))
            if learning:
                whole = in_one_process(loss)[1][1:]
                for part, grad in zip(head, whole, strict=False):
                    assert part.grad.placements == part.placements
                    assert_near(part.grad.full_tensor(), grad)
            else:
                assert head[0].grad is head[1].grad is None

    on_ranks(RANKS, compare, tmp_path)


@pytest.mark.parametrize("place", PLACES)
def test_hidden_states_that_are_dtensors_are_those_of_all_ranks(place, tmp_path):
    def compare():
        for loss in (LINEAR | DENSE).values():
            expected, grads = in_one_process(loss)
            for tokens in (Replicate(), Shard(0)):
                head = [part.requires_grad_() for part in placed(place)]
                mesh = head[0].device_mesh
                where = [Replicate()] * (mesh.ndim - 1) + [tokens]
                hidden = [distribute_tensor(h, mesh, where).requires_grad_() for h in hidden_states()]
                value = loss(hidden, head)
                value.backward()
                assert_near(value.detach(), expected)
                for tensor, grad in zip((hidden[0], *head[:2]), grads, strict=True):
                    assert_near(tensor.grad.full_tensor(), grad)

    on_ranks(RANKS, compare, tmp_path)


@pytest.mark.parametrize("place", PLACES)
def test_a_group_says_that_plain_hidden_states_are_the_same_ones(place, tmp_path):
    def compare():
        for loss in LINEAR.values():
            head = [part.requires_grad_() for part in placed(place)]
            hidden = [h.requires_grad_() for h in hidden_states()]
            value = loss(hidden, head, group=dist.group.WORLD)
            value.backward()
            expected, grads = in_one_process(loss)
            assert_near(value.detach(), expected)
            assert_near([hidden[0].grad, *(part.grad.full_tensor() for part in head[:2])], grads)

    on_ranks(RANKS, compare, tmp_path)


def test_groups_of_ranks_with_tokens_of_their_own(tmp_path):
    """Four ranks: two pairs, each with tokens of its own, share out the vocabulary and, as FSDP does, hold halves."""

    def compare():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
        pair = mesh.get_local_rank("data")
        rows = slice(TOKENS * pair, TOKENS * (pair + 1))
        for loss, more in product(LINEAR.values(), ({}, {"group": mesh.get_group("vocabulary")})):
            head = [distribute_tensor(x, mesh, [Shard(0), Shard(0)]).requires_grad_() for x in heads()]
            hidden = [h[rows].requires_grad_() for h in hidden_states()]
            value = loss(hidden, head, rows, **more)
            value.backward()
            expected, (grad_hidden, *_) = in_one_process(loss, rows)
            assert_near((value.detach(), hidden[0].grad), (expected, grad_hidden))
            whole = in_one_process(loss)[1][1:]
            assert_near([part.grad.full_tensor() for part in head[:2]], whole)

    on_ranks(4, compare, tmp_path)


def test_a_head_that_both_models_share(tmp_path, monkeypatch):
    """It is gathered once, and multiplied once a tile."""

    def compare():
        hidden, (weight, *_) = hidden_states(), placed("rows")
        weight.requires_grad_()
        gathered = []
        whole = DTensor.full_tensor
        monkeypatch.setattr(DTensor, "full_tensor", lambda self, **more: gathered.append(self) or whole(self, **more))
        e3k.linear_entropy_kl(*(x for h in hidden for x in (h, weight))).backward()
        assert len(gathered) == 1
        monkeypatch.undo()
        plain = heads()[0].requires_grad_()
        e3k.linear_entropy_kl(*(x for h in hidden for x in (h, plain))).backward()
        assert_near(weight.grad.full_tensor(), plain.grad)

    on_ranks(RANKS, compare, tmp_path)


class Student(nn.Module):
    """Runs its body, and its head on the last token only: the loss multiplies the others."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        with torch.no_grad():
            for part, value in zip(self.head.parameters(), heads(), strict=False):
                part.copy_(value)
            for seed, part in enumerate(self.body.parameters(), start=20):
                part.copy_(random(*part.shape, seed=seed))

    def forward(self, inputs):
        hidden = self.body(inputs)
        return hidden, self.head(hidden[-1:])


@pytest.mark.parametrize("reshard", [True, False])
def test_fully_sharded(reshard, tmp_path):
    """Under FSDP2 the head is a shard, where it is resharded after the forward, of tokens that differ by rank."""

    def step(model, loss, rows):
        inputs, teacher = (h[rows] for h in hidden_states())
        hidden, _ = model(inputs)
        value = loss([hidden, teacher], [model.head.weight, model.head.bias, *heads()[2:]], rows)
        value.backward()
        return value.detach()

    def compare():
        for loss in LINEAR.values():
            one, model = Student(), fully_shard(Student(), reshard_after_forward=reshard)
            assert_near(step(model, loss, own_rows()), step(Student(), loss, own_rows()))
            assert isinstance(model.head.weight, DTensor)
            step(one, loss, slice(None))
            for part, whole in zip(model.parameters(), one.parameters(), strict=True):
                assert_near(part.grad.full_tensor(), whole.grad)

    on_ranks(RANKS, compare, tmp_path)


def test_a_fully_sharded_teacher(tmp_path):
    def compare():
        weight, bias, *_ = heads()
        teacher = fully_shard(nn.Linear(WIDTH, VOCABULARY), reshard_after_forward=True)
        for part, value in zip(teacher.parameters(), heads()[2:], strict=True):
            part.data.copy_(distribute_tensor(value, part.device_mesh, part.placements))
        hidden = [h[own_rows()] for h in hidden_states()]
        for student in ((weight, bias), tuple(teacher.parameters())):
            value = linear_entropy_kl(hidden, [*student, *teacher.parameters()], own_rows())
            plain = [part if not isinstance(part, DTensor) else part.full_tensor() for part in student]
            assert_near(value, linear_entropy_kl(hidden, [*plain, *heads()[2:]], own_rows()))

    on_ranks(RANKS, compare, tmp_path)
