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
    const at::Tensor embedded = x;
    for (const KeptLayer& kept : plan) {
      const Layer& layer = model_.layers[kept.layer];
      const at::Tensor before = x;
      if (kept.attention) {
        const at::Tensor input = normalised(layer.attention_norm, x);
        const at::Tensor branch = layer.conv ? short_conv(layer, cache, kept.layer, input, at_slots)
                                             : attention(layer, cache, kept.layer, input, at_slots);
        x = at::add(x, normalised(layer.attention_post_norm, branch), model_.residual_scale);
      }
      if (kept.mlp) {
        const at::Tensor branch = mlp(layer, normalised(layer.mlp_norm, layer.parallel ? before : x));
        x = at::add(x, normalised(layer.mlp_post_norm, branch), model_.residual_scale);
      }
      if (layer.input) x = x + from_input(*layer.input, ids, embedded, x);
      if (layer.output_scale != 1) x = x * layer.output_scale;
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
    if (layer.latent) return latent_attention(layer, cache, index, x, at_slots);
    const at::Tensor query = rotated(layer, heads(project(layer.query, x), layer.query_norm, layer.head_dim), at_slots);
    const auto [key, value] = keys_and_values(layer, cache, index, x, at_slots);
    return project(layer.output, attended(layer, query, key, value, at_slots).transpose(1, 2).flatten(2));
  }

  std::pair<at::Tensor, at::Tensor> keys_and_values(const Layer& layer, const Cache& cache, int index,
                                                    const at::Tensor& x, const Positions& at_slots) const {
    const int64_t end = at_slots.first + at_slots.count;
    if (layer.cache_of >= 0) return {cache.keys(index).narrow(2, 0, end), cache.values(index).narrow(2, 0, end)};
    const at::Tensor projected = project(layer.key, x);
    const at::Tensor key = rotated(layer, heads(projected, layer.key_norm, layer.head_dim), at_slots);
    const at::Tensor value = heads(layer.value ? project(layer.value, x) : projected, layer.value_norm, layer.head_dim);
    return {appended(cache.keys(index), key, at_slots), appended(cache.values(index), value, at_slots)};
  }

  // The cache holds the latent and the rotated part of the keys; both are expanded to all heads' keys and values.
  at::Tensor latent_attention(const Layer& layer, const Cache& cache, int index, const at::Tensor& x,
                              const Positions& at_slots) const {
    const Latent& latent = *layer.latent;
    const at::Tensor narrow = latent.query_down ? normalised(latent.query_norm, project(latent.query_down, x)) : x;
    const auto split = [&](const at::Tensor& all, int64_t first, int64_t second) {
      return all.split_with_sizes({first, second}, -1);
    };
    const auto query = split(project(layer.query, narrow).unflatten(-1, {layer.heads, -1}).transpose(1, 2),
                             latent.plain, latent.rotated);
    const auto key = split(project(layer.key, x).unsqueeze(1), latent.rank, latent.rotated);
    const at::Tensor entry = at::cat({normalised(latent.norm, key[0]), rotated(layer, key[1], at_slots)}, -1);
    const auto cached = split(appended(cache.keys(index), entry, at_slots), latent.rank, latent.rotated);
    const auto expanded =
        split(project(latent.up, cached[0].squeeze(1)).unflatten(-1, {layer.heads, -1}).transpose(1, 2), latent.plain,
              latent.value_dim);
    const at::Tensor keys = at::cat({expanded[0], cached[1].expand({-1, layer.heads, -1, -1})}, -1);
    const at::Tensor queries = at::cat({query[0], rotated(layer, query[1], at_slots)}, -1);
    return project(layer.output, attended(layer, queries, keys, expanded[1], at_slots).transpose(1, 2).flatten(2));
  }

  // Writes the step's slots; returns all of them.
  static at::Tensor appended(const at::Tensor& cache, const at::Tensor& values, const Positions& at_slots) {
    cache.narrow(2, at_slots.first, at_slots.count).copy_(values);
    return at_slots.first ? cache.narrow(2, 0, at_slots.first + at_slots.count) : values;
  }

  at::Tensor attended(const Layer& layer, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const Positions& at_slots) const {
    return layer.softcap || layer.sinks ? scored_attention(layer, query, key, value, at_slots)
                                        : dot_product_attention(layer, query, key, value, at_slots);
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
                                            query.size(1) != key.size(1));
  }

  // Scores pass through cap·tanh(s/cap) before the mask; a sink is one more score, without a value.
  static at::Tensor softened(const Layer& layer, const at::Tensor& scores) {
    return layer.softcap ? (scores / layer.softcap).tanh() * layer.softcap : scores;
  }

  at::Tensor scored_attention(const Layer& layer, const at::Tensor& query, const at::Tensor& key,
                              const at::Tensor& value, const Positions& at_slots) const {
    const int64_t group = query.size(1) / key.size(1);
    at::Tensor scores = at::matmul(query, key.repeat_interleave(group, 1).transpose(2, 3)).to(at::kFloat);
    scores = softened(layer, scores * layer.scale);
    scores = scores.masked_fill(~mask(at_slots, layer.window), -std::numeric_limits<double>::infinity());
    if (layer.sinks) {
      const at::Tensor sinks = layer.sinks->tensor().to(at::kFloat).view({1, -1, 1, 1});
      scores = at::cat({scores, sinks.expand({scores.size(0), -1, scores.size(2), 1})}, -1);
    }
    const at::Tensor weights = scores.softmax(-1).narrow(-1, 0, key.size(2)).to(query.scalar_type());
    return at::matmul(weights, value.repeat_interleave(group, 1));
  }

  // The cache holds b ∘ x of every slot; those of the padding are zeros.
  at::Tensor short_conv(const Layer& layer, const Cache& cache, int index, const at::Tensor& x,
                        const Positions& at_slots) const {
    const Conv& conv = *layer.conv;
    const auto parts = project(conv.input, x).chunk(3, -1);
    at::Tensor mixed = parts[0] * parts[2];
    for (int64_t b = 0; b < mixed.size(0); ++b)
      if (const int64_t padding = at_slots.starts[b] - at_slots.first; padding > 0)
        mixed[b].narrow(0, 0, std::min(padding, at_slots.count)).zero_();
    const at::Tensor slots = appended(cache.keys(index), mixed.unsqueeze(1), at_slots).squeeze(1).transpose(1, 2);
    const std::optional<at::Tensor> bias = conv.bias ? std::optional(conv.bias->tensor()) : std::nullopt;
    const at::Tensor out = at::conv1d(slots, conv.weight->tensor(), bias, 1, conv.taps() - 1, 1, layer.head_dim);
    return project(layer.output, parts[1] * out.narrow(2, at_slots.first, at_slots.count).transpose(1, 2));
  }

  at::Tensor from_input(const LayerInput& input, const at::Tensor& ids, const at::Tensor& embedded,
                        const at::Tensor& x) const {
    const at::Tensor projected = normalised(input.norm, project(input.projection, embedded) * input.projection_scale);
    const at::Tensor own = at::embedding(input.rows(), ids) * input.embedding_scale;
    const at::Tensor gate = activated(project(input.gate, x)) * ((projected + own) * input.scale);
    return normalised(input.output_norm, project(input.output, gate));
  }

  at::Tensor mlp(const Layer& layer, const at::Tensor& x) const {
    at::Tensor out;
    if (layer.gate) {
      const at::Tensor gate = project(layer.gate, x);
      out = project(layer.down, layer.up ? gated(gate, project(layer.up, x)) : activated(gate));
    }
    if (!layer.experts) return out;
    const at::Tensor routed = of_experts(*layer.experts, x.flatten(0, 1)).view(x.sizes());
    return out.defined() ? out + routed : routed;
  }

  // x is (token, hidden).
  at::Tensor of_experts(const Experts& experts, const at::Tensor& x) const {
    const auto [chosen, weights] = choice(experts, x);
    at::Tensor out = at::zeros_like(x);
    for (int64_t e = 0; e < experts.count(); ++e) {
      const auto where = at::where(chosen == e);
      const at::Tensor& tokens = where[0];
      if (!tokens.numel()) continue;
      const at::Tensor both = at::linear(x.index({tokens}), experts.gate_up->matrix(e), experts.gate_up->offset(e));
      const int64_t inner = both.size(1) / 2;
      const at::Tensor gate = experts.in_turn ? both.slice(1, 0, std::nullopt, 2) : both.narrow(1, 0, inner);
      const at::Tensor up = experts.in_turn ? both.slice(1, 1, std::nullopt, 2) : both.narrow(1, inner, inner);
      const at::Tensor each = at::linear(gated(gate, up), experts.down->matrix(e), experts.down->offset(e));
      const at::Tensor factor = weights.index({tokens, where[1]}).unsqueeze(1);
      out.index_add_(0, tokens, (each * factor).to(x.scalar_type()));
    }
    return out;
  }

  // The experts of every token and their weights, both (token, chosen).
  static std::pair<at::Tensor, at::Tensor> choice(const Experts& experts, const at::Tensor& x) {
    const at::ScalarType dtype = experts.router->weight.tensor().scalar_type();
    const at::Tensor logits = project(experts.router, x.to(dtype)).to(at::kFloat);
    const at::Tensor scores = experts.sigmoid ? logits.sigmoid() : logits.softmax(-1);
    at::Tensor ranks = experts.correction.defined() ? scores + experts.correction : scores;
    if (experts.kept_groups < experts.groups) {
      const at::Tensor grouped = ranks.unflatten(-1, {experts.groups, -1});
      const at::Tensor sums = std::get<0>(grouped.topk(2, -1)).sum(-1);
      const at::Tensor kept =
          at::zeros_like(sums, at::kBool).scatter(-1, std::get<1>(sums.topk(experts.kept_groups, -1)), true);
      ranks = grouped.masked_fill(~kept.unsqueeze(-1), -std::numeric_limits<double>::infinity()).flatten(-2);
    }
    const at::Tensor chosen = std::get<1>(ranks.topk(experts.chosen, -1));
    at::Tensor weights = scores.gather(-1, chosen);
    if (experts.normalised) weights = weights / weights.sum(-1, true);
    return {chosen, weights * experts.scale};
  }

  at::Tensor gated(at::Tensor gate, at::Tensor up) const {
    if (model_.activation != Activation::clamped_silu) return activated(gate) * up;
    gate = gate.clamp_max(model_.glu_limit);
    up = up.clamp(-model_.glu_limit, model_.glu_limit);
    return gate * (gate * model_.glu_slope).sigmoid() * (up + 1);
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
    at::Tensor wide = x.to(at::kFloat);
    if (norm->centred) wide = wide - wide.mean({-1}, true);
    wide = wide * (wide.square().mean({-1}, true) + norm->eps).rsqrt();
    if (!norm->weights.empty()) wide = wide * (weights_of(*norm) + norm->offset);
    if (norm->bias) wide = wide + norm->bias->tensor().to(at::kFloat);
    return wide.to(x.scalar_type());
  }

  // (size), or (heads, size) where each head has its own.
  static at::Tensor weights_of(const Norm& norm) {
    if (norm.weights.size() == 1) return norm.weights[0].tensor().to(at::kFloat);
    std::vector<at::Tensor> all;
    for (const Weight& weight : norm.weights) all.push_back(weight.tensor().to(at::kFloat));
    return at::stack(all);
  }

  // (batch, S, heads·dim) → (batch, heads, S, dim); a norm spans one head or all of them.
  static at::Tensor heads(const at::Tensor& projected, const std::optional<Norm>& norm, int64_t dim) {
    const bool spans_all = norm && norm->size != dim;
    at::Tensor split = (spans_all ? normalised(norm, projected) : projected).unflatten(-1, {-1, dim});
    if (norm && !spans_all) split = normalised(norm, split);
    return split.transpose(1, 2);
  }

  at::Tensor rotated(const Layer& layer, const at::Tensor& x, const Positions& at_slots) const {
    if (layer.rotary < 0) return x;
    const auto& [cos, sin] = at_slots.angles[layer.rotary];
    const int64_t half = cos.size(-1);
    const at::Tensor rest = x.narrow(-1, 2 * half, x.size(-1) - 2 * half);
    if (!model_.rotaries[layer.rotary].in_turn) {
      const at::Tensor low = x.narrow(-1, 0, half), high = x.narrow(-1, half, half);
      return at::cat({low * cos - high * sin, high * cos + low * sin, rest}, -1);
    }
    const at::Tensor pairs = x.narrow(-1, 0, 2 * half).unflatten(-1, {half, 2});
    const at::Tensor low = pairs.select(-1, 0), high = pairs.select(-1, 1);
    return at::cat({at::stack({low * cos - high * sin, high * cos + low * sin}, -1).flatten(-2), rest}, -1);
  }

  const Model& model_;
};

}  // namespace e3
