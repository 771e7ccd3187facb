// Products of a few rows with a head that streams from memory, in fp32 or bf16 on AVX-512 registers, the sums in fp32:
//
//   logits[n][v]      = Σ_h hidden[n][h]·weight[v][h] + bias[v]
//   grad_hidden[n][h] = Σ_v grad[n][v]·weight[v][h]
//
// Both are Σ_k left[n][k]·right(j, k) with the rows n in the lanes, k counting words of 32 bits: a term of the sum in
// fp32, two of them in bf16, which one instruction multiplies and adds. `left` is transposed once, into panels [k][n]
// of up to three vectors; the head's words are broadcast, for the logits from where they lie; the sums come out
// transposed. Three vectors of rows by eight columns j are 24 sums in registers: 24 instructions for 3 + 8 loads. A sum
// is taken in pieces of kDepth words, so that a panel's piece stays in the first-level cache while the columns pass by.
#pragma once

#if defined(__AVX512F__)

#include "kernels/problem.h"
#include "simd/parallel.h"
#include "simd/prefetch_rows.h"
#include "simd/scratch.h"
#include "simd/transpose.h"
#include "simd/words.h"

namespace e3::E3_ISA_NAMESPACE {

inline constexpr int kColumns = 8;
inline constexpr int kMostVectors = 3;
inline constexpr int64_t kGroup = kMostVectors * kLanes;  // rows of a panel
inline constexpr int64_t kDepth = 128;
inline constexpr int64_t kStripe = 64;  // columns of the logits that are finished together

// The word of right(j, k) lies at data + j·column + k·word; both count elements.
template <class T>
struct Right {
  const T* data;
  int64_t column;
  int64_t word;
};

// body(first row, std::integral_constant of the vectors that its rows fill) of each group in [row, last).
template <class Body>
inline void for_each_group(int64_t row, int64_t last, const Body& body) {
  for (; row + 2 * kLanes < last; row += kGroup) body(row, std::integral_constant<int, 3>{});
  if (row + kLanes < last) return body(row, std::integral_constant<int, 2>{});
  if (row < last) body(row, std::integral_constant<int, 1>{});
}

// sum + the terms in the words of a and b.
inline Vf add_terms(Vf sum, Vu a, Vu b, float) { return fma(bits_as<Vf>(a), bits_as<Vf>(b), sum); }
#if defined(__AVX512BF16__)
inline Vf add_terms(Vf sum, Vu a, Vu b, bf16) {
  return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(a), bits_as<__m512bh>(b));
}
#endif

