"""Generation by the compiled runtime: its own loop, self-speculation, and Hugging Face's machinery on top of it."""

import itertools

import pytest
import torch
from tiny_models import NUM_LAYERS, VOCAB_SIZE, tiny_model, tiny_tokens
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built: python -m e3kernels.info says why")

from e3pruner.runtime.decoder_description import SUPPORTED
from e3pruner.runtime.layer_skip import LayerSkipRuntime
from e3pruner.surgery import prune

NEW = 24
DRAWS = 1200


pytestmark = pytest.mark.usefixtures("one_thread")


def lively_model(model_type, **changes):
    """A tied head makes a tiny random model repeat one token, whatever is wrong with it."""
    if model_type == "gemma4_text":  # whose own forward pass fails with shared keys and no embeddings of the layers
        changes = {"num_kv_shared_layers": 0} | changes
    return tiny_model(model_type, **{"tie_word_embeddings": False} | changes)


def hugging_face(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(ids, **options)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_greedy_text_is_hugging_faces(model_type):
    model, ids = lively_model(model_type), tiny_tokens(batch=3, length=9)
    actual = LayerSkipRuntime(model).generate(ids, max_new_tokens=NEW)
    assert torch.equal(actual, hugging_face(model, ids))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_long_greedy_texts_are_hugging_faces(model_type):
    """20 prompts, 256 new tokens, in batches that the fused path takes."""
    model, ids = lively_model(model_type, max_position_embeddings=300), tiny_tokens(batch=20, length=16)
    runtime = LayerSkipRuntime(model)
    for prompts in ids.split(10):
        assert torch.equal(
            runtime.generate(prompts, max_new_tokens=256), hugging_face(model, prompts, max_new_tokens=256)
        )


def test_a_left_padded_batch_gives_every_row_its_own_text():
    model = lively_model("gemma3_text")
    rows = [tiny_tokens(batch=1, length=length, seed=length) for length in (3, 9, 6)]
    ids = torch.cat([torch.cat([torch.zeros(1, 9 - row.shape[1], dtype=torch.long), row], dim=1) for row in rows])
    mask = (ids != 0).long()
    actual = LayerSkipRuntime(model).generate(ids, attention_mask=mask, max_new_tokens=NEW)
    for row, text in zip(rows, actual, strict=True):
        assert torch.equal(text[9 - row.shape[1] :], hugging_face(model, row)[0])


def test_keep_generates_the_pruned_models_text():
    model, ids = lively_model("smollm3"), tiny_tokens(length=9)
    runtime = LayerSkipRuntime(model, keep=[0, 2, 3])
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW), hugging_face(prune(model, [0, 2, 3]), ids))


def test_repetition_penalty_and_end_of_sequence_are_hugging_faces():
    model, ids = lively_model("llama"), tiny_tokens(batch=4, length=9)
    runtime = LayerSkipRuntime(model)
    penalised = {"repetition_penalty": 1.7}
    expected = hugging_face(model, ids, **penalised)
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW, **penalised), expected)
    assert not torch.equal(expected, hugging_face(model, ids))
    eos = [int(expected[0, 14]), int(expected[1, 20])]
    options = penalised | {"eos_token_id": eos, "pad_token_id": 0}
    ended = runtime.generate(ids, max_new_tokens=NEW, **options)
    assert torch.equal(ended, hugging_face(model, ids, **options))
    assert (ended == 0).any()


def counts_of(draw, draws=DRAWS):
    counts = torch.zeros(VOCAB_SIZE)
    for seed in range(draws):
        counts[draw(seed)] += 1
    return counts


