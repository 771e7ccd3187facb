"""What `e3 plan` says a model will take, held to sums by hand and to what a process really takes."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from e3pruner.models.files.empty import empty_model
from e3pruner.pipelines.forecast import Machine, Sizes, forecast, machine

QWEN3_32B = Qwen3Config(
    hidden_size=5120,
    intermediate_size=25600,
    num_hidden_layers=64,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151_936,
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return Sizes.of(empty_model(QWEN3_32B))


def by_name(ahead):
    return {(need.stage, need.placement): need for need in ahead.needs}


def test_sizes_are_those_of_the_published_model(sizes):
    assert sizes.parameters == 32_762_123_264  # the number in its model card's safetensors
    assert sizes.weights == 2 * sizes.parameters
    assert sizes.kv == 2 * 8 * 128 * 2 * 64
    assert sizes.outside == 2 * (2 * 151_936 * 5120 + 5120)
    assert sizes.active == sizes.parameters - 151_936 * 5120


def test_a_model_that_fits_one_device_does_and_its_training_does_not(sizes):
    one = by_name(forecast(sizes, machine("h100")))
    assert one["search", "whole"].fits
    assert not one["distill", "whole"].fits
    assert one["distill", "whole, teacher cached"].memory == pytest.approx(
        one["distill", "whole"].memory - sizes.weights
    )
    assert by_name(forecast(sizes, machine("h100:8")))["distill", "fsdp2, 8 devices"].fits
    small = by_name(forecast(sizes, machine("rtx4090")))
    assert not small["search", "whole"].fits
    assert small["search", "stream"].fits


def test_a_search_is_bound_by_products_and_a_streamed_one_by_the_disk(sizes):
    ahead = by_name(forecast(sizes, machine("h100"), drop=16, tokens=4096))
    products = 0.7 * 64 * 2 * sizes.active * 4096 / (0.5 * 989e12)
    assert ahead["search", "whole"].seconds == pytest.approx(products)
    sweeps = (3 * 16 + 2) * (sizes.weights - sizes.outside) / 3e9
    assert ahead["search", "stream"].seconds == pytest.approx(sweeps)


def test_of_experts_a_token_multiplies_by_those_that_it_is_routed_to():
    config = AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=2, hidden_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2
    )
    model = empty_model(config)
    experts = 2 * 8 * 3 * 64 * 32
    whole = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    assert Sizes.of(model).active == whole - 0.75 * experts


def test_a_latent_of_keys_and_values_is_what_is_kept():
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=4, dtype="bfloat16")
    assert Sizes.of(empty_model(config)).kv == 4 * (512 + 64) * 2


@pytest.mark.parametrize("name", ["h1000", "h100:0", "h100:two", ""])
def test_a_machine_that_is_not_known_is_named(name):
    with pytest.raises(ValueError, match=rf"device='{name}' must be one of a100, .*, or of so many: h100:8"):
        machine(name)


def test_what_leaves_no_layer_is_refused(sizes):
    with pytest.raises(ValueError, match="drop=64 must be from 1 to 63"):
        forecast(sizes, machine("h100"), drop=64)


MEASURED = """
import resource, sys, torch, e3pruner
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig.from_pretrained(sys.argv[1])).to(torch.float32).eval()
tokens = torch.randint(3, 1000, (16, 256))
if sys.argv[2] == "search":
    e3pruner.search(model, tokens.split(4), 2, "leave-one-out", precision="fp32", progress=False)
else:
    student = e3pruner.prune(model, [0, 1, 2, 3, 4, 5])
    e3pruner.distill(student, teacher=model, data=tokens, steps=2, batch_size=4, precision="bf16")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["search", "distill"])
@pytest.mark.parametrize("width", [512, 1024])
def test_memory_is_what_a_process_takes(tmp_path, stage, width):
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=32_000,
        dtype="float32",
    )
    config.save_pretrained(tmp_path)
    here = Machine("here", 1e12, 1e12, 1e11, measured=True)
    expected = by_name(forecast(Sizes.of(empty_model(config)), here, drop=2))[stage, "whole"].memory
    command = [sys.executable, "-c", MEASURED, str(tmp_path), stage]
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert measured == pytest.approx(expected, rel=0.15)


def test_this_machine_is_measured():
    here = machine()
    assert here.measured
    assert 0 < here.flops < 1e16
    assert here.memory > torch.tensor(1.0).nbytes
