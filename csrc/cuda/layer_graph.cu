#include "cuda/layer_graph.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cuda/decode_kernels.cuh"
#include "cuda/graph_builder.h"
#include "cuda/launch.h"
#include "cuda/project.cuh"
#include "cuda/step_memory.h"

namespace e3::cuda {
namespace {

// Queues the kernels of a step of at most kTokens tokens, weights of type T.
template <class T, int kTokens>
class StepKernels {
 public:
  StepKernels(const DecoderView& decoder, const std::vector<LayerView>& layers, const StepMemory& memory, int parts)
      : decoder_(decoder),
        layers_(layers),
        memory_(memory),
        step_(memory.state.data()),
        shape_{decoder.heads, decoder.key_value_heads, decoder.head_dim},
        parts_(memory.parts(parts)) {}

  void embedding(cudaStream_t stream) const {
    const unsigned blocks = unsigned((decoder_.hidden + kThreads - 1) / kThreads);
    launch(embed<T>, {blocks, kTokens}, kThreads, stream, step_, decoder_.embedding, decoder_.embedding_scale,
           memory_.x.rows());
  }

  void attention(size_t index, cudaStream_t stream) const {
    const LayerView& layer = layers_[index];
    const LayerState* state = memory_.layer_states.data() + index;
    const Rows input = block_input(layer.attention_norm, stream), queries = memory_.queries.rows();
    const unsigned heads = unsigned(shape_.heads), all_heads = heads + 2 * unsigned(shape_.key_value_heads);
    const unsigned blocks = blocks_of<kTokens>(layer.query.rows) + 2 * blocks_of<kTokens>(layer.key.rows);
    launch(project_heads<kTokens, T>, blocks, kThreads, stream, step_, layer.query, layer.key, layer.value, input,
           memory_.qkv.rows());
    launch(place_heads<T>, {all_heads, kTokens}, 128, stream, step_, state, layer.query_norm, layer.key_norm, shape_,
           layer.rotary_half, memory_.qkv.rows(), queries);
    launch(attend_kernel<1>(), {heads, kTokens, unsigned(parts_.count)}, kAttentionThreads, stream, step_, state,
           shape_, layer.window, layer.scale, layer.softcap, queries, parts_);
    launch(merge_parts, {heads, kTokens}, 128, stream, step_, shape_, parts_, memory_.h.rows());
    add_product(layer.output, memory_.h.rows(), layer.attention_post_norm, &state->attention_gate, stream);
  }

  void mlp(size_t index, cudaStream_t stream) const {
    const LayerView& layer = layers_[index];
    const Rows input = block_input(layer.mlp_norm, stream), inner = memory_.inner.rows();
    launch(project_glu<kTokens, T>, blocks_of<kTokens>(layer.gate.rows), kThreads, stream, step_, layer.gate, layer.up,
           decoder_.activation, input, inner);
    add_product(layer.down, inner, layer.mlp_post_norm, &memory_.layer_states.data()[index].mlp_gate, stream);
  }

  void logits(cudaStream_t stream) const {
    launch(project_logits<kTokens, T>, blocks_of<kTokens>(decoder_.head.rows), kThreads, stream, step_, decoder_.head,
           decoder_.logit_scale, decoder_.logit_softcap, block_input(decoder_.final_norm, stream));
  }

 private:
  using Attend = void (*)(const StepState*, const LayerState*, HeadShape, int64_t, float, float, Rows, AttentionParts);

  template <int kLanes>
  Attend attend_kernel() const {
    if constexpr (kLanes < 32)
      if (kLanes * Pack<T>::kCount < decoder_.head_dim) return attend_kernel<2 * kLanes>();
    return attend<T, kLanes>;
  }

  // norm(x), or x itself for a block that normalises its output only (OLMo 2).
  Rows block_input(const NormView& norm, cudaStream_t stream) const {
    const Rows x = memory_.x.rows(), h = memory_.h.rows();
    if (!norm.weight) return x;
    launch(rms_norm<T>, kTokens, 1024, stream, step_, norm, static_cast<const float*>(nullptr), 1.0f, x, h);
    return h;
  }

  // x += gate·residual_scale·norm(W·from + b)
  void add_product(const MatrixView& matrix, Rows from, const NormView& norm, const float* gate,
                   cudaStream_t stream) const {
    const Rows x = memory_.x.rows(), branch = memory_.branch.rows();
    const unsigned blocks = blocks_of<kTokens>(matrix.rows);
    const float scale = decoder_.residual_scale;
    if (!norm.weight) return launch(project<kTokens, T>, blocks, kThreads, stream, step_, matrix, gate, scale, from, x);
    launch(project<kTokens, T>, blocks, kThreads, stream, step_, matrix, static_cast<const float*>(nullptr), 1.0f, from,
           branch);
    launch(rms_norm<T>, kTokens, 1024, stream, step_, norm, gate, scale, branch, x);
  }

  const DecoderView& decoder_;
  const std::vector<LayerView>& layers_;
  const StepMemory& memory_;
  const StepState* step_;
  const HeadShape shape_;
  const AttentionParts parts_;
};

// A graph, which its executable and the handles of its conditions belong to.
struct Captured {
  GraphBuilder graph;
  DeviceArray<cudaGraphConditionalHandle> conditions;
  cudaGraphExec_t executable = nullptr;

