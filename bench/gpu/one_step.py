"""Every operation and a few decoded tokens once, for tools that watch kernels: `python -m bench.gpu.one_step`."""

import torch

import e3kernels as e3k


def main() -> None:
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    student, teacher = (torch.randn(64, 50257, device=device, dtype=torch.bfloat16) for _ in range(2))
    stored, ids = teacher.float().log_softmax(-1).topk(10)
    hidden = torch.randn(64, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50257, 256, device=device, dtype=torch.bfloat16) / 16
    gate = torch.rand((), device=device)
    student.requires_grad_()
    e3k.entropy_kl(student, teacher).backward()
    e3k.topk_kl(student, stored, ids).backward()
    e3k.linear_entropy_kl(hidden, weight, hidden.detach(), weight).backward()
    e3k.gated_residual(hidden, hidden.detach(), gate).float().sum().backward()
    e3k.gumbel_topk(torch.randn(32, device=device, requires_grad=True), 24).mask.sum().backward()
    _decode(device)
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _decode(device: torch.device) -> None:
    import transformers

    from e3pruner.runtime.layer_skip import LayerSkipRuntime

    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=32000,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16).eval()
    LayerSkipRuntime(model).generate(torch.arange(8).unsqueeze(0), max_new_tokens=4)


if __name__ == "__main__":
    main()
