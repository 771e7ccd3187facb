"""What an installed wheel must do, wherever it was installed: both native modules load, and a loss has its gradient."""

import torch

import e3kernels

modules = e3kernels.info()["native_modules"]
assert set(modules.values()) == {"loaded"}, modules
student, teacher = torch.randn(5, 1000, requires_grad=True), torch.randn(5, 1000)
with e3kernels.use_backend("native"):
    e3kernels.entropy_kl(student, teacher).backward()
with e3kernels.use_backend("reference"):
    (expected,) = torch.autograd.grad(e3kernels.entropy_kl(student, teacher), student)
torch.testing.assert_close(student.grad, expected)
