"""The compiled decoder runtime: csrc/torch/runtime.cpp."""

from collections.abc import Callable

from torch import Tensor

class Weight:
    def __init__(self, name: str, tensor: Tensor) -> None: ...

class Linear:
    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, first: int, rows: int) -> None: ...

class Norm:
    def __init__(
        self,
        name: str,
        weights: list[Tensor],
        bias: Tensor | None,
        size: int,
        eps: float,
        offset: float,
        centred: bool,
    ) -> None: ...

class Rotary:
    def __init__(self, frequencies: Tensor, scaling: float, in_turn: bool) -> None: ...

class ExpertLinear:
    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, by_input: bool) -> None: ...

class Experts:
    router: Linear
    correction: Tensor
    gate_up: ExpertLinear
    down: ExpertLinear
    in_turn: bool
    sigmoid: bool
    normalised: bool
    scale: float
    chosen: int
    groups: int
    kept_groups: int

class Latent:
    rank: int
    plain: int
    rotated: int
    value_dim: int
    query_down: Linear
    up: Linear
    query_norm: Norm
    norm: Norm

class Conv:
    def __init__(self, name: str, input: Linear, weight: Tensor, bias: Tensor | None) -> None: ...

class LayerInput:
    embedding: Weight
    first: int
    size: int
    embedding_scale: float
    projection_scale: float
    scale: float
    projection: Linear
    gate: Linear
    output: Linear
    norm: Norm
    output_norm: Norm

class Layer:
    attention_norm: Norm | None
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp_post_norm: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    value_norm: Norm | None
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    gate: Linear
    up: Linear
    down: Linear
    latent: Latent | None
    conv: Conv | None
    experts: Experts | None
    input: LayerInput | None
    cache_of: int
    sinks: Weight | None
    heads: int
    key_value_heads: int
    head_dim: int
    value_dim: int
    rotary: int
    parallel: bool
    scale: float
    softcap: float
    output_scale: float
    window: int

class Model:
    embedding: Linear
    head: Linear
    final_norm: Norm
    layers: list[Layer]
    rotaries: list[Rotary]
    max_positions: int
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float
    glu_slope: float
    glu_limit: float
    activation: str
    def check_unchanged(self) -> None: ...

class KeptLayer:
    layer: int
    attention: bool
    mlp: bool
    def __init__(self, layer: int, attention: bool, mlp: bool) -> None: ...

class Cache:
    length: int
    batch: int
    bytes: int
    starts: list[int]
    plan: list[KeptLayer]
    def set_starts(self, starts: list[int]) -> None: ...
    def truncate(self, length: int) -> None: ...
    def select(self, indices: Tensor) -> None: ...

class Request:
    def __init__(
        self,
        *,
        max_new_tokens: int,
        min_new_tokens: int,
        eos: list[int],
        pad: int,
        sample: bool,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        no_repeat_ngram_size: int,
        seed: int,
    ) -> None: ...

class SpeculationCounts:
    drafted: int
    accepted: int
    verifications: int

OnTokens = Callable[[list[int]], list[bool] | None]

class Decoder:
    path: str
    def __init__(self, model: Model) -> None: ...
    def new_cache(self, plan: list[KeptLayer], batch: int, capacity: int) -> Cache: ...
    def append(self, cache: Cache, ids: Tensor, keep: int) -> Tensor: ...
    def weight_bytes(self, plan: list[KeptLayer]) -> int: ...
    def generate(self, cache: Cache, ids: Tensor, request: Request, on_tokens: OnTokens | None) -> list[list[int]]: ...
    def speculate(
        self, cache: Cache, draft: list[KeptLayer], ids: Tensor, request: Request, on_tokens: OnTokens | None
    ) -> tuple[list[list[int]], SpeculationCounts]: ...

def instruction_sets() -> list[str]: ...
def choose_path(capability: int, driver: int, kernels: str, ptx: int, binary: int) -> tuple[bool, str]: ...
def device_path() -> str: ...
def gumbel_topk(
    logits: Tensor, scalars: Tensor, k: int, seed: int, step: int, relaxation: int, /
) -> tuple[Tensor, Tensor]: ...
