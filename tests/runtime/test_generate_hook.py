"""model.generate(custom_generate=runtime): every option decodes the pruned model's text or is refused by name."""

import inspect
import re
import threading

import pytest
import torch
import transformers
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokens
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import candidate_generator, logits_process, stopping_criteria, streamers, watermarking
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built: python -m e3kernels.info says why")

from e3pruner.compat import CACHE
from e3pruner.runtime import LayerSkipRuntime
from e3pruner.surgery import prune

NEW = 12
KEEP = [0, 2, 3]

pytestmark = pytest.mark.usefixtures("one_thread")


def hugging_face(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(ids, **options)


@pytest.fixture
def setting():
    """A model, its runtime with half of the layers, the model without the other half, and a prompt."""
    # A tied head would repeat one token.
    model, ids = tiny_model("gemma2", tie_word_embeddings=False), tiny_tokens(batch=1, length=9)
    runtime, pruned = LayerSkipRuntime(model, KEEP), prune(model, KEEP)
    texts = [hugging_face(network, ids)[0, 9:] for network in (model, pruned)]
    assert not torch.equal(*texts)
    assert len(set(texts[1].tolist())) > 5
    return model, runtime, pruned, ids


def assert_the_pruned_models(setting, **options):
    model, runtime, pruned, ids = setting
    actual = hugging_face(model, ids, custom_generate=runtime, **options)
    assert torch.equal(actual, hugging_face(pruned, ids, **options))
    return actual


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [None, 4])
def test_guidance_runs_the_kept_layers(setting, negative, use_cache):
    options = {"guidance_scale": 2.5, "use_cache": use_cache}
    if negative:
        options["negative_prompt_ids"] = tiny_tokens(batch=1, length=negative, seed=5)
    guided = assert_the_pruned_models(setting, **options)
    assert not torch.equal(guided, hugging_face(setting[2], setting[3]))


def test_guidance_of_a_padded_batch_with_a_padded_negative_prompt(setting):
    model, runtime, pruned, _ = setting
    ids, negative = tiny_tokens(batch=2, length=9), tiny_tokens(batch=2, length=5, seed=5)
    masks = {"attention_mask": torch.ones_like(ids), "negative_prompt_attention_mask": torch.ones_like(negative)}
    masks["attention_mask"][0, :3] = 0
    masks["negative_prompt_attention_mask"][1, :2] = 0
    options = {"guidance_scale": 1.5, "negative_prompt_ids": negative, "pad_token_id": 0} | masks
    expected = hugging_face(pruned, ids, **options)
    assert torch.equal(hugging_face(model, ids, custom_generate=runtime, **options), expected)


def test_a_processor_that_holds_the_model_is_served_and_given_back_as_it_was(setting):
    model, runtime, pruned, ids = setting
    own = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.5, model)
    actual = hugging_face(model, ids, custom_generate=runtime, logits_processor=[own])
    assert own.model is model
    expected = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.5, pruned)
    assert torch.equal(actual, hugging_face(pruned, ids, logits_processor=[expected]))


class Confident(StoppingCriteria):
    """Stops where `model` itself is sure, by a call of it: it may be held by an attribute or by a closure."""

    def __init__(self, model, hide=False):
        self.network = (lambda *args, **kwargs: model(*args, **kwargs)) if hide else model
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        logits = self.network(input_ids, use_cache=False).logits[:, -1]
        self.seen.append(logits.argmax(-1))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_stopping_criterion_that_holds_the_model_sees_the_kept_layers(setting):
    model, runtime, pruned, ids = setting
    criterion = Confident(model)
    text = hugging_face(model, ids, custom_generate=runtime, stopping_criteria=[criterion])
    assert torch.equal(text, hugging_face(pruned, ids))
    assert torch.equal(torch.stack(criterion.seen[:-1])[:, 0], text[0, 10:])  # what it saw is what came next


class Caller(LogitsProcessor):
    def __init__(self, call):
        self.call = call

    def __call__(self, input_ids, scores):
        self.call(input_ids)
        return scores


class CallingStreamer(BaseStreamer):
    def __init__(self, call):
        self.call = call

    def put(self, value):
        if value.dim() == 1:  # not the prompt, which `generate` hands over before the runtime has begun
            self.call(value.view(1, -1))

    def end(self):
        pass


