"""What a configuration demands of the layers that stay: known before anything is measured, cut or loaded.

Two kinds of demand cover what the model types of transformers ask for. A `Limit` says how many of some layers may go:
none of those that hold weights of others, all but one of those that attend. An `Order` says of which kinds the layers
that stay must be, one after another, where a setting derives what a layer is from its index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from e3pruner.compat import sharing_modes
from e3pruner.models.stack import count_setting

# Kinds of `layer_types` whose layers keep no keys and values: a state of fixed size, or nothing.
_WITHOUT_ATTENTION = {"linear_attention", "conv", "moe", "mlp"}
# Setting that says of which layers, every how many, something is true: the setting that says of which of them (None: of
# the last), and what it is.
_INTERVALS = {
    "attn_layer_period": ("attn_layer_offset", "attends"),
    "expert_layer_period": ("expert_layer_offset", "holds experts"),
    "moe_layer_interval": (None, "holds experts"),
}
# Model type: what its layers compute from their index, beside their place.
_COUNTING = {
    "beam": "what a layer adds to the residual stream is scaled by the layer's index",
    "diffllama": "the weight of the second attention map follows from the layer's index",
}
# Model type: a layer that is like no other, and why.
_SINGLE = {
    "gpt_neox_japanese": (-1, "the last, alone has a bias behind its attention"),
    "modernbert-decoder": (0, "the first, alone has no norm before its attention and must stay"),
    "inkling2_loop_text": (0, "the first, alone reads no earlier ones beside the one before and must stay"),
    "inkling2_text": (0, "the first, alone reads no earlier ones beside the one before and must stay"),
    "rwkv": (0, "the first, alone has a norm of the embeddings and must stay"),
}
# Their configurations make the last layer one of full attention, whatever they are told.
_ENDING_IN_FULL_ATTENTION = {"gemma4_text", "gemma4_unified_text", "diffusion_gemma_text"}


@dataclass(frozen=True)
class Limit:
    """Of the layers `members` at most `most` may go."""

    members: frozenset[int]
    most: int
    reason: str

    @property
    def fixed(self) -> frozenset[int]:
        """Layers that must stay, whatever else does."""
        return self.members if self.most == 0 else frozenset()

    def broken_by(self, kept: Sequence[int]) -> bool:
        return len(self.members - set(kept)) > self.most


@dataclass(frozen=True)
class End(Limit):
    """The last layer that stays is one of `ends`; to a search it says more, that the dense model's last one stays."""

    ends: frozenset[int] = frozenset()

    def broken_by(self, kept: Sequence[int]) -> bool:
        return kept[-1] not in self.ends


@dataclass(frozen=True)
class Reads(Limit):
    """Of the layers `readers` those that stay have one of `writers` before them that stays; to a search it says more,
    that one of the writers before the first reader, its `members`, stays."""

    readers: frozenset[int] = frozenset()
    writers: frozenset[int] = frozenset()

    def broken_by(self, kept: Sequence[int]) -> bool:
        first = next((layer for layer in kept if layer in self.readers | self.writers), None)
        return first in self.readers - self.writers


@dataclass(frozen=True)
class Order:
    """Layer l is of the kind `kinds[l]`; the layers that stay are of the kinds `rule[0]`, `rule[1]`, … in turn. With
    `counted`, of these layers alone."""

    kinds: tuple[Any, ...]
    rule: tuple[Any, ...]
    reason: str
    fixed: frozenset[int] = frozenset()
    counted: frozenset[int] | None = None

    def counts(self, layer: int) -> bool:
        return self.counted is None or layer in self.counted

    def broken_by(self, kept: Sequence[int]) -> bool:
        return any(self.kinds[old] != self.rule[new] for new, old in enumerate(filter(self.counts, kept)))


Demand = Limit | Order


def demands_of(config: PreTrainedConfig) -> list[Demand]:
    """What `config` demands of the layers that are kept; see `pruned_config` for what makes all pruning impossible."""
    text = config.get_text_config(decoder=True)
    return [*_of_attention(text), *_of_shared_state(text), *_of_indices(text), *_of_image_features(config)]


