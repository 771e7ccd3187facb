"""DTensors in a loss: what of them this rank computes with, and how their gradients return to where they lie.

A plain tensor of hidden states holds the rank's own tokens: FSDP and DDP give each rank others. A DTensor is the same
tensor on every rank of its mesh. Only in the second case can ranks share out one vocabulary without being told to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor, Placement


def on_this_rank(
    heads: Mapping[str, Tensor | None],
    dim: int,
    tokens: Mapping[str, Tensor | None],
    like: Tensor,
    group: ProcessGroup | None,
) -> tuple[ProcessGroup | None, list[Any]]:
    """(group, plain tensors in the order given) of `heads`, whose dimension `dim` is the vocabulary, and of `tokens`.

    `like` holds the student's tokens. With `group`, or if `like` and the heads are DTensors of one mesh and one of its
    dimensions shards the vocabulary, heads are cut to this rank's part of it. All other DTensors are gathered. The
    gradient of a DTensor is the mean over the ranks of its mesh, since each may have had other tokens, placed as the
    DTensor is.

    Raises TypeError naming a head that is a plain tensor beside others that are cut, ValueError for one that lies on a
    mesh without `group`.
    """
    named = {**heads, **tokens}
    if not any(_is_dtensor(tensor) for tensor in named.values()):
        return group, list(named.values())
    if group is None:
        group = _implied_group(heads, dim, like)
    plain: dict[int, Tensor] = {}  # by the DTensor's id: a head that both models share stays one tensor
    for name, tensor in named.items():
        if tensor is None or not _is_dtensor(tensor) or id(tensor) in plain:
            continue
        # torch cannot bring back the gradient of a DTensor that gets none, as a teacher's.
        source: Any = tensor if name.startswith("student") else tensor.detach()
        if group is not None and name in heads:
            plain[id(tensor)] = _part(name, source, dim, like, group)
        else:
            plain[id(tensor)] = _whole(source, like)
    return group, [plain.get(id(tensor), tensor) for tensor in named.values()]


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")  # without the import, which takes a second


def _implied_group(heads: Mapping[str, Tensor | None], dim: int, like: Any) -> ProcessGroup | None:
    from torch.distributed.tensor import Shard

    first: Any = next(iter(heads.values()))
    if not (_is_dtensor(like) and _is_dtensor(first) and like.device_mesh == first.device_mesh):
        return None
    sharding = [axis for axis, placement in enumerate(first.placements) if not placement.is_replicate()]
    if len(sharding) != 1 or first.placements[sharding[0]] != Shard(dim % first.ndim):
        return None
    for name, tensor in heads.items():
        if tensor is not None and not _is_dtensor(tensor):
            raise TypeError(f"{name} is a plain tensor beside DTensors sharded along the vocabulary; must be one too")
    implied: ProcessGroup = first.device_mesh.get_group(sharding[0])
    return implied


def _part(name: str, tensor: DTensor, dim: int, like: Any, group: ProcessGroup) -> Tensor:
    """This rank's part of a tensor whose dimension `dim` the ranks of `group` share out."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, ranks = tensor.device_mesh, dist.get_process_group_ranks(group)
    axes = [axis for axis in range(mesh.ndim) if dist.get_process_group_ranks(mesh.get_group(axis)) == ranks]
    if not axes:
        raise ValueError(f"{name} lies on {mesh}, none of whose dimensions is group, the ranks {ranks}; give parts")
    places: list[Placement] = [Replicate()] * mesh.ndim
    grads = [_of_gradient(tensor, like)] * mesh.ndim
    places[axes[0]] = grads[axes[0]] = Shard(dim % tensor.ndim)
    return tensor.redistribute(placements=places).to_local(grad_placements=grads)


def _whole(tensor: DTensor, like: Any) -> Tensor:
    return tensor.full_tensor(grad_placements=[_of_gradient(tensor, like)] * tensor.device_mesh.ndim)


def _of_gradient(tensor: DTensor, like: Any) -> Placement:
    """Where the gradients lie that the ranks compute: all the same one if all had the same tokens."""
    from torch.distributed.tensor import Partial, Replicate

    return Replicate() if getattr(like, "device_mesh", None) == tensor.device_mesh else Partial("avg")
