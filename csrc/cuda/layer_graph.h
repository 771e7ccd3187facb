// A decoding step of one sequence as one CUDA graph, captured once a model: the attention and the MLP of every layer
// are bodies of conditional nodes whose conditions a kernel sets from gates in device memory. Another mask, token,
// context or cache is a copy of a few bytes to the device: no recapture, no synchronisation with the host.
#pragma once

#include <memory>
#include <vector>

#include "decode/decoder_view.h"

struct CUstream_st;

namespace e3::cuda {

enum class Storage { fp32, bf16, fp16 };

class LayerGraph {
 public:
  static constexpr int64_t kMaxHeadDim = 256;

  // `layers` are all layers of the model, without caches. Weights are device memory that outlives the graph.
  LayerGraph(const DecoderView& decoder, const std::vector<LayerView>& layers, Storage storage);
  ~LayerGraph();

  // Which layers run, their caches (one sequence, `capacity` slots) and their rotary tables; `gates` holds the factors
  // of attention and MLP of every layer, 0 for a block that is skipped. Queued on `stream` if it differs from the last.
  void set_layers(const std::vector<LayerView>& layers, const std::vector<float>& gates, int64_t capacity,
                  CUstream_st* stream);

  // Queues one step on `stream`; `logits` are `vocabulary` floats of device memory.
  void step(const TokenView& token, float* logits, CUstream_st* stream);

 private:
  struct Captured;
  std::unique_ptr<Captured> captured_;
};

}  // namespace e3::cuda