  explicit Captured(size_t condition_count) : conditions(condition_count) {}
  ~Captured() {
    if (executable) cudaGraphExecDestroy(executable);
  }
};

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

class LayerGraph::Impl {
 public:
  Impl(const DecoderView& decoder, const std::vector<LayerView>& layers, Storage storage)
      : decoder_(decoder), layers_(layers), storage_(storage), memory_(decoder, layers) {
    const int64_t divisor = storage == Storage::fp32 ? 4 : 8;
    if (decoder.head_dim > kMaxHeadDim || decoder.head_dim % divisor)
      throw std::invalid_argument("head_dim is " + std::to_string(decoder.head_dim) +
                                  "; the graph's kernels take multiples of " + std::to_string(divisor) + " up to " +
                                  std::to_string(kMaxHeadDim));
    check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "cudaEventCreate");
    one_ = capture<1>();
  }

  ~Impl() { cudaEventDestroy(done_); }

  void run(const Step& step, cudaStream_t stream) {
    if (step.tokens.empty() || step.tokens.size() > LayerGraph::kMaxTokens)
      throw std::invalid_argument("a step has " + std::to_string(step.tokens.size()) + " tokens; it takes 1 to 8");
    if (step.tokens.size() > 1 && !several_) several_ = capture<kMaxTokens>();
    const std::unique_ptr<Captured>& captured = step.tokens.size() > 1 ? several_ : one_;
    check(cudaStreamWaitEvent(stream, done_, 0), "cudaStreamWaitEvent");
    send_layers(step, stream);
    StepState state = {int64_t(step.tokens.size()), step.capacity, step.logits, {}};
    std::copy(step.tokens.begin(), step.tokens.end(), state.tokens);
    send(memory_.state.data(), &state, sizeof state, stream);
    check(cudaGraphLaunch(captured->executable, stream), "cudaGraphLaunch");
    check(cudaEventRecord(done_, stream), "cudaEventRecord");
  }

 private:
  // From pageable memory the copy is staged before the call returns.
  static void send(void* to, const void* from, size_t bytes, cudaStream_t stream) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  }

  void send_layers(const Step& step, cudaStream_t stream) {
    std::vector<LayerState> states(step.layers.size());
    for (size_t l = 0; l < states.size(); ++l) {
      const LayerView& layer = step.layers[l];
      states[l] = {layer.keys, layer.values, layer.cos, layer.sin, step.gates[2 * l], step.gates[2 * l + 1]};
    }
    const size_t bytes = states.size() * sizeof states[0];
    if (sent_.size() == states.size() && std::memcmp(sent_.data(), states.data(), bytes) == 0) return;
    send(memory_.layer_states.data(), states.data(), bytes, stream);
    sent_ = std::move(states);
  }

  template <int kTokens>
  std::unique_ptr<Captured> capture() const {
    if (storage_ == Storage::fp32) return capture<float, kTokens>();
    return storage_ == Storage::bf16 ? capture<__nv_bfloat16, kTokens>() : capture<__half, kTokens>();
  }

  template <class T, int kTokens>
  std::unique_ptr<Captured> capture() const {
    const StepKernels<T, kTokens> kernels(decoder_, layers_, memory_, parts_for(kTokens));
    auto out = std::make_unique<Captured>(2 * layers_.size());
    GraphBuilder& graph = out->graph;
    std::vector<cudaGraphConditionalHandle> handles(2 * layers_.size());
    for (cudaGraphConditionalHandle& handle : handles) handle = graph.condition();
    const size_t bytes = handles.size() * sizeof handles[0];
    check(cudaMemcpy(out->conditions.data(), handles.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    graph.add([&](cudaStream_t stream) {
      const int count = int(handles.size());
      launch(set_conditions, unsigned(count + kThreads - 1) / kThreads, kThreads, stream, out->conditions.data(),
             memory_.layer_states.data(), count);
      kernels.embedding(stream);
    });
    for (size_t l = 0; l < layers_.size(); ++l) {
      graph.add_if(handles[2 * l], [&](cudaStream_t stream) { kernels.attention(l, stream); });
      graph.add_if(handles[2 * l + 1], [&](cudaStream_t stream) { kernels.mlp(l, stream); });
    }
    graph.add([&](cudaStream_t stream) { kernels.logits(stream); });
    out->executable = graph.instantiate();
    return out;
  }

  // About two blocks of attention a multiprocessor.
  int parts_for(int tokens) const {
    const int64_t heads = decoder_.heads * tokens;
    return int(std::clamp<int64_t>((2 * attribute(cudaDevAttrMultiProcessorCount) + heads - 1) / heads, 1,
                                   StepMemory::kMaxParts));
  }

  const DecoderView decoder_;
  const std::vector<LayerView> layers_;
  const Storage storage_;
  StepMemory memory_;
  std::vector<LayerState> sent_;  // what memory_.layer_states holds
  std::unique_ptr<Captured> one_, several_;
  cudaEvent_t done_ = nullptr;  // the last step
};

DevicePath path_of_device() {
  DeviceFacts facts = {};
  check(cudaDriverGetVersion(&facts.driver), "cudaDriverGetVersion");
  facts.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  cudaFuncAttributes kernel;
  const cudaError_t status = cudaFuncGetAttributes(&kernel, reinterpret_cast<const void*>(set_conditions));
  cudaGetLastError();  // leaves none behind
  if (status == cudaSuccess)
    facts.ptx = kernel.ptxVersion, facts.binary = kernel.binaryVersion;
  else if (status == cudaErrorUnsupportedPtxVersion)
    facts.kernels = DeviceFacts::ptx_too_new;
  else if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    facts.kernels = DeviceFacts::no_image;
  else
    check(status, "cudaFuncGetAttributes");
  return choose_path(facts);
}

LayerGraph::LayerGraph(const DecoderView& decoder, const std::vector<LayerView>& layers, Storage storage)
    : impl_(std::make_unique<Impl>(decoder, layers, storage)) {}

LayerGraph::~LayerGraph() = default;

void LayerGraph::run(const Step& step, CUstream_st* stream) { impl_->run(step, stream); }

}  // namespace e3::cuda
