// A Hugging Face decoder as tensors: views of the model's own parameters, never copies.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

#include "decode/activation.h"

namespace e3 {

// A parameter of the model. `source` is the parameter itself, whose data others may replace; `held` is an alias of the
// data it had when the runtime was built, which it keeps alive.
class Weight {
 public:
  Weight(std::string name, at::Tensor source)
      : name_(std::move(name)), source_(std::move(source)), held_(source_.detach()) {
    const at::ScalarType dtype = held_.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name_,
                     " is ", dtype, "; the runtime runs float32, bfloat16 and float16 weights");
    TORCH_CHECK_VALUE(held_.stride(-1) == 1, name_, " has stride ", held_.stride(-1),
                      " in its last dimension; make it contiguous");
  }

  const at::Tensor& tensor() const { return held_; }
  const std::string& name() const { return name_; }

  void check_unchanged() const {
    TORCH_CHECK(source_.scalar_type() == held_.scalar_type() && source_.device() == held_.device() &&
                    source_.sizes() == held_.sizes() && source_.data_ptr() == held_.data_ptr(),
                name_, " was ", held_.scalar_type(), " on ", held_.device(), " when the runtime was built and is now ",
                source_.scalar_type(), " on ", source_.device(),
                " or at another address; build a new LayerSkipRuntime from the model");
  }

 private:
  std::string name_;
  at::Tensor source_, held_;
};

// Rows [first, first + rows) of a weight of shape (out, in), with their bias.
struct Linear {
  Weight weight;
  std::optional<Weight> bias;
  std::int64_t first, rows;

  at::Tensor matrix() const { return weight.tensor().narrow(0, first, rows); }
  at::Tensor offset() const { return bias ? bias->tensor().narrow(0, first, rows) : at::Tensor(); }
};

// RMSNorm: x / √(mean x² + eps) · (offset + weight).
struct Norm {
  Weight weight;
  double eps, offset;
};

// Rotary angles position·frequency; cos and sin are multiplied by `scaling`.
struct Rotary {
  at::Tensor frequencies;  // (half,), fp32
  double scaling;
  at::Tensor cos, sin;  // (positions, half), fp32, filled on demand

  void reserve(std::int64_t positions) {
    if (cos.defined() && cos.size(0) >= positions) return;
    const std::int64_t grown = std::max(positions, cos.defined() ? 2 * cos.size(0) : 256);
    const at::Tensor angles = at::outer(at::arange(grown, frequencies.options()), frequencies);
    cos = angles.cos() * scaling;
    sin = angles.sin() * scaling;
  }
};

struct Layer {
  std::optional<Norm> attention_norm, attention_post_norm, mlp_norm, mlp_post_norm, query_norm, key_norm;
  std::optional<Linear> query, key, value, output, gate, up, down;
  int rotary = -1;  // index into Model::rotaries; −1: none
  double scale = 1, softcap = 0;
  std::int64_t window = 0;

  template <class Visit>
  void each_weight(const Visit& visit) const {
    for (const auto* norm :
         {&attention_norm, &attention_post_norm, &mlp_norm, &mlp_post_norm, &query_norm, &key_norm})
      if (*norm) visit((*norm)->weight);
    for (const auto* linear : {&query, &key, &value, &output, &gate, &up, &down}) {
      visit((*linear)->weight);
      if ((*linear)->bias) visit(*(*linear)->bias);
    }
  }

  // Bytes of the matrices that one decoding step reads.
  std::int64_t attention_bytes() const { return bytes_of({&query, &key, &value, &output}); }
  std::int64_t mlp_bytes() const { return bytes_of({&gate, &up, &down}); }

 private:
  static std::int64_t bytes_of(std::initializer_list<const std::optional<Linear>*> linears) {
    std::int64_t total = 0;
    for (const auto* linear : linears) total += std::int64_t((*linear)->matrix().nbytes());
    return total;
  }
};

struct Model {
  std::optional<Linear> embedding, head;
  std::optional<Norm> final_norm;
  std::vector<Layer> layers;
  std::vector<Rotary> rotaries;
  std::int64_t heads = 0, key_value_heads = 0, head_dim = 0, max_positions = 0;
  Activation activation = Activation::silu;
  double embedding_scale = 1, residual_scale = 1, logit_scale = 1, logit_softcap = 0;

  at::ScalarType dtype() const { return embedding->weight.tensor().scalar_type(); }
  at::Device device() const { return embedding->weight.tensor().device(); }
  std::int64_t vocabulary() const { return head->rows; }
  std::int64_t hidden() const { return embedding->weight.tensor().size(1); }

  template <class Visit>
  void each_weight(const Visit& visit) const {
    visit(embedding->weight);
    visit(final_norm->weight);
    visit(head->weight);
    if (head->bias) visit(*head->bias);
    for (const Layer& layer : layers) layer.each_weight(visit);
  }

  void check_uniform() const {
    each_weight([&](const Weight& weight) {
      TORCH_CHECK_TYPE(weight.tensor().scalar_type() == dtype(), weight.name(), " is ", weight.tensor().scalar_type(),
                       ", ", embedding->weight.name(), " is ", dtype(), "; the runtime needs one dtype");
      TORCH_CHECK_VALUE(weight.tensor().device() == device(), weight.name(), " is on ", weight.tensor().device(), ", ",
                        embedding->weight.name(), " on ", device(), "; the runtime needs one device");
    });
  }

  void check_unchanged() const {
    each_weight([](const Weight& weight) { weight.check_unchanged(); });
  }
};

}  // namespace e3
