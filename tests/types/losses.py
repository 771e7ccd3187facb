"""What the losses return, for a type checker: `make lint` checks it, nothing runs it."""

from typing import assert_type

from torch import Tensor

import e3kernels as e3k

Both = tuple[Tensor, e3k.TokenStats]


def losses(z: Tensor, w: Tensor, ids: Tensor) -> None:
    assert_type(e3k.entropy_kl(z, z, temperature=2.0, group=None), Tensor)
    assert_type(e3k.entropy_kl(z, z, teacher_softcap=30.0, return_stats=True), Both)
    assert_type(e3k.topk_kl(z, z, ids, tail="renorm", num_items=3), Tensor)
    assert_type(e3k.topk_kl(z, z, ids, return_stats=True), Both)
    assert_type(e3k.linear_entropy_kl(z, w, z, w, ids, teacher_bias=None), Tensor)
    assert_type(e3k.linear_entropy_kl(z, w, z, w, return_stats=True), Both)
    assert_type(e3k.linear_topk_kl(z, w, z, ids, return_stats=False), Tensor)
    assert_type(e3k.linear_topk_kl(z, w, z, ids, student_bias=None, return_stats=True), Both)


def modules(z: Tensor, w: Tensor, ids: Tensor) -> None:
    assert_type(e3k.nn.EntropyKLLoss(temperature=2.0)(z, z), Tensor)
    assert_type(e3k.nn.EntropyKLLoss()(z, z, token_mask=ids, return_stats=True), Both)
    assert_type(e3k.nn.TopkKLLoss(tail="renorm")(z, z, ids), Tensor)
    assert_type(e3k.nn.TopkKLLoss()(z, z, ids, return_stats=True), Both)
    assert_type(e3k.nn.LinearEntropyKLLoss()(z, w, z, w, num_items=3), Tensor)
    assert_type(e3k.nn.LinearEntropyKLLoss()(z, w, z, w, return_stats=True), Both)
    assert_type(e3k.nn.LinearTopkKLLoss()(z, w, z, ids, student_bias=None), Tensor)
    assert_type(e3k.nn.LinearTopkKLLoss()(z, w, z, ids, return_stats=True), Both)


def refused(z: Tensor, ids: Tensor) -> None:
    e3k.entropy_kl(z, z, heat=1)  # type: ignore[call-overload]
    e3k.topk_kl(z, z, ids, teacher_scale=2.0)  # type: ignore[call-overload]
    e3k.nn.EntropyKLLoss(tail="renorm")  # type: ignore[call-arg]