// sums[j][n] += Σ_k left[k][n]·right(j, k), and a step of what is read next every 16 words.
template <int kVectors, int kCount, class T>
inline void add_products(const float* left, int64_t words, const Right<T>& right, PrefetchRows& next, float* sums) {
  constexpr int kWidth = kVectors * kLanes;
  Vf sum[kCount][kVectors] = {};
  const auto add = [&](int64_t k) {
    Vu rows[kVectors];
    for (int i = 0; i < kVectors; ++i) rows[i] = load_raw<Vu>(left + k * kWidth + i * kLanes);
    for (int j = 0; j < kCount; ++j) {
      const Vu value = broadcast_word(right.data + j * right.column + k * right.word);
      for (int i = 0; i < kVectors; ++i) sum[j][i] = add_terms(sum[j][i], rows[i], value, T{});
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= words; k += kLanes) {
    next.step();
    for (int i = 0; i < kLanes; ++i) add(k + i);
  }
  for (; k < words; ++k) add(k);
  for (int j = 0; j < kCount; ++j) {
    for (int i = 0; i < kVectors; ++i, sums += kLanes) store(sums, load(sums) + sum[j][i]);
  }
}

// panel[k][n] = word k of source[n], which has `terms` terms; 0 past them and in the lanes past the last row.
template <int kVectors, class T>
inline void pack_panel(const T* source, int64_t stride, int64_t rows, int64_t terms, float* panel) {
  const int64_t words = pieces(terms, kTerms<T>);
  for (int i = 0; i < kVectors; ++i) {
    for (int64_t k = 0; k < words; k += kLanes) {
      Vu m[kLanes] = {};
      for (int64_t n = 0; n < at_most(kLanes, rows - i * kLanes); ++n) {
        const T* values = source + (i * kLanes + n) * stride + k * kTerms<T>;
        __builtin_prefetch(values + kDepth * kTerms<T>, 0, 2);
        m[n] = load_words(values, terms - k * kTerms<T>);
      }
      transpose(m);
      float* target = panel + (k * kVectors + i) * kLanes;
      for (int64_t j = 0; j < at_most(kLanes, words - k); ++j) store_raw(target + j * kVectors * kLanes, m[j]);
    }
  }
}

// Sixteen rows of the sums from column j on, transposed: m[n][j].
template <int kVectors>
inline void load_sums(const float* sums, int64_t j, int vector, Vu (&m)[kLanes]) {
  for (int64_t lane = 0; lane < kLanes; ++lane)
    m[lane] = load_raw<Vu>(sums + ((j + lane) * kVectors + vector) * kLanes);
  transpose(m);
}

// out[n][j] = sums[j][n] for `columns` columns, of which `sums` has whole lines; whole lines go past the caches.
template <int kVectors, class T>
inline void store_sums(const float* sums, int64_t columns, int64_t rows, int64_t stride, T* out) {
  constexpr int64_t kLine = kLanes * kTerms<T>;
  const bool lines = stride % kLine == 0 && reinterpret_cast<uintptr_t>(out) % kLineBytes == 0;
  for (int i = 0; i < kVectors; ++i) {
    for (int64_t j = 0; j < columns; j += kLine) {
      Vu m[kTerms<T>][kLanes];
      for (int64_t part = 0; part < kTerms<T>; ++part) load_sums<kVectors>(sums, j + part * kLanes, i, m[part]);
      for (int64_t n = 0; n < at_most(kLanes, rows - i * kLanes); ++n) {
        T* target = out + (i * kLanes + n) * stride + j;
        const Vu line = rounded_line(target, bits_as<Vf>(m[0][n]), bits_as<Vf>(m[kTerms<T> - 1][n]));
        if (lines && columns - j >= kLine) {
          _mm512_stream_si512(reinterpret_cast<__m512i*>(target), bits_as<__m512i>(line));
        } else {
          store_words(target, columns - j, line);
        }
      }
    }
  }
}

// The columns of a stripe, kColumns at a time.
template <int kVectors, class T>
inline void add_stripe(const float* left, int64_t words, Right<T> right, int64_t columns, PrefetchRows& next,
                       float* sums) {
  int64_t j = 0;
  for (; j + kColumns <= columns; j += kColumns, right.data += kColumns * right.column) {
    add_products<kVectors, kColumns>(left, words, right, next, sums + j * kVectors * kLanes);
  }
  for (; j < columns; ++j, right.data += right.column) {
    add_products<kVectors, 1>(left, words, right, next, sums + j * kVectors * kLanes);
  }
}

template <class T>
inline void linear_logits_fma(const LinearLogits& problem, const Parallel& pool) {
  const int64_t groups = pieces(problem.rows, kGroup), stride = problem.weight.stride, width = problem.width;
  const int64_t words = pieces(width, kTerms<T>), whole = width / kTerms<T>;
  const T* hidden = static_cast<const T*>(problem.hidden.data);
  const T* bias = static_cast<const T*>(problem.bias);
  const Scratch panels = new_scratch(groups * kGroup * words);
  parallel_for(pool, groups, 1, [&](int64_t first, int64_t last) {
    for_each_group(first * kGroup, at_most(last * kGroup, problem.rows), [&](int64_t row, auto vectors) {
      pack_panel<vectors()>(hidden + row * problem.hidden.stride, problem.hidden.stride, problem.rows - row, width,
                            panels.get() + row * words);
    });
  });
  parallel_for(pool, pieces(problem.vocabulary, kStripe), 4, [&](int64_t first, int64_t last) {
    const FlushSubnormals guard;
    const Scratch sums = new_scratch(kStripe * kGroup);
    const int64_t end = at_most(last * kStripe, problem.vocabulary);
    for (int64_t v = first * kStripe; v < end; v += kStripe) {
      const int64_t columns = at_most(kStripe, end - v);
      const T* weight = static_cast<const T*>(problem.weight.data) + v * stride;
      T ends[kStripe][kTerms<T>] = {};  // of rows with half a word at the end
      for (int64_t j = 0; j < columns && whole < words; ++j) ends[j][0] = weight[j * stride + width - 1];
      PrefetchRows next(weight + kStripe * stride, stride, at_most(kStripe, end - v - kStripe), width,
                        groups * words / kLanes * columns / kColumns);
      for_each_group(0, problem.rows, [&](int64_t row, auto vectors) {
        constexpr int kWidth = vectors() * kLanes;
        const float* panel = panels.get() + row * words;
        for (int64_t j = 0; j < columns; ++j) {
          const Vf start = broadcast(bias == nullptr ? 0.0f : load_one(bias + v + j));
          for (int i = 0; i < vectors(); ++i) store(sums.get() + j * kWidth + i * kLanes, start);
        }
        for (int64_t k = 0; k < whole; k += kDepth) {
          const Right<T> right{weight + k * kTerms<T>, stride, kTerms<T>};
          add_stripe<vectors()>(panel + k * kWidth, at_most(kDepth, whole - k), right, columns, next, sums.get());
        }
        if (whole < words) {
          const Right<T> right{ends[0], kTerms<T>, 0};
          add_stripe<vectors()>(panel + whole * kWidth, 1, right, columns, next, sums.get());
        }
        store_sums<vectors()>(sums.get(), columns, problem.rows - row, problem.vocabulary,
                              static_cast<T*>(problem.out) + row * problem.vocabulary + v);
      });
    }
    stream_fence();
  });
}

// Threads share out the columns h, so that no sum depends on their number. The head is read by pieces of `depth` words
// by a line of columns, which are copied: rows that lie 4 KiB apart would push each other out of the first-level cache.
// Of a wide head fewer rows at a time leave room for the next ones in the second-level cache.
template <class T>
inline void linear_grad_hidden_fma(const LinearGradHidden& problem, const Parallel& pool) {
  constexpr int64_t kLine = kLanes * kTerms<T>;
  const int64_t rows = problem.rows, stride = problem.weight.stride, lanes = pieces(rows, kGroup) * kGroup;
  const int64_t depth = problem.width > 1024 ? kDepth / 2 : kDepth, most = depth * kTerms<T>;
  const T* grad = static_cast<const T*>(problem.grad.data);
  parallel_for(pool, pieces(problem.width, kLine), 4 / kTerms<T>, [&](int64_t first, int64_t last) {
    const FlushSubnormals guard;
    const int64_t begin = first * kLine, columns = at_most(last * kLine, problem.width) - begin;
    const int64_t padded = (last - first) * kLine;
    const T* weight = static_cast<const T*>(problem.weight.data) + begin;
    const Scratch panels = new_scratch(depth * lanes), piece = new_scratch(depth * kLine),
                  sums = new_scratch(lanes * padded);
    std::memset(sums.get(), 0, lanes * padded * sizeof(float));
    for (int64_t v = 0; v < problem.vocabulary; v += most, weight += most * stride) {
      const int64_t terms = at_most(most, problem.vocabulary - v), words = pieces(terms, kTerms<T>);
      for_each_group(0, rows, [&](int64_t row, auto vectors) {
        pack_panel<vectors()>(grad + row * problem.grad.stride + v, problem.grad.stride, rows - row, terms,
                              panels.get() + row * depth);
      });
      PrefetchRows next(weight + most * stride, stride, at_most(most, problem.vocabulary - v - most), columns,
                        pieces(rows, kGroup) * padded / kColumns * words / kLanes);
      for (int64_t j = 0; j < columns; j += kLine) {
        pack_words(weight + j, stride, terms, columns - j, piece.get());
        const Right<T> right{reinterpret_cast<const T*>(piece.get()), kTerms<T>, kLine * kTerms<T>};
        for_each_group(0, rows, [&](int64_t row, auto vectors) {
          add_stripe<vectors()>(panels.get() + row * depth, words, right, kLine, next,
                                sums.get() + row * padded + j * vectors() * kLanes);
        });
      }
    }
    for_each_group(0, rows, [&](int64_t row, auto vectors) {
      store_sums<vectors()>(sums.get() + row * padded, columns, rows - row, problem.width,
                            static_cast<T*>(problem.out) + row * problem.width + begin);
    });
    stream_fence();
  });
}

}  // namespace e3::E3_ISA_NAMESPACE

#endif  // __AVX512F__
