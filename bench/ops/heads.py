"""Two models' hidden states and output heads, and the matrix products that no linear loss can do without."""

from functools import lru_cache

import torch

# H, V, N: a small model's head, a large model's.
SIZES = [(576, 49_152, 2048), (2048, 151_936, 512)]


@lru_cache(maxsize=1)
def make(width, vocabulary, rows, dtype):
    """Student and teacher hidden states (N, H), one frozen head (V, H) each."""
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2)]
    weights = [(torch.randn(vocabulary, width, generator=generator) / width**0.5 * 2).to(dtype) for _ in range(2)]
    return hidden[0], weights[0], hidden[1], weights[1]


def products(student_hidden, student_weight, teacher_hidden=None, teacher_weight=None, *, learns=False):
    """A call of the bare products: logits of each model given, the gradient of the student's hidden states, and that of
    its head if it `learns`."""
    logits = torch.empty(len(student_hidden), len(student_weight), dtype=student_hidden.dtype)
    grad = torch.empty_like(student_hidden)
    grad_weight = torch.empty_like(student_weight) if learns else None

    def call():
        if teacher_hidden is not None:
            torch.mm(teacher_hidden, teacher_weight.t(), out=logits)
        torch.mm(student_hidden, student_weight.t(), out=logits)
        if grad_weight is not None:
            torch.mm(logits.t(), student_hidden, out=grad_weight)
        return torch.mm(logits, student_weight, out=grad)

    return call