def assert_drawn_from(counts, probabilities):
    """Pearson's χ² over the tokens with at least five expected draws, the others pooled; five standard deviations."""
    assert (counts[probabilities == 0] == 0).all()
    expected = probabilities.double() * counts.sum()
    frequent = expected >= 5
    cells = torch.cat([counts[frequent].double(), counts[~frequent].sum()[None].double()])
    wanted = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    cells, wanted = cells[wanted > 0], wanted[wanted > 0]
    statistic = ((cells - wanted).square() / wanted).sum()
    freedom = len(cells) - 1
    assert statistic <= freedom + 5 * (2 * freedom) ** 0.5 + 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3},
    ],
)
def test_samples_follow_hugging_faces_distribution(options):
    model, ids = lively_model("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    warped = {"top_k": 0, "temperature": 1.0, "top_p": 1.0} | options
    scores = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        **warped,
    ).scores[0]
    counts = counts_of(
        lambda seed: runtime.generate(ids, max_new_tokens=1, do_sample=True, seed=seed, **options)[0, -1]
    )
    assert_drawn_from(counts, scores[0].softmax(-1))


def test_samples_depend_on_the_seed_alone():
    runtime, ids = LayerSkipRuntime(lively_model("llama")), tiny_tokens(batch=2, length=9)

    def sample(seed):
        return runtime.generate(ids, max_new_tokens=NEW, do_sample=True, seed=seed)

    torch.manual_seed(1)
    first = sample(3)
    torch.manual_seed(2)
    assert torch.equal(sample(3), first)
    assert not torch.equal(sample(4), first)
    assert not torch.equal(first[0, 9:], first[1, 9:])


@pytest.mark.parametrize("draft_keep", [[0], [0, 1, 2, 3, 5], list(range(NUM_LAYERS)), {"attention": [0], "mlp": [1]}])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mistral"])
def test_speculative_greedy_text_is_identical(model_type, draft_keep):
    model, ids = lively_model(model_type), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    for new in (1, 2, NEW):
        plain = runtime.generate(ids, max_new_tokens=new)
        assert torch.equal(runtime.generate(ids, max_new_tokens=new, draft_keep=draft_keep), plain)
    counts = runtime.speculation
    assert 0 <= counts.accepted <= counts.drafted
    assert counts.drafted > 0
    assert counts.accepted + counts.verifications >= NEW - 1
    if draft_keep == list(range(NUM_LAYERS)):
        assert counts.accepted == counts.drafted


