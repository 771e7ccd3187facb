// The generic path: the same decoder in ATen operations, for any device, batch and number of tokens. Norms, angles and
// softmax in fp32, matrix products in the model's dtype.
#pragma once

#include <cmath>
#include <map>

#include "torch/runtime/cache.h"

namespace e3 {

class GenericDecoder {
 public:
  explicit GenericDecoder(const Model& model) : model_(model) {}

  // ids: (batch, S) for the next S slots of every sequence. Returns the logits of the last `keep` slots,
  // (batch, keep, vocabulary) in fp32.
  at::Tensor run(const Cache& cache, const Plan& plan, const at::Tensor& ids, int64_t keep) const {
    const Positions at_slots = positions(cache, ids.size(1));
    at::Tensor x = at::embedding(model_.embedding->weight.tensor(), ids);
    if (model_.embedding_scale != 1) x = x * model_.embedding_scale;
    for (const KeptLayer& kept : plan) {
      const Layer& layer = model_.layers[kept.layer];
      if (kept.attention) {
        const at::Tensor branch = attention(layer, cache, kept.layer, normalised(layer.attention_norm, x), at_slots);
        x = at::add(x, normalised(layer.attention_post_norm, branch), model_.residual_scale);
      }
      if (kept.mlp) {
        const at::Tensor branch = mlp(layer, normalised(layer.mlp_norm, x));
        x = at::add(x, normalised(layer.mlp_post_norm, branch), model_.residual_scale);
      }
    }
    return logits(x.narrow(1, x.size(1) - keep, keep));
  }

 private:
  struct Angles {
    at::Tensor cos, sin;  // (batch, 1, count, half)
  };

  // The step's slots, and what depends on them alone: computed once, used by every layer.
  struct Positions {
    int64_t first, count;  // slots
    std::vector<int64_t> starts;
    std::vector<Angles> angles;                        // by rotary
    mutable std::map<int64_t, at::Tensor> masks;  // by window
  };

  Positions positions(const Cache& cache, int64_t count) const {
    const auto options = at::TensorOptions().dtype(at::kLong);
    const at::Tensor starts = at::tensor(cache.starts(), options);
    const at::Tensor slots = at::arange(cache.length(), cache.length() + count, options);
    const at::Tensor after_padding = (slots.unsqueeze(0) - starts.unsqueeze(1)).clamp_min(0).to(model_.device());
    Positions out{.first = cache.length(), .count = count, .starts = cache.starts(), .angles = {}, .masks = {}};
    const auto of_slots = [&](const at::Tensor& table) {
      return table.index({after_padding}).unsqueeze(1).to(model_.dtype());
    };
    for (const Rotary& rotary : model_.rotaries) out.angles.push_back({of_slots(rotary.cos), of_slots(rotary.sin)});
    return out;
  }

  // Which slots a query sees, (batch, 1, count, slots). Padding queries see themselves, so that no row is empty.
  const at::Tensor& mask(const Positions& at_slots, int64_t window) const {
    at::Tensor& mask = at_slots.masks[window];
    if (mask.defined()) return mask;
    const auto options = at::TensorOptions().dtype(at::kLong);
    const at::Tensor keys = at::arange(at_slots.first + at_slots.count, options).unsqueeze(0);
    const at::Tensor queries = at::arange(at_slots.first, at_slots.first + at_slots.count, options).unsqueeze(1);
    at::Tensor causal = keys <= queries;
    if (window) causal = causal & (keys > queries - window);
    const at::Tensor starts = at::tensor(at_slots.starts, options).view({-1, 1, 1});
    mask = ((causal & (keys >= starts)) | (keys == queries)).unsqueeze(1).to(model_.device());
    return mask;
  }

  static bool padded(const Positions& at_slots) {
    return std::any_of(at_slots.starts.begin(), at_slots.starts.end(), [](int64_t start) { return start != 0; });
  }

  at::Tensor attention(const Layer& layer, const Cache& cache, int index, const at::Tensor& x,
                       const Positions& at_slots) const {
    at::Tensor query = heads(project(layer.query, x), layer.query_norm);
    at::Tensor key = heads(project(layer.key, x), layer.key_norm);
    at::Tensor value = heads(project(layer.value, x), std::nullopt);
    if (layer.rotary >= 0) {
      query = rotated(query, at_slots.angles[layer.rotary]);
      key = rotated(key, at_slots.angles[layer.rotary]);
    }
    cache.keys(index).narrow(2, at_slots.first, at_slots.count).copy_(key);
    cache.values(index).narrow(2, at_slots.first, at_slots.count).copy_(value);
    if (at_slots.first) {
      key = cache.keys(index).narrow(2, 0, at_slots.first + at_slots.count);
      value = cache.values(index).narrow(2, 0, at_slots.first + at_slots.count);
    }
    const at::Tensor mixed = layer.softcap ? capped_attention(layer, query, key, value, at_slots)
                                           : dot_product_attention(layer, query, key, value, at_slots);
    return project(layer.output, mixed.transpose(1, 2).flatten(2));
  }

