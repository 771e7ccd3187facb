// What of a matrix is read next, on its way towards the core while a kernel computes.
#pragma once

#include "simd/parallel.h"
#include "simd/simd.h"

namespace e3::E3_ISA_NAMESPACE {

// Brings a part of the matrix's lines into the second-level cache a step, row by row, all of them in `steps` steps:
// memory serves lines that follow one another several times faster than lines of distant rows.
class PrefetchRows {
 public:
  template <class T>
  PrefetchRows(const T* first, int64_t stride, int64_t rows, int64_t columns, int64_t steps)
      : row_(reinterpret_cast<const char*>(first)),
        stride_(stride * sizeof(T)),
        bytes_(columns * sizeof(T)),
        rows_(rows),
        lines_(rows > 0 ? pieces(rows * pieces(bytes_, kLineBytes), steps > 0 ? steps : 1) : 0) {}
  void step() {
    for (int64_t line = 0; line < lines_ && rows_ > 0; ++line) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kLineBytes;
      if (at_ < bytes_) continue;
      at_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const char* row_;
  int64_t stride_, bytes_, rows_, lines_, at_ = 0;
};

}  // namespace e3::E3_ISA_NAMESPACE