def test_speculation_stops_where_plain_decoding_stops():
    model, ids = lively_model("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    eos = int(runtime.generate(ids, max_new_tokens=NEW)[0, 15])
    plain = runtime.generate(ids, max_new_tokens=NEW, eos_token_id=eos, repetition_penalty=1.2)
    drafted = runtime.generate(
        ids, max_new_tokens=NEW, eos_token_id=eos, repetition_penalty=1.2, draft_keep=[0, 1, 2, 3, 4]
    )
    assert torch.equal(drafted, plain)
    full = tiny_tokens(batch=1, length=40)
    plain = runtime.generate(full, max_new_tokens=25)  # to the last of the model's 64 positions
    assert torch.equal(runtime.generate(full, max_new_tokens=25, draft_keep=list(range(NUM_LAYERS))), plain)


def test_speculative_samples_are_distributed_as_plain_ones():
    """The third new token, summed over the two before it: drafted, accepted, replaced and bonus tokens all occur."""
    model, ids = lively_model("llama"), tiny_tokens(batch=1, length=5)
    runtime = LayerSkipRuntime(model)
    options = {"do_sample": True, "top_k": 3, "temperature": 1.5}
    distribution = torch.zeros(VOCAB_SIZE)
    for path in itertools.product(range(3), repeat=2):
        sequence, weight = ids, 1.0
        for choice in (*path, None):
            cache = runtime.new_cache(1)
            values, tokens = (runtime.append(cache, sequence)[0, -1] / options["temperature"]).topk(3)
            shares = values.softmax(-1)
            if choice is None:
                distribution[tokens] += weight * shares
            else:
                weight *= float(shares[choice])
                sequence = torch.cat([sequence, tokens[choice].view(1, 1)], dim=1)
    accepted = []

    def draw(seed):
        text = runtime.generate(ids, max_new_tokens=3, seed=seed, draft_keep=[0, 1, 2, 5], **options)
        accepted.append(runtime.speculation.accepted)
        return text[0, -1]

    assert_drawn_from(counts_of(draw), distribution)
    assert {0, 1} <= set(accepted)


class Letters:
    """A tokenizer that a streamer or a stop string can use: one letter a token."""

    @staticmethod
    def decode(ids, **_):
        return "".join(chr(ord("!") + int(i) % 90) for i in (ids if hasattr(ids, "__iter__") else [ids]))


class Recorder(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("draft_keep", [None, [0, 1, 2, 3]])
def test_a_streamer_sees_every_token(draft_keep):
    runtime, ids = LayerSkipRuntime(lively_model("llama")), tiny_tokens(batch=1, length=9)
    recorder = Recorder()
    text = runtime.generate(ids, max_new_tokens=NEW, streamer=recorder, draft_keep=draft_keep)
    assert recorder.ended
    assert len(recorder.parts) == 1 + NEW
    assert list(itertools.chain(*recorder.parts)) == text[0].tolist()


@pytest.mark.parametrize("draft_keep", [None, [0, 1, 2, 3]])
def test_stop_strings_end_a_sequence(draft_keep):
    runtime, ids = LayerSkipRuntime(lively_model("llama")), tiny_tokens(batch=1, length=9)
    full = runtime.generate(ids, max_new_tokens=NEW)
    text = Letters.decode(full[0, 9:])
    stop = text[10:13]
    end = 9 + text.index(stop) + len(stop)
    stopped = runtime.generate(
        ids, max_new_tokens=NEW, stop_strings=["no such text", stop], tokenizer=Letters(), draft_keep=draft_keep
    )
    assert torch.equal(stopped, full[:, :end])


def test_one_row_stops_while_others_go_on():
    runtime, ids = LayerSkipRuntime(lively_model("llama")), tiny_tokens(batch=2, length=9)
    full = runtime.generate(ids, max_new_tokens=NEW)
    texts = [Letters.decode(row[9:]) for row in full]
    stop = texts[0][:5]
    assert stop not in texts[1]
    stopped = runtime.generate(ids, max_new_tokens=NEW, stop_strings=stop, tokenizer=Letters(), pad_token_id=0)
    assert torch.equal(stopped[0, : 9 + 5], full[0, : 9 + 5])
    assert (stopped[0, 9 + 5 :] == 0).all()
    assert torch.equal(stopped[1], full[1])


def test_keep_cannot_change_during_a_request():
    runtime, ids = LayerSkipRuntime(lively_model("llama")), tiny_tokens(batch=1, length=9)

    class Meddler(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.parts) == 3:
                runtime.keep = [0]

    with pytest.raises(RuntimeError, match="while a request of this runtime runs"):
        runtime.generate(ids, max_new_tokens=NEW, streamer=Meddler())
    runtime.keep = [0, 1]
    assert runtime.generate(ids, max_new_tokens=NEW).shape == (1, 9 + NEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 57}, "exceed the model's 64"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"do_sample": True, "top_p": 0.0}, "top_p is 0"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"stop_strings": "x"}, "needs tokenizer"),
        ({"stop_strings": "", "tokenizer": Letters()}, "empty string"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        ({"draft_keep": []}, "keep is empty"),
        ({"draft_keep": [5]}, "draft_keep has layer 5"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    runtime = LayerSkipRuntime(lively_model("llama"), keep=[0, 1, 2])
    with pytest.raises(ValueError, match=message):
        runtime.generate(tiny_tokens(batch=1, length=9), **{"max_new_tokens": 4} | options)


def test_speculation_and_streaming_take_one_sequence():
    runtime, ids = LayerSkipRuntime(lively_model("llama")), tiny_tokens(batch=2, length=9)
    with pytest.raises(ValueError, match="speculative decoding takes one sequence, not 2"):
        runtime.generate(ids, max_new_tokens=4, draft_keep=[0])
    with pytest.raises(ValueError, match="streamer takes one sequence"):
        runtime.generate(ids, max_new_tokens=4, streamer=Recorder())


@pytest.mark.parametrize("part", ["model.norm.weight", "lm_head.weight"])
def test_logits_that_are_not_finite_stop_the_request(part):
    """All of them, or that of one token of the vocabulary."""
    model, ids = lively_model("llama"), tiny_tokens(batch=1, length=9)
    runtime = LayerSkipRuntime(model)
    with torch.no_grad():
        weight = model.get_parameter(part)
        unused = max(set(range(VOCAB_SIZE)) - set(ids.flatten().tolist()))
        weight[unused if weight.shape[0] == VOCAB_SIZE else slice(None)] = float("nan")
    for options in ({}, {"do_sample": True}, {"draft_keep": [0]}):
        with pytest.raises(RuntimeError, match="not finite"):
            runtime.generate(ids, max_new_tokens=4, **options)


def test_the_largest_logit_of_a_large_vocabulary_is_taken_and_the_first_of_equals():
    model, ids = lively_model("llama", vocab_size=10_001), tiny_tokens(batch=2, length=9)
    runtime = LayerSkipRuntime(model)
    text = runtime.generate(ids, max_new_tokens=NEW)
    assert torch.equal(text, hugging_face(model, ids))
    assert text.max() > 8192
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[:1].clone()
    assert (runtime.generate(ids, max_new_tokens=4)[:, 9:] == 0).all()


class Ban(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] = -torch.inf
        return scores


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"no_repeat_ngram_size": 2},
        {"logits_processor": "ban"},
        {"output_logits": True, "return_dict_in_generate": True},
        {"use_cache": False},
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_hugging_faces_generation_runs_on_the_runtime(model_type, options):
    model = lively_model(model_type)
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), tiny_tokens(batch=1, length=6)], dim=1)
    ids = torch.cat([ids, tiny_tokens(batch=1, length=9, seed=4)])
    options = {"attention_mask": (ids != 0).long()} | options
    if options.get("logits_processor"):
        options["logits_processor"] = LogitsProcessorList([Ban(int(hugging_face(model, ids)[1, 12]))])
    expected = hugging_face(model, ids, **options)
    actual = hugging_face(model, ids, custom_generate=LayerSkipRuntime(model), **options)
    if "return_dict_in_generate" in options:
        torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
        actual, expected = actual.sequences, expected.sequences
    assert torch.equal(actual, expected)