  // Without a mask where that can be: with one, grouped heads fall to the slowest of the attention kernels.
  at::Tensor dot_product_attention(const Layer& layer, const at::Tensor& query, at::Tensor key, at::Tensor value,
                                   const Positions& at_slots) const {
    const int64_t slots = at_slots.first + at_slots.count, window = layer.window ? layer.window : slots;
    const bool one = at_slots.count == 1 && !padded(at_slots);
    const bool causal = at_slots.first == 0 && window >= slots && !padded(at_slots) && !one;
    if (one && window < slots) {
      key = key.narrow(2, slots - window, window);
      value = value.narrow(2, slots - window, window);
    }
    const std::optional<at::Tensor> seen = one || causal ? std::nullopt : std::optional(mask(at_slots, layer.window));
    return at::scaled_dot_product_attention(query, key, value, seen, 0.0, causal, layer.scale,
                                            model_.heads != model_.key_value_heads);
  }

  // Scores pass through cap·tanh(s/cap) before the mask.
  at::Tensor capped_attention(const Layer& layer, const at::Tensor& query, const at::Tensor& key,
                              const at::Tensor& value, const Positions& at_slots) const {
    const int64_t group = model_.heads / model_.key_value_heads;
    at::Tensor scores = at::matmul(query, key.repeat_interleave(group, 1).transpose(2, 3)).to(at::kFloat);
    scores = (scores * (layer.scale / layer.softcap)).tanh() * layer.softcap;
    scores = scores.masked_fill(~mask(at_slots, layer.window), -std::numeric_limits<double>::infinity());
    return at::matmul(scores.softmax(-1).to(query.scalar_type()), value.repeat_interleave(group, 1));
  }

  at::Tensor mlp(const Layer& layer, const at::Tensor& x) const {
    return project(layer.down, activated(project(layer.gate, x)) * project(layer.up, x));
  }

  at::Tensor activated(const at::Tensor& gate) const {
    if (model_.activation == Activation::silu) return at::silu(gate);
    return at::gelu(gate, model_.activation == Activation::gelu_tanh ? "tanh" : "none");
  }

  at::Tensor logits(const at::Tensor& x) const {
    at::Tensor out = project(model_.head, normalised(model_.final_norm, x)).to(at::kFloat) * model_.logit_scale;
    if (model_.logit_softcap) out = (out / model_.logit_softcap).tanh() * model_.logit_softcap;
    return out;
  }

  static at::Tensor project(const std::optional<Linear>& linear, const at::Tensor& x) {
    return at::linear(x, linear->matrix(), linear->bias ? std::optional(linear->offset()) : std::nullopt);
  }

  static at::Tensor normalised(const std::optional<Norm>& norm, const at::Tensor& x) {
    if (!norm) return x;
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor scale = (wide.square().mean({-1}, true) + norm->eps).rsqrt();
    return (wide * scale * (norm->weight.tensor().to(at::kFloat) + norm->offset)).to(x.scalar_type());
  }

  // (batch, S, heads·head_dim) → (batch, heads, S, head_dim); a norm spans one head or all of them.
  at::Tensor heads(const at::Tensor& projected, const std::optional<Norm>& norm) const {
    const bool spans_all = norm && norm->weight.tensor().numel() != model_.head_dim;
    at::Tensor split = (spans_all ? normalised(norm, projected) : projected).unflatten(-1, {-1, model_.head_dim});
    if (norm && !spans_all) split = normalised(norm, split);
    return split.transpose(1, 2);
  }

  static at::Tensor rotated(const at::Tensor& x, const Angles& angles) {
    const auto& [cos, sin] = angles;
    const int64_t half = cos.size(-1);
    const at::Tensor low = x.narrow(-1, 0, half), high = x.narrow(-1, half, half);
    const at::Tensor rest = x.narrow(-1, 2 * half, x.size(-1) - 2 * half);
    return at::cat({low * cos - high * sin, high * cos + low * sin, rest}, -1);
  }

  const Model& model_;
};

}  // namespace e3
