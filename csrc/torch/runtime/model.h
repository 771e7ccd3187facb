// A Hugging Face decoder as tensors: views of the model's own parameters, never copies.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "decode/activation.h"

namespace e3 {

// A parameter of the model. `source` is the parameter itself, whose data others may replace; `held` is an alias of the
// data it had when the runtime was built, which it keeps alive. Not even that keeps the memory: an offloader may take
// it from under the storage.
class Weight {
 public:
  Weight(std::string name, at::Tensor source)
      : name_(std::move(name)),
        source_(std::move(source)),
        held_(source_.detach()),
        address_(held_.data_ptr()),
        bytes_(at::detail::computeStorageNbytes(held_.sizes(), held_.strides(), held_.itemsize(),
                                                size_t(held_.storage_offset()))) {
    const at::ScalarType dtype = held_.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name_, " is ", dtype,
                     "; the runtime runs float32, bfloat16 and float16 weights");
    TORCH_CHECK_VALUE(held_.stride(-1) == 1, name_, " has stride ", held_.stride(-1),
                      " in its last dimension; make it contiguous");
    check_held();
  }

  const at::Tensor& tensor() const { return held_; }
  const std::string& name() const { return name_; }

  void check_unchanged() const {
    TORCH_CHECK(source_.scalar_type() == held_.scalar_type() && source_.device() == held_.device() &&
                    source_.sizes() == held_.sizes() && source_.strides() == held_.strides() &&
                    source_.data_ptr() == held_.data_ptr(),
                name_, " was ", held_.scalar_type(), " on ", held_.device(), " when the runtime was built and is now ",
                source_.scalar_type(), " on ", source_.device(),
                " or at another address; build a new LayerSkipRuntime from the model");
    check_held();
  }

  // The kernels read by address.
  void check_held() const {
    TORCH_CHECK(
        held_.storage().nbytes() >= bytes_ && held_.data_ptr() == address_, name_,
        " has lost its memory: the storage was released or moved (offloading, sharding); load the whole model on "
        "one device and build a new LayerSkipRuntime");
  }

 private:
  std::string name_;
  at::Tensor source_, held_;
  void* address_;
  size_t bytes_;  // of the storage, up to the last element
};

// Rows [first, first + rows) of a weight of shape (out, in), with their bias.
struct Linear {
  Weight weight;
  std::optional<Weight> bias;
  int64_t first, rows;

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

  // Tables that a step on another stream may still read stay alive; all of them together are no larger than the last.
  std::vector<at::Tensor> outgrown;

  void reserve(int64_t positions) {
    if (cos.defined() && cos.size(0) >= positions) return;
    if (cos.defined()) outgrown.insert(outgrown.end(), {cos, sin});
    const int64_t grown = std::max(positions, cos.defined() ? 2 * cos.size(0) : 256);
    const at::Tensor angles = at::outer(at::arange(grown, frequencies.options()), frequencies);
    cos = angles.cos() * scaling;
    sin = angles.sin() * scaling;
    if (frequencies.is_cuda() || frequencies.is_xpu()) {  // for the streams of later requests
      const c10::impl::VirtualGuardImpl device(frequencies.device().type());
      device.synchronizeStream(device.getStream(frequencies.device()));
    }
  }
};

struct Layer {
  std::optional<Norm> attention_norm, attention_post_norm, mlp_norm, mlp_post_norm, query_norm, key_norm;
  std::optional<Linear> query, key, value, output, gate, up, down;
  int rotary = -1;  // index into Model::rotaries; −1: none
  double scale = 1, softcap = 0;
  int64_t window = 0;

  template <class Visit>
  void each_weight(const Visit& visit) const {
    for (const auto* norm : {&attention_norm, &attention_post_norm, &mlp_norm, &mlp_post_norm, &query_norm, &key_norm})
      if (*norm) visit((*norm)->weight);
    for (const auto* linear : {&query, &key, &value, &output, &gate, &up, &down}) {
      visit((*linear)->weight);
      if ((*linear)->bias) visit(*(*linear)->bias);
    }
  }