def test_hugging_faces_generation_respects_keep_and_streams():
    model, ids = lively_model("llama"), tiny_tokens(batch=1, length=9)
    recorder = Recorder()
    text = hugging_face(model, ids, custom_generate=LayerSkipRuntime(model, keep=[0, 3]), streamer=recorder)
    assert torch.equal(text, hugging_face(prune(model, [0, 3]), ids))
    assert list(itertools.chain(*recorder.parts)) == text[0].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"position_ids": torch.arange(5, 14)[None]}, "position_ids must count"),
    ],
)
def test_what_the_runtime_cannot_compute_is_refused_in_hugging_faces_generation(options, message):
    model, ids = lively_model("llama"), tiny_tokens(batch=1, length=9)
    with pytest.raises(ValueError, match=message):
        hugging_face(model, ids, custom_generate=LayerSkipRuntime(model), **options)
    with pytest.raises(ValueError, match="another model"):
        hugging_face(lively_model("llama"), ids, custom_generate=LayerSkipRuntime(model))


def test_memory_does_not_grow_with_tokens():
    """Cache and scratch of a request are allocated once; many requests leave nothing behind."""
    resource = pytest.importorskip("resource")
    model = lively_model("llama", max_position_embeddings=600)
    runtime, ids = LayerSkipRuntime(model), tiny_tokens(batch=1, length=9)
    runtime.generate(ids, max_new_tokens=500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(20):
        runtime.generate(ids, max_new_tokens=500, do_sample=True, seed=seed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB, over 10,000 tokens
