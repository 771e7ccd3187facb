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

  template <class Visit>
  void each_weight(const Visit& visit) const {
    visit(weight);
    if (bias) visit(*bias);
  }
};

// RMSNorm, x / √(mean x² + eps) · (offset + weight), or `centred` LayerNorm, (x − μ) / √(var x + eps) · weight + bias.
// Several weights are those of the heads, one each; none is 1. `size` elements are normalised together.
struct Norm {
  std::vector<Weight> weights;
  std::optional<Weight> bias;
  int64_t size;
  double eps, offset;
  bool centred;
  std::vector<const void*> by_head;

  Norm(std::vector<Weight> all, std::optional<Weight> added, int64_t count, double epsilon, double shift, bool mean_off)
      : weights(std::move(all)), bias(std::move(added)), size(count), eps(epsilon), offset(shift), centred(mean_off) {
    if (weights.size() > 1)
      for (const Weight& weight : weights) by_head.push_back(weight.tensor().data_ptr());
  }

  template <class Visit>
  void each_weight(const Visit& visit) const {
    for (const Weight& weight : weights) visit(weight);
    if (bias) visit(*bias);
  }
};

// The matrices of several experts, (expert, out, in), or (expert, in, out) where `by_input`; biases (expert, out).
struct ExpertLinear {
  Weight weight;
  std::optional<Weight> bias;
  bool by_input;

  int64_t rows() const { return weight.tensor().size(by_input ? 2 : 1); }
  int64_t columns() const { return weight.tensor().size(by_input ? 1 : 2); }
  int64_t count() const { return weight.tensor().size(0); }
  // (out, in) of one expert, and its bias.
  at::Tensor matrix(int64_t expert) const {
    const at::Tensor matrix = weight.tensor().select(0, expert);
    return by_input ? matrix.t() : matrix;
  }
  std::optional<at::Tensor> offset(int64_t expert) const {
    return bias ? std::optional(bias->tensor().select(0, expert)) : std::nullopt;
  }
  int64_t bytes_of_one() const { return int64_t(weight.tensor().select(0, 0).nbytes()); }

  template <class Visit>
  void each_weight(const Visit& visit) const {
    visit(weight);
    if (bias) visit(*bias);
  }
};

// As RouterView and ExpertsView in decode/decoder_view.h. The router may be fp32 in a model of another dtype.
struct Experts {
  std::optional<Linear> router;
  at::Tensor correction;  // (expert), fp32, or undefined
  std::optional<ExpertLinear> gate_up, down;
  bool in_turn = false, sigmoid = false, normalised = false;
  double scale = 1;
  int64_t chosen = 1, groups = 1, kept_groups = 1;

  int64_t count() const { return router->rows; }
};

// As LatentView.
struct Latent {
  int64_t rank = 0, plain = 0, rotated = 0, value_dim = 0;
  std::optional<Linear> query_down, up;
  std::optional<Norm> query_norm, norm;
};

// As ConvView; the weight is (channel, 1, taps).
struct Conv {
  std::optional<Linear> input;
  std::optional<Weight> weight, bias;

  int64_t taps() const { return weight->tensor().size(-1); }
};

// Rotary angles position·frequency; cos and sin are multiplied by `scaling`.
struct Rotary {
  at::Tensor frequencies;  // (half,), fp32
  double scaling;
  bool in_turn;  // pairs are neighbours
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

// As LayerInputView. The embedding is (token, all layers' sizes), of which this layer's begin at `first`.
struct LayerInput {
  std::optional<Weight> embedding;
  int64_t first = 0, size = 0;
  double embedding_scale = 1, projection_scale = 1, scale = 1;
  std::optional<Linear> projection, gate, output;
  std::optional<Norm> norm, output_norm;

  at::Tensor rows() const { return embedding->tensor().narrow(1, first, size); }
};

// The facts of LayerView. What the cache holds for each key/value head are head_dim and value_dim elements.
struct Layer {
  std::optional<Norm> attention_norm, attention_post_norm, mlp_norm, mlp_post_norm, query_norm, key_norm, value_norm;
  std::optional<Linear> query, key, value, output, gate, up, down;
  std::optional<Latent> latent;
  std::optional<Conv> conv;
  std::optional<Experts> experts;
  std::optional<LayerInput> input;
  std::optional<Weight> sinks;
  int cache_of = -1;  // the layer whose keys and values this one reads; −1: its own
  int64_t heads = 0, key_value_heads = 0, head_dim = 0, value_dim = 0;
  int rotary = -1;  // index into Model::rotaries; −1: none
  bool parallel = false;
  double scale = 1, softcap = 0, output_scale = 1;
  int64_t window = 0;

