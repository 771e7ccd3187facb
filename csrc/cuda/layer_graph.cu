#include "cuda/layer_graph.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "cuda/check.h"
#include "cuda/decode_kernels.cuh"

namespace e3::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t items) { return unsigned((items + kThreads - 1) / kThreads); }

// Condition 2l is the attention of layer l, 2l + 1 its MLP.
__global__ void set_conditions(const cudaGraphConditionalHandle* conditions, const LayerState* layers, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const LayerState& layer = layers[i / 2];
  cudaGraphSetConditional(conditions[i], (i % 2 ? layer.mlp_gate : layer.attention_gate) != 0.0f);
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) { check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc"); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace

struct LayerGraph::Captured {
  DecoderView decoder;
  std::vector<LayerView> layers;
  int64_t query_width, key_width, inner, capacity = 0;
  DeviceArray<StepState> state{1};
  DeviceArray<LayerState> layer_states;
  DeviceArray<cudaGraphConditionalHandle> conditions;
  DeviceArray<float> x, h, qkv, queries, branch, gate, up, logits;
  std::vector<LayerState> sent;  // what layer_states holds
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;

  Captured(const DecoderView& view, const std::vector<LayerView>& all, Storage storage)
      : decoder(view),
        layers(all),
        query_width(view.heads * view.head_dim),
        key_width(view.key_value_heads * view.head_dim),
        inner(widest(all)),
        layer_states(all.size()),
        conditions(2 * all.size()),
        x(view.hidden),
        h(std::max(view.hidden, query_width)),
        qkv(query_width + 2 * key_width),
        queries(query_width),
        branch(view.hidden),
        gate(inner),
        up(inner),
        logits(view.head.rows) {
    if (view.head_dim > kMaxHeadDim) throw std::invalid_argument("head_dim is above " + std::to_string(kMaxHeadDim));
    check(cudaGraphCreate(&graph, 0), "cudaGraphCreate");
    if (storage == Storage::fp32)
      build<float>();
    else if (storage == Storage::bf16)
      build<__nv_bfloat16>();
    else
      build<__half>();
    check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  }

  ~Captured() {
    if (executable) cudaGraphExecDestroy(executable);
    if (graph) cudaGraphDestroy(graph);
  }

  static int64_t widest(const std::vector<LayerView>& all) {
    int64_t inner = 0;
    for (const LayerView& layer : all) inner = std::max(inner, layer.gate.rows);
    return inner;
  }

  using Nodes = std::vector<cudaGraphNode_t>;

  // Adds what `queue` launches to `target`, after `before`; returns its last nodes.
  static Nodes capture(cudaGraph_t target, const Nodes& before, const std::function<void(cudaStream_t)>& queue) {
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaStreamBeginCaptureToGraph(stream, target, before.data(), nullptr, before.size(),
                                        cudaStreamCaptureModeThreadLocal),
          "cudaStreamBeginCaptureToGraph");
    queue(stream);
    check(cudaGetLastError(), "kernel launch");
    cudaStreamCaptureStatus status;
    const cudaGraphNode_t* last = nullptr;
    size_t count = 0;
#if CUDART_VERSION >= 13000
    check(cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &last, nullptr, &count),
          "cudaStreamGetCaptureInfo");
#else
    check(cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, nullptr, &last, &count), "cudaStreamGetCaptureInfo");