@pytest.mark.parametrize("part", ["model", "body"])
@pytest.mark.parametrize("place", ["logits_processor", "stopping_criteria", "streamer", "prefix_allowed_tokens_fn"])
def test_other_calls_of_the_model_are_refused(setting, place, part):
    model, runtime, _, ids = setting
    network = model if part == "model" else model.model

    def call(tokens):
        network(tokens)

    value = {
        "logits_processor": [Caller(call)],
        "stopping_criteria": [Confident(model, hide=True)],
        "streamer": CallingStreamer(call),
        "prefix_allowed_tokens_fn": lambda batch, tokens: [call(tokens[None]), 1][1:],
    }[place]
    with pytest.raises(RuntimeError, match="the model was called while"):
        hugging_face(model, ids, custom_generate=runtime, **{place: value})
    model(ids)  # the guard has gone with the request
    assert torch.equal(hugging_face(model, ids, custom_generate=runtime), hugging_face(setting[2], ids))


def test_another_thread_may_call_the_model_meanwhile(setting):
    model, runtime, pruned, ids = setting
    found = []

    def call_elsewhere(tokens):
        thread = threading.Thread(target=lambda: found.append(hugging_face(model, ids)))
        thread.start()
        thread.join()

    expected = hugging_face(model, ids)
    processor = Caller(call_elsewhere)
    text = hugging_face(model, ids, custom_generate=runtime, logits_processor=[processor], max_new_tokens=2)
    assert torch.equal(text, hugging_face(pruned, ids, max_new_tokens=2))
    assert len(found) == 2
    assert all(torch.equal(other, expected) for other in found)


@pytest.mark.parametrize("own_loop", [True, False])
def test_a_request_may_run_inside_another(setting, own_loop):
    model, runtime, pruned, ids = setting
    inner = []

    def nested(_):
        inner.append(
            runtime.generate(ids, max_new_tokens=3, draft_keep=[0])
            if own_loop
            else hugging_face(model, ids, custom_generate=runtime, max_new_tokens=3)
        )

    expected = hugging_face(pruned, ids)
    streamer = CallingStreamer(nested)
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW, streamer=streamer), expected)
    assert torch.equal(hugging_face(model, ids, custom_generate=runtime, streamer=streamer), expected)
    assert len(inner) == 2 * NEW
    assert all(torch.equal(text, expected[:, :12]) for text in inner)


def test_requests_of_two_threads_do_not_mix(setting):
    model, runtime, pruned, _ = setting
    prompts = [tiny_tokens(batch=1, length=9, seed=seed) for seed in range(4)]
    expected = [hugging_face(pruned, ids) for ids in prompts]
    found = {}

    def run(index):
        ids = prompts[index]
        if index % 2:
            found[index] = hugging_face(model, ids, custom_generate=runtime)
        else:
            found[index] = runtime.generate(ids, max_new_tokens=NEW)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(4))
    runtime.keep = None  # no request is left


class Setter(BaseStreamer):
    """Sets `keep` at the call that `when` says."""

    def __init__(self, runtime, when):
        self.runtime, self.when = runtime, when

    def put(self, value):
        if (self.when == "prompt") == (value.dim() == 2):
            self.set_keep()

    def end(self):
        self.set_keep()

    def set_keep(self):
        self.runtime.keep = [0]


@pytest.mark.parametrize("when", ["prompt", "token", "end"])
def test_a_streamer_cannot_change_the_layers_of_its_request(setting, when):
    _, runtime, _, ids = setting
    streamer = Setter(runtime, when)
    streamer.put = streamer.put if when != "end" else lambda value: None
    with pytest.raises(RuntimeError, match="while a request of this runtime runs"):
        runtime.generate(ids, max_new_tokens=NEW, streamer=streamer)
    assert runtime.keep == KEEP
    runtime.keep = [0]


