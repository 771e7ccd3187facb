"""LayerSkipRuntime.generate's options: Hugging Face's tokens and distributions, from keywords and GenerationConfigs."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokens
from transformers import GenerationConfig, WatermarkingConfig
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built: python -m e3kernels.info says why")

from e3pruner.runtime import LayerSkipRuntime
from e3pruner.runtime.options import HONOURED, WITHOUT_EFFECT
from e3pruner.surgery import prune

NEW = 20
KEEP = [0, 2, 3, 5]
DRAWS = 300

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def setting():
    """A model, its runtime with some of the layers, the model without the others, and two prompts."""
    model = tiny_model("gemma2", tie_word_embeddings=False)  # a tied head would repeat one token
    return model, LayerSkipRuntime(model, KEEP), prune(model, KEEP), tiny_tokens(batch=2, length=9)


def hugging_face(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False} | options
    return model.generate(ids, **options)


def some_ends(setting):
    """Three tokens that the pruned model's greedy texts hold early."""
    text = hugging_face(setting[2], setting[3], max_new_tokens=NEW)[:, 9:]
    return text[0, [2, 5]].tolist() + text[1, [3]].tolist()


@pytest.mark.parametrize("options", [{"no_repeat_ngram_size": size} for size in (1, 2, 3)], ids=str)
def test_no_repeated_ngrams_are_hugging_faces(setting, options):
    _, runtime, pruned, _ = setting
    ids = torch.tensor([[5, 6, 7, 5, 6, 8, 5, 6, 5], [9, 9, 9, 9, 9, 9, 9, 9, 9]])
    plain = hugging_face(pruned, ids, max_new_tokens=NEW)
    expected = hugging_face(pruned, ids, max_new_tokens=NEW, **options)
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW, **options), expected)
    assert options["no_repeat_ngram_size"] == 3 or not torch.equal(plain, expected)


@pytest.mark.parametrize("draft_keep", [None, [0, 2, 3]])
def test_min_new_tokens_holds_the_end_back_as_hugging_face_does(setting, draft_keep):
    _, runtime, pruned, prompts = setting
    ends, ids = some_ends(setting), prompts if draft_keep is None else prompts[:1]
    options = {"max_new_tokens": NEW, "eos_token_id": ends, "pad_token_id": 0}
    early = hugging_face(pruned, ids, **options)
    for least in (0, 1, 4, 9, NEW):
        expected = hugging_face(pruned, ids, min_new_tokens=least, **options)
        actual = runtime.generate(ids, min_new_tokens=least, draft_keep=draft_keep, **options)
        assert torch.equal(actual, expected)
        assert actual.shape[1] >= 9 + least
    assert early.shape[1] < 9 + NEW


@pytest.mark.parametrize("draft_keep", [None, [0, 2, 3]])
def test_all_greedy_processors_together_are_hugging_faces(setting, draft_keep):
    _, runtime, pruned, prompts = setting
    ids = prompts[:1]
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 7}
    options |= {"eos_token_id": some_ends(setting), "pad_token_id": 0}
    expected = hugging_face(pruned, ids, **options)
    assert torch.equal(runtime.generate(ids, draft_keep=draft_keep, **options), expected)


def test_a_padded_row_is_treated_as_it_would_be_alone(setting):
    """Hugging Face counts n-grams of padding; here padding is no text."""
    _, runtime, pruned, _ = setting
    row = torch.tensor([[5, 6, 7, 5]])
    batch = torch.cat([torch.cat([torch.full((1, 5), 3), row], dim=1), tiny_tokens(batch=1, length=9)])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    options = {"max_new_tokens": NEW, "no_repeat_ngram_size": 1, "repetition_penalty": 1.3}
    text = runtime.generate(batch, attention_mask=mask, **options)
    assert torch.equal(text[:1, 5:], hugging_face(pruned, row, **options))