  template <class Visit>
  void each_weight(const Visit& visit) const {
    for (const auto* norm : norms())
      if (*norm) (*norm)->each_weight(visit);
    for (const auto* linear : linears())
      if (*linear) (*linear)->each_weight(visit);
    if (sinks) visit(*sinks);
    if (input) visit(*input->embedding);
    if (conv) {
      visit(*conv->weight);
      if (conv->bias) visit(*conv->bias);
    }
    if (experts) {
      experts->gate_up->each_weight(visit);
      experts->down->each_weight(visit);
    }
  }

  // Bytes of the matrices that one decoding step of one token reads.
  int64_t attention_bytes() const {
    int64_t total = bytes_of({&query, &key, &value, &output});
    if (latent) total += bytes_of({&latent->query_down, &latent->up});
    return total + (conv ? bytes_of({&conv->input}) : 0);
  }
  int64_t mlp_bytes() const {
    const int64_t total = bytes_of({&gate, &up, &down});
    if (!experts) return total;
    return total + bytes_of({&experts->router}) +
           experts->chosen * (experts->gate_up->bytes_of_one() + experts->down->bytes_of_one());
  }
  int64_t input_bytes() const { return input ? bytes_of({&input->projection, &input->gate, &input->output}) : 0; }

 private:
  // Without the router, whose dtype may be another.
  std::vector<const std::optional<Linear>*> linears() const {
    std::vector<const std::optional<Linear>*> all{&query, &key, &value, &output, &gate, &up, &down};
    if (latent) all.insert(all.end(), {&latent->query_down, &latent->up});
    if (conv) all.push_back(&conv->input);
    if (input) all.insert(all.end(), {&input->projection, &input->gate, &input->output});
    return all;
  }

  std::vector<const std::optional<Norm>*> norms() const {
    std::vector<const std::optional<Norm>*> all{
        &attention_norm, &attention_post_norm, &mlp_norm, &mlp_post_norm, &query_norm, &key_norm, &value_norm};
    if (latent) all.insert(all.end(), {&latent->query_norm, &latent->norm});
    if (input) all.insert(all.end(), {&input->norm, &input->output_norm});
    return all;
  }

  static int64_t bytes_of(std::initializer_list<const std::optional<Linear>*> linears) {
    int64_t total = 0;
    for (const auto* linear : linears)
      if (*linear) total += int64_t((*linear)->matrix().nbytes());
    return total;
  }
};

struct Model {
  std::optional<Linear> embedding, head;
  std::optional<Norm> final_norm;
  std::vector<Layer> layers;
  std::vector<Rotary> rotaries;
  int64_t max_positions = 0;
  Activation activation = Activation::silu;
  double glu_slope = 1, glu_limit = 0;
  double embedding_scale = 1, residual_scale = 1, logit_scale = 1, logit_softcap = 0;

  at::ScalarType dtype() const { return embedding->weight.tensor().scalar_type(); }
  at::Device device() const { return embedding->weight.tensor().device(); }
  int64_t vocabulary() const { return head->rows; }
  int64_t hidden() const { return embedding->weight.tensor().size(1); }

