// Products of a few rows with a head that streams from memory, in bf16 on AMX tiles, the sums in fp32:
//
//   logits[n][v]      = Σ_h hidden[n][h]·weight[v][h] + bias[v]
//   grad_hidden[n][h] = Σ_v grad[n][v]·weight[v][h]
//
// A left tile is 16 rows of 32 terms of the sum, a right tile 16 pairs of terms by 16 columns. For the logits the
// head's rows lie in memory as left tiles do and are used as they lie, so that nothing of the head is copied; the
// logits come out transposed, 16 by 16. For the gradient two rows of the head at a time are interleaved to right tiles,
// once for all rows of the gradient. What is read next of the head is on its way while the tiles multiply.
#pragma once

#if defined(__AMX_BF16__)

#include "kernels/problem.h"
#include "simd/parallel.h"
#include "simd/prefetch_rows.h"
#include "simd/scratch.h"
#include "simd/transpose.h"
#include "simd/words.h"

namespace e3::E3_ISA_NAMESPACE {

inline constexpr int kTile = 16;  // rows or columns of a tile
inline constexpr int kPair = 2 * kTile;
inline constexpr int kTileDepth = 32;  // terms of the sum in a tile
inline constexpr int kTileWords = kTile * kTile;
inline constexpr int64_t kTileBytes = kTile * kLineBytes;

// Every tile with 16 rows of 64 bytes, while the guard lives.
class TileConfiguration {
 public:
  TileConfiguration() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    for (int tile = 0; tile < 8; ++tile) layout.row_bytes[tile] = kLineBytes, layout.rows[tile] = kTile;
    _tile_loadconfig(&layout);
  }
  ~TileConfiguration() { _tile_release(); }
};

// Where a tile of each step of 32 terms lies: `step` bytes from one to the next, `row` bytes from row to row.
struct Tiles {
  const char* data;
  int64_t step;
  int64_t row;
};

// Left tiles of up to 16 rows with `depth` terms of the sum; 0 past the ends.
inline void pack_rows(const bf16* source, int64_t stride, int64_t rows, int64_t depth, char* tiles) {
  for (int64_t row = 0; row < kTile; ++row, source += stride) {
    char* target = tiles + row * kLineBytes;
    for (int64_t k = 0; k < depth; k += kTileDepth, target += kTileBytes) {
      store_raw(target, row < rows ? load_words(source + k, depth - k) : Vu{});
    }
  }
}

// A tile's words, row by row.
inline void load_tile(const void* source, Vu (&m)[kTile]) {
  for (int i = 0; i < kTile; ++i) m[i] = load_raw<Vu>(static_cast<const char*>(source) + kLineBytes * i);
}

// Adds Σ A[i]·B[j] over `steps` steps to the tiles C[i][j], 0 to 3 row by row, for kRows tiles A and kColumns tiles B.
template <int kRows, int kColumns>
inline void multiply(const Tiles (&a)[2], const char* b0, const char* b1, int64_t steps, PrefetchRows& next) {
  const char *a0 = a[0].data, *a1 = a[1].data;
  for (int64_t step = 0; step < steps; ++step) {
    next.step();
    _tile_loadd(4, a0, a[0].row);
    _tile_loadd(6, b0, kLineBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b1, kLineBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, a1, a[1].row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
    a0 += a[0].step;
    a1 += a[1].step;
    b0 += kTileBytes;
    b1 += kTileBytes;
  }
}

// GCC does not know what its tile loads and stores read and write.
inline void order_memory() { __asm__ volatile("" ::: "memory"); }

// Adds the products to the four tiles C[i][j] at `c`, which `fresh` sets to 0 first.
template <int kRows, int kColumns>
inline void add_pairs(const Tiles (&a)[2], const char* b0, const char* b1, int64_t steps, bool fresh,
                      PrefetchRows& next, float* c) {
  order_memory();
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, kLineBytes);
    _tile_loadd(1, c + kTileWords, kLineBytes);
    _tile_loadd(2, c + 2 * kTileWords, kLineBytes);
    _tile_loadd(3, c + 3 * kTileWords, kLineBytes);
  }
  multiply<kRows, kColumns>(a, b0, b1, steps, next);
  _tile_stored(0, c, kLineBytes);
  _tile_stored(1, c + kTileWords, kLineBytes);
  _tile_stored(2, c + 2 * kTileWords, kLineBytes);
  _tile_stored(3, c + 3 * kTileWords, kLineBytes);
  order_memory();
}

