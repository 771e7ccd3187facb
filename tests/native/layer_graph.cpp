// The CUDA half of the runtime against its CPU path, on random decoders: the kernels of csrc/cuda run on the CPU.
#include <algorithm>
#include <random>

#include "cuda/layer_graph.cu"
#include "decode/runtime_table.h"

namespace {

using namespace e3;

struct Shape {
  int storage, heads, key_value_heads, head_dim, hidden, inner, vocabulary, layers, window, activation;
  int norm_after, norm_heads, bias, rotary, softcap, sequences;
};

template <class T>
T element_of(float value) {
  T out;
  cuda::store(&out, value);
  return out;
}

// A decoder with weights of type T, and the caches and tables of one request for each of the two paths.
template <class T>
class Decoder {
 public:
  Decoder(const Shape& shape, unsigned seed) : shape_(shape), random_(seed) {
    const int64_t queries = int64_t(shape.heads) * shape.head_dim,
                  keys = int64_t(shape.key_value_heads) * shape.head_dim;
    view = {.hidden = shape.hidden,
            .heads = shape.heads,
            .key_value_heads = shape.key_value_heads,
            .head_dim = shape.head_dim,
            .activation = Activation(shape.activation),
            .embedding = matrix(shape.vocabulary, shape.hidden, false),
            .head = matrix(shape.vocabulary, shape.hidden, false),
            .final_norm = norm(shape.hidden),
            .embedding_scale = 1.5f,
            .residual_scale = 0.8f,
            .logit_scale = 0.7f,
            .logit_softcap = shape.softcap ? 20.0f : 0.0f};
    for (int l = 0; l < shape.layers; ++l) {
      LayerView layer;
      if (l || !shape.norm_after) layer.attention_norm = norm(shape.hidden), layer.mlp_norm = norm(shape.hidden);
      if (shape.norm_after) layer.attention_post_norm = norm(shape.hidden), layer.mlp_post_norm = norm(shape.hidden);
      if (shape.norm_heads) layer.query_norm = norm(shape.norm_heads == 1 ? shape.head_dim : queries);
      if (shape.norm_heads) layer.key_norm = norm(shape.norm_heads == 1 ? shape.head_dim : keys);
      layer.query = matrix(queries, shape.hidden, shape.bias);
      layer.key = matrix(keys, shape.hidden, shape.bias);
      layer.value = matrix(keys, shape.hidden, shape.bias);
      layer.output = matrix(shape.hidden, queries, shape.bias);
      layer.gate = matrix(shape.inner, shape.hidden, shape.bias);
      layer.up = matrix(shape.inner, shape.hidden, shape.bias);
      layer.down = matrix(shape.hidden, shape.inner, shape.bias);
      layer.scale = 1 / std::sqrt(float(shape.head_dim));
      layer.softcap = shape.softcap ? 5.0f : 0.0f;
      layer.window = l % 2 ? shape.window : 0;
      layer.rotary_half = l == 0 && shape.rotary > 1 ? 0 : shape.rotary ? shape.head_dim / 2 : 0;
      layers.push_back(layer);
    }
  }

  // Another request's caches and tables in views of all layers.
  std::vector<LayerView> request(int64_t capacity) {
    std::vector<LayerView> out = layers;
    for (LayerView& layer : out) {
      const size_t size = size_t(shape_.sequences * shape_.key_value_heads * capacity * shape_.head_dim);
      layer.keys = numbers<T>(size, 0), layer.values = numbers<T>(size, 0);
      if (!layer.rotary_half) continue;
      float *cos = numbers<float>(size_t(capacity * layer.rotary_half), 0),
            *sin = numbers<float>(size_t(capacity * layer.rotary_half), 0);
      for (int64_t i = 0; i < capacity * layer.rotary_half; ++i) {
        const double angle =
            double(i / layer.rotary_half) * std::pow(100.0, -double(i % layer.rotary_half) / double(layer.rotary_half));
        cos[i] = float(std::cos(angle)), sin[i] = float(std::sin(angle));
      }
      layer.cos = cos, layer.sin = sin;
    }
    return out;
  }

  DecoderView view;
  std::vector<LayerView> layers;

 private:
  template <class U>
  U* numbers(size_t count, float scale) {
    std::normal_distribution<float> normal;
    held_.emplace_back(std::aligned_alloc(64, (count * sizeof(U) + 64 + 63) / 64 * 64), std::free);
    U* data = static_cast<U*>(held_.back().get());
    for (size_t i = 0; i < count; ++i) data[i] = element_of<U>(scale ? scale * normal(random_) : 0.0f);
    return data;
  }

  MatrixView matrix(int64_t rows, int64_t columns, bool bias) {
    return {.weight = numbers<T>(size_t(rows * columns), 1 / std::sqrt(float(columns))),
            .bias = bias ? numbers<T>(size_t(rows), 0.1f) : nullptr,
            .rows = rows,
            .columns = columns,
            .stride = columns};
  }