  template <class Visit>
  void each_weight(const Visit& visit) const {
    visit(embedding->weight);
    final_norm->each_weight(visit);
    head->each_weight(visit);
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

  // The graph of csrc/cuda runs Llama's facts only, in layers that are alike.
  bool plain() const {
    const Layer& first = layers.front();
    const auto plain_norm = [](const std::optional<Norm>& norm) {
      return !norm || (norm->weights.size() == 1 && !norm->centred && !norm->bias);
    };
    return activation != Activation::clamped_silu && plain_norm(final_norm) &&
           std::none_of(rotaries.begin(), rotaries.end(), [](const Rotary& rotary) { return rotary.in_turn; }) &&
           std::all_of(layers.begin(), layers.end(), [&](const Layer& layer) {
             return !layer.latent && !layer.conv && !layer.input && !layer.experts && !layer.sinks && !layer.parallel &&
                    layer.up && layer.value && !layer.value_norm && layer.output_scale == 1 &&
                    plain_norm(layer.attention_norm) && plain_norm(layer.attention_post_norm) &&
                    plain_norm(layer.mlp_norm) && plain_norm(layer.mlp_post_norm) && plain_norm(layer.query_norm) &&
                    plain_norm(layer.key_norm) && layer.heads == first.heads &&
                    layer.key_value_heads == first.key_value_heads && layer.head_dim == first.head_dim;
           });
  }

  // The kernels read every matrix and norm by the sizes that the heads and the embedding give.
  void check_shapes() const {
    TORCH_CHECK_VALUE(!layers.empty(), "the model has no layers");
    check(head, head->rows, hidden());
    check(final_norm, {hidden()});
    for (const Layer& layer : layers) {
      for (const auto* norm :
           {&layer.attention_norm, &layer.attention_post_norm, &layer.mlp_norm, &layer.mlp_post_norm})
        check(*norm, {hidden()});
      if (layer.conv)
        check_conv(layer);
      else
        check_attention(layer);
      if (layer.gate) {
        check(layer.gate, layer.gate->rows, hidden());
        if (layer.up) check(layer.up, layer.gate->rows, hidden());
        check(layer.down, hidden(), layer.gate->rows);
      }
      if (layer.experts) check_experts(*layer.experts);
      if (layer.input) check_input(*layer.input);
    }
  }

  void check_unchanged() const {
    each_weight([](const Weight& weight) { weight.check_unchanged(); });
    each_router([](const Weight& weight) { weight.check_unchanged(); });
  }

  void check_held() const {
    each_weight([](const Weight& weight) { weight.check_held(); });
    each_router([](const Weight& weight) { weight.check_held(); });
  }

 private:
  template <class Visit>
  void each_router(const Visit& visit) const {
    for (const Layer& layer : layers)
      if (layer.experts) layer.experts->router->each_weight(visit);
  }

  void check_attention(const Layer& layer) const {
    TORCH_CHECK_VALUE(layer.key_value_heads > 0 && layer.heads % layer.key_value_heads == 0, "a layer has ",
                      layer.heads, " heads and ", layer.key_value_heads, " key/value heads, which must divide them");
    const int64_t keys = layer.key_value_heads * layer.head_dim;
    int64_t queries = layer.heads * layer.head_dim, inputs = hidden(), outputs = layer.heads * layer.value_dim;
    if (const auto& latent = layer.latent) {
      queries = layer.heads * (latent->plain + latent->rotated);
      outputs = layer.heads * latent->value_dim;
      if (latent->query_down) {
        inputs = latent->query_down->rows;
        check(latent->query_down, inputs, hidden());
        check(latent->query_norm, {inputs});
      }
      check(latent->norm, {latent->rank});
      check(latent->up, layer.heads * (latent->plain + latent->value_dim), latent->rank);
    }
    check(layer.query, queries, inputs);
    if (layer.cache_of < 0) check(layer.key, keys, hidden());
    if (layer.value) check(layer.value, keys, hidden());
    check(layer.output, hidden(), outputs);
    check(layer.query_norm, {layer.head_dim, queries}, layer.heads);
    check(layer.key_norm, {layer.head_dim, keys}, layer.key_value_heads);
    check(layer.value_norm, {layer.value_dim});
    if (layer.sinks)
      TORCH_CHECK_VALUE(layer.sinks->tensor().numel() == layer.heads, layer.sinks->name(), " has ",
                        layer.sinks->tensor().numel(), " elements; the layer has ", layer.heads, " heads");
    if (layer.rotary < 0) return;
    const int64_t turned = 2 * rotaries[layer.rotary].frequencies.numel();
    const int64_t most = layer.latent ? layer.latent->rotated : layer.head_dim;
    TORCH_CHECK_VALUE(turned <= most, "the rotary embedding turns ", turned, " of the ", most, " values of a head");
  }

  void check_input(const LayerInput& input) const {
    check(input.projection, input.size, hidden());
    check(input.gate, input.size, hidden());
    check(input.output, hidden(), input.size);
    check(input.norm, {input.size});
    check(input.output_norm, {hidden()});
    const at::Tensor& table = input.embedding->tensor();
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) >= embedding->rows && table.size(1) >= input.first + input.size,
                      input.embedding->name(), " has shape ", table.sizes(), "; the layer needs ", input.size,
                      " columns from ", input.first, " on of ", embedding->rows, " rows");
  }