def scores_of(model, ids, **options):
    """Hugging Face's log-probabilities of the next token after all its processors."""
    options = {"max_new_tokens": 1, "do_sample": True, "output_scores": True, "return_dict_in_generate": True} | options
    return hugging_face(model, ids, **options).scores[0]


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.02},
        {"min_p": 0.3, "temperature": 1.7},
        {"min_p": 1.0},
        {"min_p": 0.05, "top_k": 30, "top_p": 0.9, "temperature": 2.0},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5, "top_p": 0.8, "min_p": 0.1},
        {"min_new_tokens": 3, "eos_token_id": list(range(40)), "pad_token_id": 0, "max_new_tokens": 3, "top_k": 20},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_may_be_drawn_is_what_hugging_face_leaves(setting, options):
    """The draws fall on the tokens that are left, and on each as often as its share: five standard deviations."""
    _, runtime, pruned, _ = setting
    ids = torch.tensor([[5, 6, 7, 5, 6, 8, 5, 6, 5]])
    neutral = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    shares = scores_of(pruned, ids, **neutral | options)[0].softmax(-1).double()
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.double)
    for seed in range(DRAWS):
        counts[runtime.generate(ids, **{"max_new_tokens": 1} | options, do_sample=True, seed=seed)[0, 9]] += 1
    assert (counts[shares == 0] == 0).all()
    deviation = (DRAWS * shares * (1 - shares)).sqrt()
    assert ((counts - DRAWS * shares).abs() <= 5 * deviation + 1).all()
    assert (shares > 0).sum() == 1 or (counts > 0).sum() > 1


@pytest.mark.parametrize("draft_keep", [None, [0, 2]])
def test_no_token_left_is_an_error(setting, draft_keep):
    _, runtime, _, _ = setting
    ids = torch.arange(VOCAB_SIZE)[None, :60] % VOCAB_SIZE
    banned = {"eos_token_id": list(range(60, VOCAB_SIZE)), "min_new_tokens": 2, "no_repeat_ngram_size": 1}
    for sample in (False, True):
        with pytest.raises(RuntimeError, match=r"no token is left.*no_repeat_ngram_size"):
            runtime.generate(ids, max_new_tokens=2, do_sample=sample, draft_keep=draft_keep, **banned)


class Deaf(BaseStreamer):
    def put(self, value):
        raise AssertionError("the streamer was called before the arguments were checked")

    def end(self):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5; max_new_tokens is 4"),
        ({"attention_mask": torch.full((1, 9), 2)}, "attention_mask holds 2; it must hold 0"),
        ({"attention_mask": torch.full((1, 9), -1)}, "attention_mask holds -1"),
        ({"attention_mask": torch.full((1, 9), 0.5)}, "attention_mask holds 0.5"),
        ({"attention_mask": torch.full((1, 9), float("nan"))}, "attention_mask holds nan"),
        (
            {"attention_mask": torch.zeros(1, 9).index_fill(1, torch.tensor([0]), -torch.inf)},
            "attention_mask holds -inf",
        ),
        ({"attention_mask": torch.ones(9)}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(1, 1, 9, 9)}, "attention_mask has shape"),
        ({"generation_config": {"max_new_tokens": 4}}, "generation_config is a dict"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_before_anything_is_written(setting, options, message):
    _, runtime, _, prompts = setting
    with pytest.raises((ValueError, TypeError), match=message):
        runtime.generate(prompts[:1], **{"max_new_tokens": 8} | options, streamer=Deaf())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((2, 4), 3), "attention_mask holds 3"),
        (torch.ones(4), r"attention_mask has shape \(4,\); it must be \(2, tokens\)"),
        (torch.ones(1, 4), r"attention_mask has shape \(1, 4\)"),
        (torch.ones(2, 1, 4, 4), "attention_mask has shape"),
    ],
)
def test_a_cache_takes_masks_of_zeros_and_ones_only(setting, mask, message):
    with pytest.raises(ValueError, match=message):
        setting[1].new_cache(2, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_may_have_any_dtype(setting, dtype):
    cache = setting[1].new_cache(2, torch.tensor([[0, 0, 1], [1, 1, 1]]).to(dtype))
    assert cache.starts == [2, 0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 6},
        {"max_length": 14},
        {"max_length": 14, "max_new_tokens": 3},
        {"max_new_tokens": NEW, "eos_token_id": "ends", "min_new_tokens": 8},
        {"max_new_tokens": NEW, "eos_token_id": "ends", "min_length": 15},
        {"max_new_tokens": NEW, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": False, "temperature": 0.0, "max_new_tokens": 4},
        {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "guidance_scale": 1.0, "max_new_tokens": 4},
        {"return_dict_in_generate": False, "output_scores": False, "cache_implementation": "dynamic"},
        {"length_penalty": 2.0, "early_stopping": True, "bos_token_id": 4, "max_new_tokens": 4},
    ],
    ids=lambda options: "-".join(options) or "empty",
)
@pytest.mark.parametrize("place", ["argument", "model"])
def test_a_generation_config_is_honoured_as_by_hugging_face(setting, options, place):
    """Given to the call, or as the model's own, which an empty one inherits."""
    model, runtime, pruned, ids = setting
    if options.get("eos_token_id"):
        options = options | {"eos_token_id": some_ends(setting), "pad_token_id": 0}
    config = GenerationConfig(**options)
    if place == "model":
        model.generation_config, pruned.generation_config, config = config, config, GenerationConfig()
    expected = pruned.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert torch.equal(runtime.generate(ids, generation_config=config), expected)
    assert not config._from_model_config


