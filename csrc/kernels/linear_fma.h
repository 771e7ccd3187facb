// Products of a few rows with a head that streams from memory, in fp32 on AVX-512 registers:
//
//   logits[n][v]      = Σ_h hidden[n][h]·weight[v][h] + bias[v]
//   grad_hidden[n][h] = Σ_v grad[n][v]·weight[v][h]
//
// Both are Σ_k left[n][k]·right(j, k) with the rows n in the lanes: `left` is transposed once, into panels [k][n] of up to
// three vectors; the head's values are broadcast, for the logits from where they lie; the sums come out transposed. Three
// vectors of rows by eight columns j are 24 sums in registers: 24 multiply-adds for 3 + 8 loads. A sum is taken in pieces of
// kDepth terms, so that a panel's piece stays in the first-level cache while the columns pass by.
#pragma once

#if defined(__AVX512F__)

#include "kernels/parallel.h"
#include "kernels/prefetch_rows.h"
#include "kernels/problem.h"
#include "kernels/token_loss.h"
#include "kernels/transpose.h"

namespace e3::E3_ISA_NAMESPACE {

inline constexpr int kColumns = 8;
inline constexpr int kMostVectors = 3;
inline constexpr int64_t kGroup = kMostVectors * kLanes;  // rows of a panel
inline constexpr int64_t kDepth = 128;
inline constexpr int64_t kStripe = 64;  // columns of the logits that are finished together

// right(j, k) = data[j·column + k·term].
struct Right {
  const float* data;
  int64_t column;
  int64_t term;
};

// body(std::integral_constant of the vectors that `rows` rows of a group fill).
template <class Body>
inline void with_vectors(int64_t rows, const Body& body) {
  if (rows > 2 * kLanes) return body(std::integral_constant<int, 3>{});
  if (rows > kLanes) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 1>{});
}

// sums[j][n] += Σ_k left[k][n]·right(j, k), and a step of what is read next every 16 terms.
template <int kVectors, int kCount>
inline void add_products(const float* left, int64_t terms, const Right& right, PrefetchRows& next, float* sums) {
  constexpr int kWidth = kVectors * kLanes;
  Vf sum[kCount][kVectors] = {};
  const auto add = [&](int64_t k) {
    Vf rows[kVectors];
    for (int i = 0; i < kVectors; ++i) rows[i] = load(left + k * kWidth + i * kLanes);
    for (int j = 0; j < kCount; ++j) {
      const Vf value = broadcast(right.data[j * right.column + k * right.term]);
      for (int i = 0; i < kVectors; ++i) sum[j][i] = fma(rows[i], value, sum[j][i]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= terms; k += kLanes) {
    next.step();
    for (int i = 0; i < kLanes; ++i) add(k + i);
  }
  for (; k < terms; ++k) add(k);
  for (int j = 0; j < kCount; ++j) {
    for (int i = 0; i < kVectors; ++i, sums += kLanes) store(sums, load(sums) + sum[j][i]);
  }
}

// panel[k][n] = source[n][k] for `terms` terms; 0 in the lanes past the last row.
template <int kVectors>
inline void pack_panel(const float* source, int64_t stride, int64_t rows, int64_t terms, float* panel) {
  for (int i = 0; i < kVectors; ++i) {
    for (int64_t k = 0; k < terms; k += kLanes) {
      Vu m[kLanes] = {};
      for (int64_t n = 0; n < at_most(kLanes, rows - i * kLanes); ++n) {
        const float* values = source + (i * kLanes + n) * stride + k;
        __builtin_prefetch(values + kDepth, 0, 2);
        m[n] = bits_as<Vu>(_mm512_maskz_loadu_ps(first_lanes<__mmask16>(terms - k), values));
      }
      transpose(m);
      float* target = panel + (k * kVectors + i) * kLanes;
      for (int64_t j = 0; j < at_most(kLanes, terms - k); ++j) store_raw(target + j * kVectors * kLanes, m[j]);
    }
  }
}

// out[n][j] = sums[j][n] for `columns` columns; whole lines go past the caches.
template <int kVectors>
inline void store_sums(const float* sums, int64_t columns, int64_t rows, int64_t stride, float* out) {
  const bool lines = stride % kLanes == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Vf) == 0;
  for (int i = 0; i < kVectors; ++i) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vu m[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) m[lane] = load_raw<Vu>(sums + ((j + lane) * kVectors + i) * kLanes);
      transpose(m);
      const __mmask16 mask = first_lanes<__mmask16>(columns - j);
      for (int64_t n = 0; n < at_most(kLanes, rows - i * kLanes); ++n) {
        float* target = out + (i * kLanes + n) * stride + j;
        const Vf values = bits_as<Vf>(m[n]);
        if (lines && mask == 0xffff) {
          stream(target, values);
        } else {
          _mm512_mask_storeu_ps(target, mask, values);
        }
      }
    }
  }
}

// The columns of a stripe, kColumns at a time.
template <int kVectors>
inline void add_stripe(const float* left, int64_t terms, Right right, int64_t columns, PrefetchRows& next, float* sums) {
  int64_t j = 0;
  for (; j + kColumns <= columns; j += kColumns, right.data += kColumns * right.column) {
    add_products<kVectors, kColumns>(left, terms, right, next, sums + j * kVectors * kLanes);
  }
  for (; j < columns; ++j, right.data += right.column) {
    add_products<kVectors, 1>(left, terms, right, next, sums + j * kVectors * kLanes);
  }
}