  void check_conv(const Layer& layer) const {
    check(layer.conv->input, 3 * layer.head_dim, hidden());
    check(layer.output, hidden(), layer.head_dim);
    const at::Tensor& weight = layer.conv->weight->tensor();
    TORCH_CHECK_VALUE(weight.is_contiguous() && weight.numel() == layer.head_dim * layer.conv->taps(),
                      layer.conv->weight->name(), " has shape ", weight.sizes(), "; the layer has ", layer.head_dim,
                      " channels");
  }

  void check_experts(const Experts& experts) const {
    const int64_t count = experts.count();
    check(experts.router, count, hidden());
    const at::Tensor& router = experts.router->weight.tensor();
    TORCH_CHECK_TYPE(
        (router.scalar_type() == dtype() || router.scalar_type() == at::kFloat) &&
            (!experts.router->bias || experts.router->bias->tensor().scalar_type() == router.scalar_type()),
        experts.router->weight.name(), " is ", router.scalar_type(), "; it must be ", dtype(),
        " or float32, and its bias alike");
    TORCH_CHECK_VALUE(router.device() == device(), experts.router->weight.name(), " is on ", router.device(), ", ",
                      embedding->weight.name(), " on ", device(), "; the runtime needs one device");
    TORCH_CHECK_VALUE(experts.chosen > 0 && experts.chosen <= count && experts.groups > 0 &&
                          count % experts.groups == 0 && experts.kept_groups > 0 &&
                          experts.kept_groups * (count / experts.groups) >= experts.chosen,
                      experts.router->weight.name(), " chooses ", experts.chosen, " of ", count, " experts from ",
                      experts.kept_groups, " of ", experts.groups, " groups");
    TORCH_CHECK_VALUE(!experts.correction.defined() || experts.correction.numel() == count,
                      experts.router->weight.name(), " has ", experts.correction.numel(), " corrections of ", count);
    check(*experts.gate_up, count, experts.gate_up->rows(), hidden());
    check(*experts.down, count, hidden(), experts.gate_up->rows() / 2);
  }

  static void check(const ExpertLinear& linear, int64_t count, int64_t rows, int64_t columns) {
    const at::Tensor& weight = linear.weight.tensor();
    TORCH_CHECK_VALUE(weight.dim() == 3 && linear.count() == count && linear.rows() == rows && rows % 2 == 0 &&
                          linear.columns() == columns,
                      linear.weight.name(), " has shape ", weight.sizes(), "; the model's widths need ", count,
                      " matrices of ", rows, " rows of ", columns);
    if (linear.bias)
      TORCH_CHECK_VALUE(linear.bias->tensor().is_contiguous() && linear.bias->tensor().numel() == count * rows,
                        linear.bias->name(), " has shape ", linear.bias->tensor().sizes(), "; it must be (", count,
                        ", ", rows, ")");
  }

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

  static void check(const std::optional<Norm>& norm, std::initializer_list<int64_t> sizes, int64_t heads = 1) {
    if (!norm) return;
    const auto fits = [&](const Weight& weight) { return weight.tensor().numel() == norm->size; };
    const bool whole =
        std::all_of(norm->weights.begin(), norm->weights.end(), fits) && (!norm->bias || fits(*norm->bias));
    const bool counted = norm->weights.size() <= 1 || int64_t(norm->weights.size()) == heads;
    TORCH_CHECK_VALUE(whole && counted && std::find(sizes.begin(), sizes.end(), norm->size) != sizes.end(),
                      norm->weights.empty() ? "a norm without weights" : norm->weights[0].name(), " has ",
                      norm->weights.empty() ? norm->size : norm->weights[0].tensor().numel(),
                      " elements; the model's heads and widths need ", *sizes.begin());
  }
};

}  // namespace e3