inline Scratch new_tiles(int64_t count) { return new_scratch(count * kTileBytes / 4); }
inline char* bytes_of(const Scratch& scratch) { return reinterpret_cast<char*>(scratch.get()); }

// Columns [v, v + 32) of 16 rows of logits from two transposed tiles of sums.
inline void store_logits(const LinearLogits& problem, const float* first, const float* second, int64_t row, int64_t v) {
  const int64_t columns = problem.vocabulary - v;
  bf16* target = static_cast<bf16*>(problem.out) + row * problem.vocabulary + v;
  const bool lines = problem.vocabulary % kPair == 0 && reinterpret_cast<uintptr_t>(target) % kLineBytes == 0;
  alignas(64) bf16 bias[kPair] = {};
  if (problem.bias != nullptr) store_raw(bias, load_words(static_cast<const bf16*>(problem.bias) + v, columns));
  Vu words[2][kTile];
  load_tile(first, words[0]);
  load_tile(second, words[1]);
  transpose(words[0]);
  transpose(words[1]);
  for (int64_t n = 0; n < kTile && row + n < problem.rows; ++n, target += problem.vocabulary) {
    const Vf low = bits_as<Vf>(words[0][n]) + load(bias), high = bits_as<Vf>(words[1][n]) + load(bias + kTile);
    if (lines) {
      stream(target, low, high);
    } else {
      store_words(target, columns, rounded_line(target, low, high));
    }
  }
}

inline void linear_logits_amx(const LinearLogits& problem, const Parallel& pool) {
  const int64_t steps = pieces(problem.width, kTileDepth), groups = pieces(problem.rows, kTile),
                panel = steps * kTileBytes;
  const bf16* hidden = static_cast<const bf16*>(problem.hidden.data);
  const bf16* weight = static_cast<const bf16*>(problem.weight.data);
  const int64_t stride = problem.weight.stride;
  const Scratch right = new_tiles(groups * steps);
  parallel_for(pool, groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
      char* tiles = bytes_of(right) + group * panel;
      const int64_t row = group * kTile;
      pack_rows(hidden + row * problem.hidden.stride, problem.hidden.stride, problem.rows - row, problem.width, tiles);
      for (int64_t step = 0; step < steps; ++step, tiles += kTileBytes) {
        Vu words[kTile];
        load_tile(tiles, words);
        transpose(words);
        std::memcpy(tiles, words, kTileBytes);
      }
    }
  });
  parallel_for(pool, pieces(problem.vocabulary, kPair), 8, [&](int64_t first, int64_t last) {
    const TileConfiguration configuration;
    const Scratch packed = new_tiles(2 * steps), sums = new_tiles(4);
    const int64_t end = at_most(last * kPair, problem.vocabulary);
    for (int64_t v = first * kPair; v < end; v += kPair) {
      Tiles a[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t row = v + i * kTile, rows = problem.vocabulary - row;
        a[i] = {reinterpret_cast<const char*>(weight + row * stride), kLineBytes, stride * 2};
        if (rows >= kTile && problem.width % kTileDepth == 0) continue;
        a[i] = {bytes_of(packed) + i * panel, kTileBytes, kLineBytes};
        pack_rows(weight + row * stride, stride, rows, problem.width, bytes_of(packed) + i * panel);
      }
      PrefetchRows next(weight + (v + kPair) * stride, stride, at_most(kPair, end - v - kPair), problem.width,
                        pieces(groups, 2) * steps);
      for (int64_t group = 0; group < groups; group += 2) {
        const char* pairs = bytes_of(right) + group * panel;
        const bool two = group + 1 < groups;
        float* c = sums.get();
        two ? add_pairs<2, 2>(a, pairs, pairs + panel, steps, true, next, c)
            : add_pairs<2, 1>(a, pairs, pairs, steps, true, next, c);
        store_logits(problem, c, c + 2 * kTileWords, group * kTile, v);
        if (two) store_logits(problem, c + kTileWords, c + 3 * kTileWords, (group + 1) * kTile, v);
      }
    }
    stream_fence();
  });
}