def test_a_request_of_hugging_faces_generation_begins_after_its_prompt_was_streamed(setting):
    model, runtime, _, ids = setting
    with pytest.raises(RuntimeError, match="while a request of this runtime runs"):
        hugging_face(model, ids, custom_generate=runtime, streamer=Setter(runtime, "token"))
    assert runtime.keep == KEEP
    streamer = Setter(runtime, "prompt")
    streamer.end = lambda: None
    text = hugging_face(model, ids, custom_generate=runtime, streamer=streamer)
    assert torch.equal(text, hugging_face(prune(model, [0]), ids))


@pytest.mark.parametrize("chunk", [1, 3, 4, 20])
@pytest.mark.parametrize("padded", ["one row", "all rows"])
def test_a_prompt_in_chunks_may_have_chunks_of_padding(setting, padded, chunk):
    model, runtime, pruned, _ = setting
    ids = torch.cat([torch.zeros(2, 5, dtype=torch.long), tiny_tokens(batch=2, length=20)], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    if padded == "all rows":
        mask[1, :5] = 0
    options = {"attention_mask": mask, "pad_token_id": 0, "prefill_chunk_size": chunk}
    actual = hugging_face(model, ids, custom_generate=runtime, **options)
    assert torch.equal(actual, hugging_face(pruned, ids, **options))
    whole = hugging_face(model, ids, custom_generate=runtime, **options | {"prefill_chunk_size": None})
    assert torch.equal(actual, whole)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "repetition_penalty": 1.3},
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 2, "guidance_scale": 1.5},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 5, "eos_token_id": list(range(3, 60)), "pad_token_id": 0},
        {"sequence_bias": {(5,): 4.0, (7, 8): -9.0}},
        {"bad_words_ids": [[5], [7, 8]]},
        {"suppress_tokens": list(range(40))},
        {"begin_suppress_tokens": list(range(40))},
        {"forced_eos_token_id": 7},
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
        {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": 7, "pad_token_id": 0},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"watermarking_config": {"greenlist_ratio": 0.3, "bias": 4.0}},
        {"max_time": 60.0},
        {"cache_implementation": "dynamic"},
        {"return_dict_in_generate": False, "disable_compile": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_that_are_hugging_faces_own_decode_the_pruned_models_text(setting, options):
    assert_the_pruned_models(setting, **options)


def test_an_assistant_drafts_for_the_kept_layers(setting):
    model, runtime, pruned, ids = setting
    assistant, calls = prune(model, [0, 2]), []
    try:
        hugging_face(pruned, ids, assistant_model=assistant)
    except RuntimeError as error:
        pytest.skip(f"transformers {transformers.__version__} itself cannot draft with a shorter model: {error}")
    assistant.register_forward_hook(lambda *_: calls.append(1))
    text = hugging_face(model, ids, custom_generate=runtime, assistant_model=assistant)
    assert torch.equal(text, hugging_face(pruned, ids))
    assert calls


def test_stop_strings_are_a_stopping_criterion(setting):
    """transformers does not hand the tokenizer on to a callable."""
    model, runtime, pruned, ids = setting
    vocabulary = {chr(ord("!") + token): token for token in range(VOCAB_SIZE)}
    letters = Tokenizer(WordLevel(vocabulary, unk_token="!"))
    letters.pre_tokenizer, letters.decoder = Split("", "isolated"), Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    full = hugging_face(pruned, ids)
    stop = "".join(chr(ord("!") + token) for token in full[0, 12:15].tolist())
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    text = hugging_face(model, ids, custom_generate=runtime, stopping_criteria=criteria)
    assert torch.equal(text, full[:, :15])
    with pytest.raises(ValueError, match="tokenizer"):
        hugging_face(model, ids, custom_generate=runtime, stop_strings=stop, tokenizer=tokenizer)


def test_a_model_that_was_loaded_with_a_device_map_is_taken(setting, tmp_path):
    pytest.importorskip("accelerate")
    model, runtime, _, ids = setting
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    text = LayerSkipRuntime(loaded, KEEP).generate(ids, max_new_tokens=NEW)
    assert torch.equal(text, runtime.generate(ids, max_new_tokens=NEW))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_early_exit": 2}, "assistant_early_exit is 2; .*draft_keep"),
        ({"use_mtp": True}, "use_mtp is True"),
        ({"speculation_type": "dflash"}, "speculation_type is 'dflash'"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is True"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is True"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive_search"),
        ({"dola_layers": "low"}, "dola_generation"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group_beam_search"),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained_beam_search"),
        ({"synced_gpus": True}, "synced_gpus is set"),
        ({"token_healing": True, "tokenizer": object()}, "token healing"),
        ({"assistant_model": "itself"}, "assistant_model is the runtime's own model"),
        ({"assistant_model": "other words"}, f"vocabulary of 120, the model one of {VOCAB_SIZE}"),
        ({"cache": "empty"}, f"{CACHE} was given"),
        ({"inputs_embeds": "of the prompt"}, "inputs_embeds"),
        ({"attention_mask": torch.full((1, 9), 2)}, "attention_mask holds 2; it must hold 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_runtime_cannot_do_is_refused_by_name(setting, options, message):
    model, runtime, _, ids = setting
    options = dict(options)
    if options.get("assistant_model") == "itself":
        options["assistant_model"] = model
    elif "assistant_model" in options:
        options["assistant_model"] = tiny_model("gemma2", vocab_size=120)
    if "cache" in options:
        options[CACHE] = DynamicCache(config=model.config)
        options.pop("cache") if CACHE != "cache" else None
    if "inputs_embeds" in options:
        options["inputs_embeds"] = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=message):
        hugging_face(model, ids, custom_generate=runtime, **options)
    assert model.config.num_hidden_layers == 6
    assert torch.equal(hugging_face(model, ids, custom_generate=runtime), hugging_face(setting[2], ids))


# The parts of transformers that call a model while it generates, and what becomes of them on the runtime.
KNOWN_CALLERS = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",  # served
    "WhisperNoSpeechDetection",  # of speech models, which the runtime does not take
    "AssistedCandidateGenerator",  # served: another model; refused: the model itself
    "AssistedCandidateGeneratorDifferentTokenizers",  # refused: another vocabulary
    "UniversalSpeculativeDecodingGenerator",  # the same
    "EarlyExitCandidateGenerator",  # refused: assistant_early_exit
    "SinglePositionMultiTokenCandidateGenerator",  # for Gemma 4's assistants, refused by transformers
    "MTPCandidateGenerator",  # refused: use_mtp
    "DFlashTokenCandidateGenerator",  # refused: speculation_type
    "AssistantToTargetTranslator",  # with another vocabulary
    "AssistantVocabTranslatorCache",
    "BayesianDetectorModel",  # detects watermarks in a text that is there
    "WatermarkDetector",
    "SynthIDTextWatermarkDetector",
}


def test_every_part_of_transformers_that_calls_a_model_is_known():
    modules = [logits_process, candidate_generator, stopping_criteria, streamers, watermarking]
    calling = {
        name
        for module in modules
        for name, kind in vars(module).items()
        if inspect.isclass(kind)
        and kind.__module__ == module.__name__
        and re.search(r"\bself\.\w*model\w*(\.generate)?\(|\bmodel\(|assistant_model", inspect.getsource(kind))
    }
    assert "UnbatchedClassifierFreeGuidanceLogitsProcessor" in calling
    assert calling <= KNOWN_CALLERS


def test_generate_calls_the_model_itself_before_the_hook_only_to_heal_tokens():
    """Which needs the tokenizer that `generate` does not hand on to a callable: refused by transformers."""
    source = inspect.getsource(inspect.unwrap(GenerationMixin.generate))
    before_the_hook = source[source.index("# 1. Handle") : source.index("# 9. Call generation mode")]
    calls = re.findall(r"\bself(?:\.(generate|forward|__call__|heal_tokens))?\(", before_the_hook)
    assert set(calls) <= {"heal_tokens"}


def test_defaults_of_generation_configs_are_no_options():
    """A model's own configuration, as it comes from a hub, does not make the hook refuse."""
    model, ids = tiny_model("llama"), tiny_tokens(batch=1, length=9)
    model.generation_config = GenerationConfig(
        **GenerationConfig._get_default_generation_params() | {"max_length": None, "min_length": None}
    )
    text = hugging_face(model, ids, custom_generate=LayerSkipRuntime(model))
    assert torch.equal(text, hugging_face(model, ids))
