"""The compiled decoder runtime: csrc/torch/runtime.cpp."""

from collections.abc import Callable

from torch import Tensor

class Linear:
    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, first: int, rows: int) -> None: ...

class Norm:
    def __init__(self, name: str, weight: Tensor, eps: float, offset: float) -> None: ...

class Rotary:
    def __init__(self, frequencies: Tensor, scaling: float) -> None: ...

class Layer:
    attention_norm: Norm | None
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp_post_norm: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    gate: Linear
    up: Linear
    down: Linear
    rotary: int
    scale: float
    softcap: float
    window: int

class Model:
    embedding: Linear
    head: Linear
    final_norm: Norm
    layers: list[Layer]
    rotaries: list[Rotary]
    heads: int
    key_value_heads: int
    head_dim: int
    max_positions: int
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float
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
