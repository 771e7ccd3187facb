// The part of CUDA that csrc/cuda uses, on the CPU: kernels run block by block, their threads as fibers that switch at
// barriers and shuffles; streams are queues that run in an order of our choosing, bound by events alone; graphs are
// lists of launches. What a GPU leaves undefined ends the program: a barrier or shuffle that not all threads reach.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::abort();
}

// A thread of a block; it lives on for the next block. After its start, which takes system calls, it switches by jumps.
struct Fiber {
  enum State { ready, at_block, at_warp, done } state = done;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  static constexpr size_t kStack = 32 << 10;
};

inline std::deque<Fiber> fibers;
inline jmp_buf scheduler;
inline unsigned running;
inline float exchanged[1024];
inline const std::function<void()>* body;

inline void wait_at(Fiber::State state) {
  Fiber& self = fibers[running];
  self.state = state;
  if (!_setjmp(self.place)) _longjmp(scheduler, 1);
}

inline void live() {
  for (;;) {
    (*body)();
    wait_at(Fiber::done);
  }
}

inline void go_on(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.stack) _longjmp(fiber.place, 1);
  fiber.stack.reset(new char[Fiber::kStack]);
  static ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = Fiber::kStack;
  start.uc_link = nullptr;
  makecontext(&start, live, 0);
  setcontext(&start);
}

// Lets threads [first, last) go on that all wait at `state`; returns whether any did.
inline bool release(unsigned first, unsigned last, Fiber::State state) {
  unsigned waiting = 0;
  for (unsigned i = first; i < last; ++i) waiting += fibers[i].state == state;
  if (waiting == 0) return false;
  for (unsigned i = first; i < last; ++i)
    if (fibers[i].state == Fiber::done && state == Fiber::at_warp) fail("a shuffle that some lanes never reach");
  for (unsigned i = first; i < last; ++i)
    if (fibers[i].state != state && fibers[i].state != Fiber::done) return false;
  for (unsigned i = first; i < last; ++i)
    if (fibers[i].state == state) fibers[i].state = Fiber::ready;
  return true;
}

inline void run_block(const std::function<void()>& kernel) {
  static unsigned blocks = 0;
  const unsigned count = blockDim.x;
  while (fibers.size() < count) fibers.emplace_back();
  body = &kernel;
  for (unsigned i = 0; i < count; ++i) fibers[i].state = Fiber::ready;
  const bool backwards = ++blocks % 2;
  for (bool any = true; any;) {
    for (unsigned i = 0; i < count; ++i) {
      running = backwards ? count - 1 - i : i;
      if (fibers[running].state != Fiber::ready) continue;
      threadIdx = dim3(running);
      go_on(fibers[running]);
    }
    any = release(0, count, Fiber::at_block);
    for (unsigned warp = 0; warp < count; warp += 32) any |= release(warp, std::min(warp + 32, count), Fiber::at_warp);
  }
  for (unsigned i = 0; i < count; ++i)
    if (fibers[i].state != Fiber::done) fail("a barrier that some threads never reach");
}

inline void run_grid(dim3 blocks, dim3 threads, const std::function<void()>& kernel) {
  gridDim = blocks, blockDim = threads;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(kernel);
      }
}

using Work = std::function<bool()>;  // false: it must wait

struct Graph;
struct Node {
  std::function<void()> launch;
  uint64_t condition = 0;
  std::shared_ptr<Graph> inner;
};
struct Graph {
  std::deque<Node> nodes;
};

struct Stream {
  std::deque<Work> queue;
  Graph* capturing = nullptr;
};
struct Event {
  int recorded = 0, completed = 0;
};

inline std::vector<Stream*> streams;
inline std::map<uint64_t, bool> conditions;
inline int launches = 0;  // of kernels

inline void enqueue(Stream* stream, std::function<void()> work) {
  if (stream->capturing)
    stream->capturing->nodes.push_back({std::move(work), 0, nullptr});
  else
    stream->queue.push_back([work = std::move(work)] { return work(), true; });
}

inline void run_graph(const Graph& graph) {
  for (const Node& node : graph.nodes)
    if (node.launch)
      node.launch();
    else if (conditions[node.condition])
      run_graph(*node.inner);
}

// Everything that is queued, one piece of each stream in turn, the youngest stream's first.
inline void run_all() {
  for (bool any = true; any;) {
    any = false;
    for (size_t i = streams.size(); i-- > 0;)
      if (!streams[i]->queue.empty() && streams[i]->queue.front()()) {
        streams[i]->queue.pop_front();
        any = true;
      }
  }
  for (const Stream* stream : streams)
    if (!stream->queue.empty()) fail("streams that wait for each other");
}

}  // namespace cuda_on_cpu

