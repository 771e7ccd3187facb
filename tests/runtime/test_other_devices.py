"""The runtime on a device whose memory the host cannot read: the text is the CPU's, and only token ids cross."""

import copy

import pytest
import torch
from runtime.fake_device import FakeDevice, move
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokens

pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built: python -m e3kernels.info says why")

from e3pruner.runtime import layer_description
from e3pruner.runtime.layer_skip import LayerSkipRuntime

NEW = 12
OPTIONS = [
    {},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 6, "eos_token_id": [3, 9]},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7, "repetition_penalty": 1.2},
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def device(monkeypatch):
    """A fake device, whose weights the runtime takes although they are meta tensors."""
    monkeypatch.setattr(layer_description, "plain_weight", lambda name, parameter: parameter)
    with FakeDevice() as fake:
        yield fake


def models():
    """One model twice: on the CPU, and to be moved."""
    model = tiny_model("llama", tie_word_embeddings=False)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_text_is_that_of_the_cpu_and_only_token_ids_cross(device, options, batch):
    here, there = models()
    ids = tiny_tokens(batch=batch, length=9)
    expected = LayerSkipRuntime(here).generate(ids, max_new_tokens=NEW, **options)
    runtime = LayerSkipRuntime(move(there))
    device.to_host.clear()
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW, **options), expected)
    assert len(device.to_host) <= NEW  # one wait for the device per token
    assert max(device.to_host) <= 2 * batch  # ids, and the logits that say whether they are numbers


@pytest.mark.parametrize("options", OPTIONS)
def test_drafts_are_chosen_and_verified_on_the_device(device, options):
    here, there = models()
    ids = tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(here)
    expected = runtime.generate(ids, max_new_tokens=NEW, draft_keep=[0, 2, 3], **options)
    other = LayerSkipRuntime(move(there))
    device.to_host.clear()
    assert torch.equal(other.generate(ids, max_new_tokens=NEW, draft_keep=[0, 2, 3], **options), expected)
    assert other.speculation.accepted == runtime.speculation.accepted
    assert max(device.to_host) < VOCAB_SIZE / 4