def test_a_generation_config_ends_at_stop_strings_and_yields_to_what_is_given(setting):
    _, runtime, _, prompts = setting
    ids = prompts[:1]

    class Letters:
        @staticmethod
        def decode(tokens):
            return "".join(chr(ord("!") + int(token) % 90) for token in tokens)

    full = runtime.generate(ids, max_new_tokens=NEW)
    text = Letters.decode(full[0, 9:])
    config = GenerationConfig(max_new_tokens=NEW, stop_strings=text[4:7], top_k=3, do_sample=True)
    assert torch.equal(
        runtime.generate(ids, generation_config=config, do_sample=False, tokenizer=Letters()), full[:, :16]
    )
    shorter = runtime.generate(
        ids, generation_config=config, do_sample=False, tokenizer=Letters(), max_new_tokens=2, eos_token_id=[]
    )
    assert torch.equal(shorter, full[:, :11])
    with pytest.raises(ValueError, match="needs tokenizer"):
        runtime.generate(ids, generation_config=config)


@pytest.mark.parametrize("top_k", [None, 7])
def test_a_sampling_config_draws_from_hugging_faces_distribution(setting, top_k):
    """Hugging Face's general defaults apply: 50 tokens unless top_k says otherwise."""
    _, runtime, pruned, _ = setting
    ids = tiny_tokens(batch=1, length=9, seed=3)
    config = GenerationConfig(do_sample=True, temperature=3.0, top_k=top_k, max_new_tokens=1)
    allowed = scores_of(pruned, ids, generation_config=config)[0] > -torch.inf
    assert allowed.sum() == (top_k or 50)
    drawn = {int(runtime.generate(ids, generation_config=config, seed=seed)[0, 9]) for seed in range(200)}
    assert drawn <= set(allowed.nonzero().flatten().tolist())
    assert len(drawn) > (top_k or 50) / 2


# A value of each other option that would change what `generate` returns, or how.
REFUSED = {
    "max_time": 3.0,
    "num_beams": 2,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "top_h": 0.4,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "encoder_repetition_penalty": 1.2,
    "bad_words_ids": [[5]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.5),
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "sequence_bias": {(5,): 1.0},
    "token_healing": True,
    "guidance_scale": 0,
    "watermarking_config": WatermarkingConfig(bias=2.0),
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "encoder_no_repeat_ngram_size": 2,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "penalty_alpha": 0.5,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[5]],
}


def test_every_option_of_a_generation_config_is_honoured_refused_or_without_effect():
    options = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert not options - HONOURED - WITHOUT_EFFECT - set(REFUSED)
    assert not (HONOURED & WITHOUT_EFFECT) | (HONOURED & set(REFUSED)) | (WITHOUT_EFFECT & set(REFUSED))


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("place", ["argument", "model"])
def test_an_option_that_the_runtime_does_not_have_is_refused_by_name(setting, name, place):
    model, runtime, _, ids = setting
    config = GenerationConfig(max_new_tokens=4)
    setattr(config if place == "argument" else model.generation_config, name, REFUSED[name])
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        runtime.generate(ids, generation_config=config)


def test_lengths_that_cannot_be_are_refused(setting):
    _, runtime, _, ids = setting
    for config, message in [
        (GenerationConfig(max_length=9), "max_length is 9; the prompt has 9 tokens"),
        (GenerationConfig(max_length=500), "exceed the model's 64"),
        (GenerationConfig(max_new_tokens=4, min_new_tokens=5), "min_new_tokens is 5; max_new_tokens is 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            runtime.generate(ids, generation_config=config)
    assert runtime.generate(tiny_tokens(length=60), generation_config=GenerationConfig()).shape == (2, 64)