  // Bytes of the matrices that one decoding step reads.
  int64_t attention_bytes() const { return bytes_of({&query, &key, &value, &output}); }
  int64_t mlp_bytes() const { return bytes_of({&gate, &up, &down}); }

 private:
  static int64_t bytes_of(std::initializer_list<const std::optional<Linear>*> linears) {
    int64_t total = 0;
    for (const auto* linear : linears) total += int64_t((*linear)->matrix().nbytes());
    return total;
  }
};

struct Model {
  std::optional<Linear> embedding, head;
  std::optional<Norm> final_norm;
  std::vector<Layer> layers;
  std::vector<Rotary> rotaries;
  int64_t heads = 0, key_value_heads = 0, head_dim = 0, max_positions = 0;
  Activation activation = Activation::silu;
  double embedding_scale = 1, residual_scale = 1, logit_scale = 1, logit_softcap = 0;

  at::ScalarType dtype() const { return embedding->weight.tensor().scalar_type(); }
  at::Device device() const { return embedding->weight.tensor().device(); }
  int64_t vocabulary() const { return head->rows; }
  int64_t hidden() const { return embedding->weight.tensor().size(1); }

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

  // The kernels read every matrix and norm by the sizes that the heads and the embedding give.
  void check_shapes() const {
    TORCH_CHECK_VALUE(key_value_heads > 0 && heads % key_value_heads == 0, "the model has ", heads, " heads and ",
                      key_value_heads, " key/value heads, which must divide them");
    const int64_t queries = heads * head_dim, keys = key_value_heads * head_dim;
    check(head, head->rows, hidden());
    check(final_norm, {hidden()});
    for (const Layer& layer : layers) {
      check(layer.query, queries, hidden());
      check(layer.key, keys, hidden());
      check(layer.value, keys, hidden());
      check(layer.output, hidden(), queries);
      check(layer.gate, layer.gate->rows, hidden());
      check(layer.up, layer.gate->rows, hidden());
      check(layer.down, hidden(), layer.gate->rows);
      for (const auto* norm :
           {&layer.attention_norm, &layer.attention_post_norm, &layer.mlp_norm, &layer.mlp_post_norm})
        check(*norm, {hidden()});
      check(layer.query_norm, {head_dim, queries});
      check(layer.key_norm, {head_dim, keys});
    }
    for (const Rotary& rotary : rotaries)
      TORCH_CHECK_VALUE(2 * rotary.frequencies.numel() <= head_dim, "the rotary embedding turns ",
                        2 * rotary.frequencies.numel(), " of the ", head_dim, " values of a head");
  }

  void check_unchanged() const {
    each_weight([](const Weight& weight) { weight.check_unchanged(); });
  }

  void check_held() const {
    each_weight([](const Weight& weight) { weight.check_held(); });
  }

 private:
  static void check(const std::optional<Linear>& linear, int64_t rows, int64_t columns) {
    const at::Tensor& weight = linear->weight.tensor();
    TORCH_CHECK_VALUE(weight.dim() == 2 && linear->rows == rows && linear->first + rows <= weight.size(0) &&
                          weight.size(1) == columns,
                      linear->weight.name(), " has shape ", weight.sizes(), " of which ", linear->rows,
                      " rows are used; the model's heads and widths need ", rows, " rows of ", columns);
    if (linear->bias)
      TORCH_CHECK_VALUE(linear->bias->tensor().numel() == weight.size(0), linear->bias->name(), " has ",
                        linear->bias->tensor().numel(), " elements; its matrix has ", weight.size(0), " rows");
  }

  static void check(const std::optional<Norm>& norm, std::initializer_list<int64_t> sizes) {
    if (!norm) return;
    const int64_t size = norm->weight.tensor().numel();
    TORCH_CHECK_VALUE(std::find(sizes.begin(), sizes.end(), size) != sizes.end(), norm->weight.name(), " has ", size,
                      " elements; the model's heads and widths need ", *sizes.begin());
  }
};

}  // namespace e3
