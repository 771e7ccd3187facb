// Builds a CUDA graph from what is queued on a stream, with parts that run only where their condition holds.
#pragma once

#include <functional>
#include <vector>

#include "cuda/check.h"

namespace e3::cuda {

class GraphBuilder {
 public:
  using Queue = std::function<void(cudaStream_t)>;

  GraphBuilder() { check(cudaGraphCreate(&graph_, 0), "cudaGraphCreate"); }
  GraphBuilder(const GraphBuilder&) = delete;
  GraphBuilder& operator=(const GraphBuilder&) = delete;
  ~GraphBuilder() { cudaGraphDestroy(graph_); }

  cudaGraphConditionalHandle condition() {
    cudaGraphConditionalHandle handle;
    check(cudaGraphConditionalHandleCreate(&handle, graph_, 0, cudaGraphCondAssignDefault),
          "cudaGraphConditionalHandleCreate");
    return handle;
  }

  // Adds what `queue` launches, after all that was added before.
  void add(const Queue& queue) { last_ = capture(graph_, last_, queue); }

  // The same, where the condition holds.
  void add_if(cudaGraphConditionalHandle condition, const Queue& queue) {
    cudaGraphNodeParams parameters = {};
    parameters.type = cudaGraphNodeTypeConditional;
    parameters.conditional.handle = condition;
    parameters.conditional.type = cudaGraphCondTypeIf;
    parameters.conditional.size = 1;
    cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
    check(cudaGraphAddNode(&node, graph_, last_.data(), nullptr, last_.size(), &parameters), "cudaGraphAddNode");
#else
    check(cudaGraphAddNode(&node, graph_, last_.data(), last_.size(), &parameters), "cudaGraphAddNode");
#endif
    capture(parameters.conditional.phGraph_out[0], {}, queue);
    last_ = {node};
  }

  cudaGraphExec_t instantiate() const {
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiate(&executable, graph_, 0), "cudaGraphInstantiate");
    return executable;
  }

 private:
  using Nodes = std::vector<cudaGraphNode_t>;

  // Returns the last nodes.
  static Nodes capture(cudaGraph_t target, const Nodes& before, const Queue& queue) {
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaStreamBeginCaptureToGraph(stream, target, before.data(), nullptr, before.size(),
                                        cudaStreamCaptureModeThreadLocal),
          "cudaStreamBeginCaptureToGraph");
    queue(stream);
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

  cudaGraph_t graph_ = nullptr;
  Nodes last_;
};

}  // namespace e3::cuda