#endif
    const Nodes after(last, last + count);
    check(cudaStreamEndCapture(stream, &target), "cudaStreamEndCapture");
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
    return after;
  }

  // A node that runs `queue` where its condition holds.
  Nodes capture_if(cudaGraphConditionalHandle condition, const Nodes& before,
                   const std::function<void(cudaStream_t)>& queue) {
    cudaGraphNodeParams parameters = {};
    parameters.type = cudaGraphNodeTypeConditional;
    parameters.conditional.handle = condition;
    parameters.conditional.type = cudaGraphCondTypeIf;
    parameters.conditional.size = 1;
    cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
    check(cudaGraphAddNode(&node, graph, before.data(), nullptr, before.size(), &parameters), "cudaGraphAddNode");
#else
    check(cudaGraphAddNode(&node, graph, before.data(), before.size(), &parameters), "cudaGraphAddNode");
#endif
    capture(parameters.conditional.phGraph_out[0], {}, queue);
    return {node};
  }

  template <class T>
  void build() {
    std::vector<cudaGraphConditionalHandle> handles(2 * layers.size());
    for (cudaGraphConditionalHandle& handle : handles)
      check(cudaGraphConditionalHandleCreate(&handle, graph, 0, cudaGraphCondAssignDefault),
            "cudaGraphConditionalHandleCreate");
    check(cudaMemcpy(conditions.data(), handles.data(), handles.size() * sizeof handles[0], cudaMemcpyHostToDevice),
          "cudaMemcpy");
    Nodes last = capture(graph, {}, [&](cudaStream_t stream) {
      const int count = int(handles.size());
      set_conditions<<<blocks_for(count), kThreads, 0, stream>>>(conditions.data(), layer_states.data(), count);
      embed<T><<<blocks_for(decoder.hidden), kThreads, 0, stream>>>(state.data(), decoder.embedding,
                                                                    decoder.embedding_scale, x.data());
    });
    for (size_t l = 0; l < layers.size(); ++l) {
      last = capture_if(handles[2 * l], last, [&](cudaStream_t stream) { queue_attention<T>(l, stream); });
      last = capture_if(handles[2 * l + 1], last, [&](cudaStream_t stream) { queue_mlp<T>(l, stream); });
    }
    capture(graph, last, [&](cudaStream_t stream) {
      queue_norm<T>(decoder.final_norm, decoder.hidden, x.data(), h.data(), stream);
      queue_gemv<T>(decoder.head, h.data(), logits.data(), stream);
      finish_logits<<<blocks_for(decoder.head.rows), kThreads, 0, stream>>>(decoder.logit_scale, decoder.logit_softcap,
                                                                            decoder.head.rows, logits.data());
    });
  }

  template <class T>
  static void queue_norm(const NormView& norm, int64_t n, const float* from, float* to, cudaStream_t stream) {
    rms_norm<T><<<1, 1024, 0, stream>>>(norm, n, from, to);
  }

  template <class T>
  static void queue_gemv(const MatrixView& matrix, const float* from, float* to, cudaStream_t stream) {
    gemv<T><<<blocks_for(32 * matrix.rows), kThreads, 0, stream>>>(matrix, from, to);
  }

  template <class T>
  void queue_branch(const NormView& norm, const float* factor, cudaStream_t stream) {
    if (norm.weight) queue_norm<T>(norm, decoder.hidden, branch.data(), branch.data(), stream);
    add_gated<<<blocks_for(decoder.hidden), kThreads, 0, stream>>>(factor, decoder.residual_scale, branch.data(),
                                                                   decoder.hidden, x.data());
  }

  template <class T>
  void queue_attention(size_t index, cudaStream_t stream) {
    const LayerView& layer = layers[index];
    const LayerState* layer_state = layer_states.data() + index;
    const HeadShape shape{decoder.heads, decoder.key_value_heads, decoder.head_dim};
    queue_norm<T>(layer.attention_norm, decoder.hidden, x.data(), h.data(), stream);
    queue_gemv<T>(layer.query, h.data(), qkv.data(), stream);
    queue_gemv<T>(layer.key, h.data(), qkv.data() + query_width, stream);
    queue_gemv<T>(layer.value, h.data(), qkv.data() + query_width + key_width, stream);
    place_heads<T><<<unsigned(shape.heads + 2 * shape.key_value_heads), 128, shape.head_dim * sizeof(float), stream>>>(
        state.data(), layer_state, layer.query_norm, layer.key_norm, shape, layer.rotary_half, qkv.data(),
        queries.data());
    attend<T><<<unsigned(shape.heads), 32 * kAttentionWarps, 0, stream>>>(
        state.data(), layer_state, shape, layer.window, layer.scale, layer.softcap, queries.data(), h.data());
    queue_gemv<T>(layer.output, h.data(), branch.data(), stream);
    queue_branch<T>(layer.attention_post_norm, &layer_state->attention_gate, stream);
  }

  template <class T>
  void queue_mlp(size_t index, cudaStream_t stream) {
    const LayerView& layer = layers[index];
    queue_norm<T>(layer.mlp_norm, decoder.hidden, x.data(), h.data(), stream);
    queue_gemv<T>(layer.gate, h.data(), gate.data(), stream);
    queue_gemv<T>(layer.up, h.data(), up.data(), stream);
    glu<<<blocks_for(layer.gate.rows), kThreads, 0, stream>>>(gate.data(), up.data(), layer.gate.rows,
                                                              decoder.activation);
    queue_gemv<T>(layer.down, gate.data(), branch.data(), stream);
    queue_branch<T>(layer.mlp_post_norm, &layer_states.data()[index].mlp_gate, stream);
  }
};

LayerGraph::LayerGraph(const DecoderView& decoder, const std::vector<LayerView>& layers, Storage storage)
    : captured_(std::make_unique<Captured>(decoder, layers, storage)) {}

LayerGraph::~LayerGraph() = default;

void LayerGraph::set_layers(const std::vector<LayerView>& layers, const std::vector<float>& gates, int64_t capacity,
                            CUstream_st* stream) {
  std::vector<LayerState> states(layers.size());
  for (size_t l = 0; l < layers.size(); ++l)
    states[l] = {layers[l].keys, layers[l].values, layers[l].cos, layers[l].sin, gates[2 * l], gates[2 * l + 1]};
  captured_->capacity = capacity;
  if (captured_->sent.size() == states.size() &&
      std::memcmp(captured_->sent.data(), states.data(), states.size() * sizeof states[0]) == 0)
    return;
  captured_->sent = states;
  // From pageable memory the copy is staged before the call returns.
  check(cudaMemcpyAsync(captured_->layer_states.data(), states.data(), states.size() * sizeof states[0],
                        cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
}

void LayerGraph::step(const TokenView& token, float* logits, CUstream_st* stream) {
  const StepState state{token.id, token.slot, token.start, captured_->capacity};
  check(cudaMemcpyAsync(captured_->state.data(), &state, sizeof state, cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
  check(cudaGraphLaunch(captured_->executable, stream), "cudaGraphLaunch");
  check(cudaMemcpyAsync(logits, captured_->logits.data(), captured_->decoder.head.rows * sizeof(float),
                        cudaMemcpyDeviceToDevice, stream),
        "cudaMemcpyAsync");
}

}  // namespace e3::cuda