  NormView norm(int64_t size) {
    return {.weight = numbers<T>(size_t(size), 0.2f), .size = size, .eps = 1e-6f, .offset = 1.0f};
  }

  const Shape shape_;
  std::mt19937 random_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> held_;
};

std::vector<float> on_the_cpu(const DecoderView& view, const std::vector<LayerView>& layers,
                              const std::vector<float>& gates, const std::vector<TokenView>& tokens, int64_t capacity,
                              int storage) {
  std::vector<LayerView> kept;
  for (size_t l = 0; l < layers.size(); ++l) {
    if (gates[2 * l] == 0 && gates[2 * l + 1] == 0) continue;
    kept.push_back(layers[l]);
    kept.back().attention = gates[2 * l] != 0, kept.back().mlp = gates[2 * l + 1] != 0;
  }
  std::vector<int> wanted(tokens.size());
  for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = int(i);
  std::vector<float> logits(tokens.size() * size_t(view.head.rows));
  StepView step{&view,         kept.data(),        int(kept.size()), capacity, tokens.data(), int(tokens.size()),
                wanted.data(), int(wanted.size()), logits.data(),    nullptr};
  const RuntimeTable& table = baseline::runtime_table;
  std::unique_ptr<void, void (*)(void*)> scratch(
      std::aligned_alloc(64, (size_t(table.scratch_size(step, 1)) * 4 + 63) / 64 * 64), std::free);
  step.scratch = static_cast<float*>(scratch.get());
  SpinBarrier barrier(1);
  (storage == 0 ? table.step_fp32 : storage == 1 ? table.step_bf16 : table.step_fp16)(step, barrier, 0, 1);
  return logits;
}

// One request of some streams' worth of steps; the largest error relative to the largest logit.
template <class T>
double largest_error(const Shape& shape, int tokens_per_step, int steps, int stream_count) {
  const int64_t capacity = int64_t(tokens_per_step) * steps / shape.sequences + 3;
  Decoder<T> decoder(shape, 7);
  cuda::LayerGraph graph(decoder.view, decoder.layers, cuda::Storage(shape.storage));
  std::mt19937 random(3);
  struct Request {
    std::vector<LayerView> here, there;
    std::vector<float> expected, actual;
    cudaStream_t stream;
  };
  std::vector<Request> requests(static_cast<size_t>(stream_count));
  for (Request& request : requests) {
    request.here = decoder.request(capacity), request.there = decoder.request(capacity);
    cudaStreamCreateWithFlags(&request.stream, cudaStreamNonBlocking);
  }
  double error = 0;
  int64_t slot = 0;
  for (int s = 0; s < steps; ++s) {
    const int per_sequence = tokens_per_step / shape.sequences;
    std::vector<float> gates(2 * decoder.layers.size(), 1.0f);
    if (s % 3 == 1) gates[2] = 0;                                  // one attention
    if (s % 3 == 2) gates[0] = gates[1] = 0, gates.back() = 0;     // a layer and an MLP
    for (Request& request : requests) {
      std::vector<TokenView> tokens;
      for (int b = 0; b < shape.sequences; ++b)
        for (int i = 0; i < per_sequence; ++i)
          tokens.push_back({int64_t(random() % unsigned(shape.vocabulary)), b, slot + i, std::min<int64_t>(b, slot)});
      request.expected = on_the_cpu(decoder.view, request.here, gates, tokens, capacity, shape.storage);
      request.actual.assign(request.expected.size(), NAN);
      graph.run({request.there, gates, tokens, capacity, request.actual.data()}, request.stream);
    }
    cuda_on_cpu::run_all();
    for (const Request& request : requests) {
      float largest = 0;
      for (const float value : request.expected) largest = std::max(largest, std::abs(value));
      for (size_t i = 0; i < request.expected.size(); ++i) {
        const double here = std::abs(double(request.actual[i]) - request.expected[i]) / largest;
        error = here >= 0 ? std::max(error, here) : INFINITY;  // NaN is the largest error of all
      }
    }
    slot += per_sequence;
  }
  return error;
}

}  // namespace

extern "C" double layer_graph_error(const int* numbers, int tokens_per_step, int steps, int streams) {
  Shape shape;
  std::memcpy(&shape, numbers, sizeof shape);
  if (shape.storage == 0) return largest_error<float>(shape, tokens_per_step, steps, streams);
  if (shape.storage == 1) return largest_error<__nv_bfloat16>(shape, tokens_per_step, steps, streams);
  return largest_error<__half>(shape, tokens_per_step, steps, streams);
}

// Kernels that one step of one token launches.
extern "C" int launches_of_a_step(const int* numbers) {
  cuda_on_cpu::launches = 0;
  layer_graph_error(numbers, 1, 1, 1);
  return cuda_on_cpu::launches;
}