def check_kept(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Raises ValueError naming the model type and the reason unless the layers `kept`, ascending, may stay alone."""
    for demand in demands_of(config):
        if demand.broken_by(kept):
            kind = config.get_text_config(decoder=True).model_type
            raise ValueError(f"kept={list(kept)} cannot be kept alone of this model ({kind}): {demand.reason}")


def _of_attention(text: Any) -> Iterator[Demand]:
    kinds = getattr(text, "layer_types", None) or []
    attending = frozenset(layer for layer, kind in enumerate(kinds) if kind not in _WITHOUT_ATTENTION)
    if attending and len(attending) < len(kinds):
        reason = f"one of the layers that attend ({_named(attending)}) must stay: positions are counted by its cache"
        yield Limit(attending, len(attending) - 1, reason)
    hybrid = [layer for layer, kind in enumerate(kinds) if kind == "hybrid"]
    if text.model_type == "zamba" and hybrid:  # a Zamba without a second one cannot be built
        yield Limit(frozenset(hybrid[:1]), 0, f"layer {hybrid[0]} holds the weights of all layers that attend")
        reason = f"two of the layers that share their attention ({_named(frozenset(hybrid))}) must stay"
        yield Limit(frozenset(hybrid), max(len(hybrid) - 2, 0), reason)
    if text.model_type == "zamba2" and hybrid:
        blocks = text.num_mem_blocks
        first = frozenset(hybrid[:blocks])
        yield Limit(first, 0, f"layers {_named(first)} hold the weights of all layers that attend")
        turns = tuple(hybrid.index(layer) % blocks if layer in hybrid else None for layer in range(len(kinds)))
        reason = f"config.num_mem_blocks={blocks}: the layers that attend ({_named(frozenset(hybrid))}) take turns"
        yield Order(turns, tuple(n % blocks for n in range(len(hybrid))), reason, counted=frozenset(hybrid))
    crossing = frozenset(getattr(text, "cross_attention_layers", None) or ())
    if own := frozenset(range(_count(text))) - crossing if crossing else None:
        yield Limit(own, len(own) - 1, "one layer that attends to the text must stay")


def _of_shared_state(text: Any) -> Iterator[Demand]:
    """Layers that read what an earlier one of their kind wrote, the last that ran."""
    modes = sharing_modes(text)
    ropes = getattr(text, "no_rope_layers", None) or [1] * len(modes)
    kinds = list(zip(text.layer_types, ropes, strict=True)) if modes else []
    for kind in dict.fromkeys(kinds):
        own = [layer for layer, each in enumerate(kinds) if each == kind]
        readers = [layer for layer in own if modes[layer].startswith("reuse")]
        writers = [layer for layer in own if modes[layer] == "store"]
        yield from _reads(readers, writers, "keys and values of layers {}, of which one must stay")
    indexers = getattr(text, "indexer_types", None) or []
    places = {kind: [layer for layer, each in enumerate(indexers) if each == kind] for kind in ("shared", "full")}
    yield from _reads(places["shared"], places["full"], "choice of the indexers of layers {}, of which one must stay")


def _reads(readers: Sequence[int], writers: Sequence[int], what: str) -> Iterator[Demand]:
    if readers:
        before = frozenset(layer for layer in writers if layer < readers[0])
        reason = f"layers {_named(frozenset(readers))} read the {what.format(_named(before))} before them"
        if not before:
            reason = "its layers read the keys and values of another model, along with which alone it runs"
        yield Reads(before, len(before) - 1, reason, frozenset(readers), frozenset(writers))


def _of_indices(text: Any) -> Iterator[Demand]:
    count = _count(text)
    for name, (offset, what) in _INTERVALS.items():
        every = getattr(text, name, 1)
        if every != 1 and (name != "attn_layer_period" or "layers_block_type" not in vars(text)):
            place = every - 1 if offset is None else getattr(text, offset)
            kinds = tuple(layer % every == place for layer in range(count))
            yield Order(kinds, kinds, f"config.{name}={every}: whether a layer {what} follows from its index")
    if hashed := frozenset(layer - 1 for layer in getattr(text, "ple_layer_ids", None) or ()):  # counted from 1
        yield Limit(hashed, 0, f"the n-gram tables of layers {_named(hashed)} go by their order, and must stay")
    if text.model_type in _ENDING_IN_FULL_ATTENTION:
        ends = frozenset(layer for layer, kind in enumerate(text.layer_types) if kind == "full_attention")
        said = f"the last layer that stays must attend to all tokens, as layers {_named(ends)} do"
        yield End(frozenset([count - 1]), 0, said, ends)
    if text.model_type in _SINGLE:
        place, what = _SINGLE[text.model_type]
        yield Limit(frozenset([place % count]), 0, f"layer {place % count}, {what}")
    reason = _COUNTING.get(text.model_type)
    if getattr(text, "scale_attn_by_inverse_layer_idx", False):
        reason = "config.scale_attn_by_inverse_layer_idx=True: attention is divided by the layer's index + 1"
    if reason:
        yield Order(tuple(range(count)), tuple(range(count)), f"{reason}; only the last layers may go")


def _of_image_features(config: PreTrainedConfig) -> Iterator[Demand]:
    """DeepStack: features of an image are added to the hidden state behind the first layers, or before given ones."""
    vision = getattr(config, "vision_config", None)
    if indexes := getattr(vision, "deepstack_visual_indexes", None):
        members = frozenset(range(len(indexes)))
        yield Limit(members, 0, f"features of the image are added behind layers {_named(members)}, which must stay")
    given = [layer for _, layer in getattr(config, "deepstack_layer_map", None) or ()]
    if given:
        members = frozenset([*given, *getattr(config, "spatial_target_layers", ())])
        yield Limit(members, 0, f"features of the image are added before layers {_named(members)}, which must stay")


def _count(text: Any) -> int:
    return getattr(text, count_setting(text), 0)


def _named(layers: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