struct CUstream_st : cuda_on_cpu::Stream {};
using cudaStream_t = CUstream_st*;
using cudaGraph_t = cuda_on_cpu::Graph*;
using cudaGraphExec_t = cuda_on_cpu::Graph*;
using cudaGraphNode_t = cuda_on_cpu::Node*;
using cudaEvent_t = cuda_on_cpu::Event*;
using cudaGraphConditionalHandle = unsigned long long;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaMemcpyHostToDevice, cudaStreamNonBlocking, cudaStreamCaptureModeThreadLocal };
enum { cudaGraphCondAssignDefault, cudaGraphNodeTypeConditional, cudaGraphCondTypeIf, cudaEventDisableTiming };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusActive };
enum {
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidDeviceFunction = 98
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};

inline void __syncthreads() { cuda_on_cpu::wait_at(cuda_on_cpu::Fiber::at_block); }

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  using namespace cuda_on_cpu;
  const unsigned self = running;
  exchanged[self] = value;
  wait_at(Fiber::at_warp);
  const float other = exchanged[self ^ unsigned(lanes)];
  wait_at(Fiber::at_warp);
  return other;
}

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 12, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) { return *out = {}, cudaSuccess; }

// Not zeros: what is not written must not be read.
template <class T>
cudaError_t cudaMalloc(T** data, size_t bytes) {
  *data = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  std::memset(static_cast<void*>(*data), 0xff, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) { return std::free(data), cudaSuccess; }

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  cuda_on_cpu::run_all();
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t stream) {
  const std::vector<char> staged(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
  cuda_on_cpu::enqueue(stream, [to, staged] { std::memcpy(to, staged.data(), staged.size()); });
  return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, int) {
  *stream = new CUstream_st;
  cuda_on_cpu::streams.push_back(*stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  cuda_on_cpu::run_all();
  std::erase(cuda_on_cpu::streams, stream);
  return delete stream, cudaSuccess;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, int) {
  return *event = new cuda_on_cpu::Event, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const int version = ++event->recorded;
  cuda_on_cpu::enqueue(stream, [event, version] { event->completed = version; });
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, int) {
  const int version = event->recorded;
  stream->queue.push_back([event, version] { return event->completed >= version; });
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  const std::tuple<Parameters...> arguments(std::forward<Arguments>(given)...);
  const dim3 blocks = config->gridDim, threads = config->blockDim;
  if (threads.x > 1024 || blocks.x == 0) cuda_on_cpu::fail("a grid that cannot be launched");
  cuda_on_cpu::enqueue(config->stream, [=] {
    ++cuda_on_cpu::launches;
    cuda_on_cpu::run_grid(blocks, threads, [&] { std::apply(kernel, arguments); });
  });
  return cudaSuccess;
}

inline cudaError_t cudaGraphCreate(cudaGraph_t* graph, int) { return *graph = new cuda_on_cpu::Graph, cudaSuccess; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, int) {
  return *out = new cuda_on_cpu::Graph(*graph), cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  cuda_on_cpu::enqueue(stream, [graph] { cuda_on_cpu::run_graph(*graph); });
  return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t*, void*,
                                                 size_t, int) {
  return stream->capturing = graph, cudaSuccess;
}
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus*, void*, void*,
                                            const cudaGraphNode_t** last, void*, size_t* count) {
  static cudaGraphNode_t node;
  node = &stream->capturing->nodes.back();
  *last = &node;
  return *count = 1, cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t*) {
  return stream->capturing = nullptr, cudaSuccess;
}

inline cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t, unsigned, int) {
  static cudaGraphConditionalHandle count = 0;
  return *handle = ++count, cudaSuccess;
}
inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
  cuda_on_cpu::conditions[handle] = value != 0;
}
struct cudaGraphNodeParams {
  int type;
  struct {
    cudaGraphConditionalHandle handle;
    int type;
    unsigned size;
    cudaGraph_t* phGraph_out;
  } conditional;
};
inline cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t*, void*, size_t,
                                    cudaGraphNodeParams* parameters) {
  static cudaGraph_t inner;
  graph->nodes.push_back({nullptr, parameters->conditional.handle, std::make_shared<cuda_on_cpu::Graph>()});
  *node = &graph->nodes.back();
  inner = (*node)->inner.get();
  parameters->conditional.phGraph_out = &inner;
  return cudaSuccess;
}