inline void linear_logits_fma(const LinearLogits& problem, const Parallel& pool) {
  const int64_t groups = pieces(problem.rows, kGroup), width = problem.width, stride = problem.weight.stride;
  const float* hidden = static_cast<const float*>(problem.hidden.data);
  const float* bias = static_cast<const float*>(problem.bias);
  const Scratch panels = new_scratch(groups * kGroup * width);
  parallel_for(pool, groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first * kGroup; row < at_most(last * kGroup, problem.rows); row += kGroup) {
      with_vectors(problem.rows - row, [&](auto vectors) {
        pack_panel<vectors()>(hidden + row * problem.hidden.stride, problem.hidden.stride, problem.rows - row, width,
                              panels.get() + row * width);
      });
    }
  });
  parallel_for(pool, pieces(problem.vocabulary, kStripe), 4, [&](int64_t first, int64_t last) {
    const FlushSubnormals guard;
    const Scratch sums = new_scratch(kStripe * kGroup);
    const int64_t end = at_most(last * kStripe, problem.vocabulary);
    for (int64_t v = first * kStripe; v < end; v += kStripe) {
      const int64_t columns = at_most(kStripe, end - v);
      const float* weight = static_cast<const float*>(problem.weight.data) + v * stride;
      PrefetchRows next(weight + kStripe * stride, stride, at_most(kStripe, end - v - kStripe), width,
                        groups * width / kLanes * columns / kColumns);
      for (int64_t row = 0; row < problem.rows; row += kGroup) {
        with_vectors(problem.rows - row, [&](auto vectors) {
          constexpr int kWidth = vectors() * kLanes;
          for (int64_t j = 0; j < columns; ++j) {
            const Vf start = broadcast(bias == nullptr ? 0.0f : bias[v + j]);
            for (int i = 0; i < vectors(); ++i) store(sums.get() + j * kWidth + i * kLanes, start);
          }
          for (int64_t h = 0; h < width; h += kDepth) {
            add_stripe<vectors()>(panels.get() + row * width + h * kWidth, at_most(kDepth, width - h),
                                  {weight + h, stride, 1}, columns, next, sums.get());
          }
          store_sums<vectors()>(sums.get(), columns, problem.rows - row, problem.vocabulary,
                                static_cast<float*>(problem.out) + row * problem.vocabulary + v);
        });
      }
    }
    stream_fence();
  });
}

// Threads share out the columns h, so that no sum depends on their number. The head is read by pieces of `depth` rows by 16
// columns, which are copied: rows that lie 4 KiB apart would push each other out of the first-level cache. Of a wide head
// fewer rows at a time leave room for the next ones in the second-level cache.
inline void linear_grad_hidden_fma(const LinearGradHidden& problem, const Parallel& pool) {
  const int64_t rows = problem.rows, stride = problem.weight.stride, lanes = pieces(rows, kGroup) * kGroup;
  const int64_t depth = problem.width > 1024 ? kDepth / 2 : kDepth;
  const float* grad = static_cast<const float*>(problem.grad.data);
  parallel_for(pool, pieces(problem.width, kLanes), 4, [&](int64_t first, int64_t last) {
    const FlushSubnormals guard;
    const int64_t begin = first * kLanes, columns = at_most(last * kLanes, problem.width) - begin;
    const int64_t padded = (last - first) * kLanes;
    const float* weight = static_cast<const float*>(problem.weight.data) + begin;
    const Scratch panels = new_scratch(depth * lanes), piece = new_scratch(depth * kLanes), sums = new_scratch(lanes * padded);
    std::memset(sums.get(), 0, lanes * padded * sizeof(float));
    for (int64_t v = 0; v < problem.vocabulary; v += depth, weight += depth * stride) {
      const int64_t terms = at_most(depth, problem.vocabulary - v);
      for (int64_t row = 0; row < rows; row += kGroup) {
        with_vectors(rows - row, [&](auto vectors) {
          pack_panel<vectors()>(grad + row * problem.grad.stride + v, problem.grad.stride, rows - row, terms,
                                panels.get() + row * depth);
        });
      }
      PrefetchRows next(weight + depth * stride, stride, at_most(depth, problem.vocabulary - v - depth), columns,
                        pieces(rows, kGroup) * padded / kColumns * terms / kLanes);
      for (int64_t j = 0; j < columns; j += kLanes) {
        for (int64_t k = 0; k < terms; ++k) {
          const Vf values = _mm512_maskz_loadu_ps(first_lanes<__mmask16>(columns - j), weight + k * stride + j);
          store(piece.get() + k * kLanes, values);
        }
        for (int64_t row = 0; row < rows; row += kGroup) {
          with_vectors(rows - row, [&](auto vectors) {
            add_stripe<vectors()>(panels.get() + row * depth, terms, {piece.get(), 1, kLanes}, kLanes, next,
                                  sums.get() + row * padded + j * vectors() * kLanes);
          });
        }
      }
    }
    for (int64_t row = 0; row < rows; row += kGroup) {
      with_vectors(rows - row, [&](auto vectors) {
        store_sums<vectors()>(sums.get() + row * padded, columns, rows - row, problem.width,
                              static_cast<float*>(problem.out) + row * problem.width + begin);
      });
    }
    stream_fence();
  });
}

}  // namespace e3::E3_ISA_NAMESPACE

#endif  // __AVX512F__
