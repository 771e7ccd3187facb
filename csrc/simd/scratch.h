// Scratch of fp32 values on whole lines of the cache.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace e3::E3_ISA_NAMESPACE {

struct AlignedDelete {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

using Scratch = std::unique_ptr<float[], AlignedDelete>;

inline Scratch new_scratch(int64_t floats) {
  return Scratch(floats == 0 ? nullptr : new (std::align_val_t{64}) float[floats]);
}

}  // namespace e3::E3_ISA_NAMESPACE
