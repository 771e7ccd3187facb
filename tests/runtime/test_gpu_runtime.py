"""The runtime on a real GPU against Hugging Face in fp64: `make gpu`. Never run on one yet; see README.md.

E3_TEST_DEVICE=cpu runs the same on the CPU's path, to rehearse the tests.
"""

import copy
import os
import threading

import pytest
import torch
from tiny_models import NUM_LAYERS, VOCAB_SIZE, tiny_model, tiny_tokens

pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built: python -m e3kernels.info says why")

from e3pruner.runtime.decoder_description import SUPPORTED
from e3pruner.runtime.layer_skip import LayerSkipRuntime
from e3pruner.surgery import prune

DEVICE = os.environ.get("E3_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
ERROR = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}  # of the largest logit


def on_device(model_type, dtype=torch.float32, **changes):
    model = tiny_model(model_type, **{"tie_word_embeddings": False, "max_position_embeddings": 4096} | changes)
    return model.to(DEVICE, dtype).eval()


@torch.no_grad()
def exact_logits(model, ids, **options):
    return copy.deepcopy(model).double()(ids.to(DEVICE), use_cache=False, **options).logits


def runtime_logits(runtime, ids, chunks, attention_mask=None):
    """All logits, by chunks of the given lengths through the cache."""
    cache = runtime.new_cache(ids.shape[0], attention_mask)
    return torch.cat([runtime.append(cache, part, part.shape[1]) for part in ids.split(chunks, dim=1)], 1)


def assert_close(actual, exact, dtype):
    assert actual.device.type == torch.device(DEVICE).type
    assert (actual.double() - exact).abs().max() <= ERROR[dtype] * exact.abs().max()


def test_the_graph_serves_this_device():
    path = LayerSkipRuntime(on_device("llama")).path
    assert path == "fused CPU kernels" if DEVICE == "cpu" else path.startswith("CUDA graph: "), path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_tokens_one_by_one_and_in_chunks(model_type, dtype):
    model, ids = on_device(model_type, dtype), tiny_tokens(batch=1, length=24)
    runtime, exact = LayerSkipRuntime(model), exact_logits(model, ids)
    for chunks in ([1] * 24, [3] * 8, [17, 1, 1, 5]):
        assert_close(runtime_logits(runtime, ids, chunks), exact, dtype)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_left_padded_batch(model_type):
    model, ids = on_device(model_type), tiny_tokens(batch=4, length=12)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :7] = 0
    exact = exact_logits(model, ids, attention_mask=mask.to(DEVICE))
    actual = runtime_logits(LayerSkipRuntime(model), ids, [8, 2, 1, 1], mask)
    for row in range(4):
        seen = mask[row].bool()
        assert_close(actual[row, seen], exact[row, seen], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_context(dtype):
    model, ids = on_device("llama", dtype, num_key_value_heads=1), torch.randint(VOCAB_SIZE, (1, 2056))
    actual = runtime_logits(LayerSkipRuntime(model), ids, [2046, 2, *[1] * 8])
    assert_close(actual[:, -16:], exact_logits(model, ids)[:, -16:], dtype)


def test_another_mask_takes_effect_with_the_next_request():
    model, ids = on_device("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    for keep in ([0, 2, 5], list(range(NUM_LAYERS)), [1, 3], [0, 2, 5]):
        runtime.keep = keep
        assert_close(runtime_logits(runtime, ids, [4, *[1] * 5]), exact_logits(prune(model, keep), ids), torch.float32)
    runtime.keep = {"attention": [0, 1], "mlp": [1, 4]}
    assert runtime_logits(runtime, ids, [4, *[1] * 5]).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2, "no_repeat_ngram_size": 4}])
@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_text_is_hugging_faces(batch, options):
    model, ids = on_device("qwen3"), tiny_tokens(batch=batch, length=9).to(DEVICE)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False} | options
    expected = model.generate(ids, **given)
    assert torch.equal(LayerSkipRuntime(model).generate(ids, max_new_tokens=24, **options), expected)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9, "top_k": 30}])
def test_drafts(options):
    model, ids = on_device("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    text = runtime.generate(ids, max_new_tokens=40, draft_keep=[0, 1, 3, 5], **options)
    assert runtime.speculation.verifications > 0
    if not options:
        assert torch.equal(text, runtime.generate(ids, max_new_tokens=40))
    else:
        assert torch.equal(text, runtime.generate(ids, max_new_tokens=40, draft_keep=[0, 1, 3, 5], **options))


def test_samples_depend_on_the_seed_alone():
    runtime, ids = LayerSkipRuntime(on_device("llama")), tiny_tokens(batch=3, length=9)
    one, again, other = (
        runtime.generate(ids, max_new_tokens=30, do_sample=True, top_p=0.95, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_threads_on_streams_of_their_own_do_not_meet():
    model = on_device("llama")
    runtime = LayerSkipRuntime(model)
    prompts = [tiny_tokens(batch=1, length=5 + i) for i in range(4)]
    expected = [runtime.generate(ids, max_new_tokens=48) for ids in prompts]
    found = [None] * len(prompts)

    def work(i):
        if DEVICE == "cpu":
            found[i] = runtime.generate(prompts[i], max_new_tokens=48)
            return
        with torch.cuda.stream(torch.cuda.Stream()):
            found[i] = runtime.generate(prompts[i], max_new_tokens=48)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
