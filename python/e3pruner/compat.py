"""What this version of transformers calls a model's key-value cache."""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

_OLD = "past_key_values"

# The argument of a model's forward pass and the field of its output: "cache" from transformers 5.24 on.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else _OLD

# Both: models still take the old name, and rename it after every hook has seen it.
CACHE_NAMES = ("cache", _OLD)
