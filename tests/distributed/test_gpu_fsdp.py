"""FSDP2 with one rank on NCCL: the loss and its gradients are those without it. `make gpu`; never run on a GPU yet.

E3_TEST_DEVICE=cpu runs the same on gloo, to rehearse the test.
"""

import os

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_model, tiny_tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import e3kernels as e3k

DEVICE = os.environ.get("E3_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def mesh(tmp_path):
    backend = "gloo" if DEVICE == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


def loss_and_gradients(model, ids):
    hidden = model.model(ids).last_hidden_state
    head = model.lm_head.weight
    head = head.full_tensor() if isinstance(head, DTensor) else head
    with torch.no_grad():
        teacher = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    loss = e3k.linear_entropy_kl(hidden, head, teacher, head.detach())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in gradients.items()
        if gradient is not None
    }


def test_one_rank_is_as_none(mesh):
    ids = tiny_tokens(batch=2, length=12).to(DEVICE)
    plain = tiny_model("llama", tie_word_embeddings=False).to(DEVICE).train()
    expected, expected_gradients = loss_and_gradients(plain, ids)
    sharded = tiny_model("llama", tie_word_embeddings=False).to(DEVICE).train()
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded.model, mesh=mesh)
    loss, gradients = loss_and_gradients(sharded, ids)
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)
