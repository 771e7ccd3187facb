// A decoding step of up to eight tokens (one sequence, a batch, a draft to verify, a short prompt) as a CUDA graph,
// captured once a model for one token and once for several: the attention and the MLP of every layer are bodies of
// conditional nodes whose conditions a kernel sets from gates in device memory. Other masks, tokens, contexts or caches
// are a copy of a few bytes to the device: no recapture, no synchronisation with the host.
#pragma once

#include <memory>
#include <vector>

#include "cuda/device_path.h"
#include "decode/decoder_view.h"

struct CUstream_st;

namespace e3::cuda {

enum class Storage { fp32, bf16, fp16 };

// What a step works on: the layers with their request's caches and rotary tables; `gates` holds the factors of
// attention and MLP of every layer, 0 for a block that is skipped; `logits` (tokens, vocabulary) is device memory.
struct Step {
  const std::vector<LayerView>& layers;
  const std::vector<float>& gates;
  const std::vector<TokenView>& tokens;
  int64_t capacity;
  float* logits;
};

// Whether the current device runs such a graph.
DevicePath path_of_device();

class LayerGraph {
 public:
  static constexpr size_t kMaxTokens = 8;

  // `layers` are all layers of the model, without caches. Weights are device memory that outlives the graph. Raises
  // std::runtime_error where the device cannot capture it, std::invalid_argument for heads that are
  // not a multiple of 16 bytes or have more than 256 elements.
  LayerGraph(const DecoderView& decoder, const std::vector<LayerView>& layers, Storage storage);
  ~LayerGraph();

  // Queues one step on `stream`, after the steps queued before it on any stream: they share their working memory.
  void run(const Step& step, CUstream_st* stream);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace e3::cuda