// Right tiles of 32 terms by 32 columns: rows 2i and 2i + 1 of the source, interleaved value by value. Of every 8
// columns the first four go to the first tile, the others to the second.
inline void pack_pairs(const bf16* source, int64_t stride, int64_t terms, int64_t columns, char* first, char* second) {
  for (int64_t term = 0; term < kTileDepth;
       term += 2, source += 2 * stride, first += kLineBytes, second += kLineBytes) {
    const auto even = bits_as<__m512i>(term < terms ? load_words(source, columns) : Vu{});
    const auto odd = bits_as<__m512i>(term + 1 < terms ? load_words(source + stride, columns) : Vu{});
    store_raw(first, _mm512_unpacklo_epi16(even, odd));
    store_raw(second, _mm512_unpackhi_epi16(even, odd));
  }
}

// 16 rows by 32 columns of `out` from two tiles of sums whose columns pack_pairs has dealt out.
inline void store_grad_hidden(const LinearGradHidden& problem, const float* first, const float* second, int64_t row,
                              int64_t h) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const int64_t columns = problem.width - h;
  bf16* target = static_cast<bf16*>(problem.out) + row * problem.width + h;
  for (int64_t n = 0; n < at_most(kTile, problem.rows - row); ++n, target += problem.width) {
    const auto dealt = bits_as<__m512i>(rounded_line(target, load(first + n * kTile), load(second + n * kTile)));
    store_words(target, columns, bits_as<Vu>(_mm512_permutexvar_epi64(order, dealt)));
  }
}

// out = grad·weight: terms v, of which kTerms are multiplied at a time. Threads share out the columns h, so that no sum
// depends on their number.
inline void linear_grad_hidden_amx(const LinearGradHidden& problem, const Parallel& pool) {
  constexpr int64_t kTerms = 128, kSteps = kTerms / kTileDepth, kPanel = kSteps * kTileBytes;
  const int64_t groups = pieces(problem.rows, kTile), pairs = pieces(groups, 2), stride = problem.weight.stride;
  const bf16* grad = static_cast<const bf16*>(problem.grad.data);
  parallel_for(pool, pieces(problem.width, kPair), 2, [&](int64_t first, int64_t last) {
    const TileConfiguration configuration;
    const Scratch left = new_tiles(groups * kSteps), right = new_tiles(2 * kSteps),
                  sums = new_tiles((last - first) * pairs * 4);
    for (int64_t v = 0; v < problem.vocabulary; v += kTerms) {
      const int64_t terms = at_most(kTerms, problem.vocabulary - v), steps = pieces(terms, kTileDepth);
      const bf16* weight = static_cast<const bf16*>(problem.weight.data) + v * stride;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t row = group * kTile;
        pack_rows(grad + row * problem.grad.stride + v, problem.grad.stride, problem.rows - row, terms,
                  bytes_of(left) + group * kPanel);
      }
      PrefetchRows next(weight + kTerms * stride + first * kPair, stride,
                        at_most(kTerms, problem.vocabulary - v - kTerms),
                        at_most(last * kPair, problem.width) - first * kPair, (last - first) * pairs * steps);
      float* c = sums.get();
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t h = unit * kPair;
        char *b0 = bytes_of(right), *b1 = b0 + kPanel;
        for (int64_t step = 0; step < steps; ++step) {
          pack_pairs(weight + step * kTileDepth * stride + h, stride, terms - step * kTileDepth, problem.width - h,
                     b0 + step * kTileBytes, b1 + step * kTileBytes);
        }
        for (int64_t group = 0; group < groups; group += 2, c += 4 * kTileWords) {
          const char* rows = bytes_of(left) + group * kPanel;
          const Tiles a[2] = {{rows, kTileBytes, kLineBytes}, {rows + kPanel, kTileBytes, kLineBytes}};
          group + 1 < groups ? add_pairs<2, 2>(a, b0, b1, steps, v == 0, next, c)
                             : add_pairs<1, 2>(a, b0, b1, steps, v == 0, next, c);
        }
      }
    }
    const float* c = sums.get();
    for (int64_t unit = first; unit < last; ++unit) {
      for (int64_t group = 0; group < 2 * pairs; ++group, c += 2 * kTileWords) {
        store_grad_hidden(problem, c, c + kTileWords, group * kTile, unit * kPair);
      }
    }
  });
}

}  // namespace e3::E3_ISA_NAMESPACE

#endif  // __AMX_BF16__
