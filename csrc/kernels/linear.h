// The logits of a few rows from a head that streams from memory, in bf16 on AMX tiles:
//
//   out[n][v] = Σ_h hidden[n][h]·weight[v][h] + bias[v]        the sum in fp32
//
// A left tile is 16 rows of 32 terms of the sum, a right tile 16 pairs of terms by 16 columns. The head's rows lie in memory
// as left tiles do and are used as they lie, so that nothing of the head is copied; the logits come out transposed, 16 by 16.
// The head's next rows are on their way while the tiles multiply.
#pragma once

#if defined(__AMX_BF16__)

#include <utility>

#include "kernels/block.h"
#include "kernels/token_loss.h"

namespace e3::E3_ISA_NAMESPACE {

inline constexpr int kTile = 16;  // rows or columns of a tile
inline constexpr int kPair = 2 * kTile;
inline constexpr int kDepth = 32;  // terms of the sum in a tile
inline constexpr int kTileWords = kTile * kTile;
inline constexpr int64_t kTileBytes = 1024, kRowBytes = 64;

inline int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Every tile with 16 rows of 64 bytes, while the guard lives.
class TileConfiguration {
 public:
  TileConfiguration() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    for (int tile = 0; tile < 8; ++tile) layout.row_bytes[tile] = kRowBytes, layout.rows[tile] = kTile;
    _tile_loadconfig(&layout);
  }
  ~TileConfiguration() { _tile_release(); }
};

// Brings a matrix towards the core, a part of its lines a call.
class PrefetchRows {
 public:
  PrefetchRows(const bf16* first, int64_t stride, int64_t rows, int64_t columns, int64_t calls)
      : row_(reinterpret_cast<const char*>(first)),
        stride_(stride * sizeof(bf16)),
        bytes_(columns * sizeof(bf16)),
        rows_(rows),
        lines_(rows > 0 ? pieces(rows * pieces(bytes_, kRowBytes), calls) : 0) {}
  void step() {
    for (int64_t line = 0; line < lines_ && rows_ > 0; ++line) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kRowBytes;
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

// Where a tile of each step of 32 terms lies: `step` bytes from one to the next, `row` bytes from row to row.
struct Tiles {
  const char* data;
  int64_t step;
  int64_t row;
};

// The first `count` of 32 values, 0 in the others.
inline __m512i load_some(const bf16* source, int64_t count) {
  const __mmask32 mask = count >= kDepth ? ~__mmask32{0} : (__mmask32{1} << (count > 0 ? count : 0)) - 1;
  return _mm512_maskz_loadu_epi16(mask, source);
}

// Left tiles of up to 16 rows with `depth` terms of the sum; 0 past the ends.
inline void pack_rows(const bf16* source, int64_t stride, int64_t rows, int64_t depth, char* tiles) {
  for (int64_t row = 0; row < kTile; ++row, source += stride) {
    char* target = tiles + row * kRowBytes;
    for (int64_t k = 0; k < depth; k += kDepth, target += kTileBytes) {
      store_raw(target, row < rows ? load_some(source + k, depth - k) : __m512i{});
    }
  }
}

template <uint32_t kStride, size_t... kLane>
inline void exchange(Vu (&m)[kTile], std::index_sequence<kLane...>) {
  constexpr Vu low{(kLane & kStride ? kTile + kLane - kStride : kLane)...};
  constexpr Vu high{(kLane & kStride ? kTile + kLane : kLane + kStride)...};
  for (uint32_t i = 0; i < kTile; ++i) {
    if (i & kStride) continue;
    const __m512i a = bits_as<__m512i>(m[i]), b = bits_as<__m512i>(m[i + kStride]);
    m[i] = bits_as<Vu>(_mm512_permutex2var_epi32(a, bits_as<__m512i>(low), b));
    m[i + kStride] = bits_as<Vu>(_mm512_permutex2var_epi32(a, bits_as<__m512i>(high), b));
  }
}

// A matrix of 16 by 16 words, transposed.
inline void transpose(const void* source, Vu (&m)[kTile]) {
  for (int i = 0; i < kTile; ++i) m[i] = load_raw<Vu>(static_cast<const char*>(source) + kRowBytes * i);
  constexpr std::make_index_sequence<kTile> lanes;
  exchange<8>(m, lanes);
  exchange<4>(m, lanes);
  exchange<2>(m, lanes);
  exchange<1>(m, lanes);
}

// Adds Σ A[i]·B[j] over `steps` steps to C[i][j], tiles 0 to 3 row by row; with kColumns = 1 there is no B[1].
template <int kColumns>
void multiply(const Tiles (&a)[2], const char* b0, const char* b1, int64_t steps) {
  const char *a0 = a[0].data, *a1 = a[1].data;
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a0, a[0].row);
    _tile_loadd(6, b0, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b1, kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_loadd(5, a1, a[1].row);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    a0 += a[0].step;
    a1 += a[1].step;
    b0 += kTileBytes;
    b1 += kTileBytes;
  }
}

// GCC does not know what its tile loads and stores read and write.
inline void order_memory() { __asm__ volatile("" ::: "memory"); }

// The four tiles C[i][j] at `c` = Σ A[i]·B[j] over `steps` steps; B[1] may be null.
inline void multiply_pairs(const Tiles (&a)[2], const char* b0, const char* b1, int64_t steps, float* c) {
  order_memory();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  b1 == nullptr ? multiply<1>(a, b0, b0, steps) : multiply<2>(a, b0, b1, steps);
  _tile_stored(0, c, kRowBytes);
  _tile_stored(1, c + kTileWords, kRowBytes);
  _tile_stored(2, c + 2 * kTileWords, kRowBytes);
  _tile_stored(3, c + 3 * kTileWords, kRowBytes);
  order_memory();
}

inline Scratch new_tiles(int64_t count) { return new_scratch(count * kTileBytes / 4); }
inline char* bytes_of(const Scratch& scratch) { return reinterpret_cast<char*>(scratch.get()); }

// `value` to the columns of a row that are there.
inline void store_some(Vf value, int64_t columns, bf16* target) {
  if (columns >= kLanes) return store(target, value);
  for (int64_t i = 0; i < columns; ++i) store_one(target + i, value[i]);
}

// Columns [v, v + 32) of 16 rows of logits from two transposed tiles of sums.
inline void store_logits(const LinearLogits& problem, const float* first, const float* second, int64_t row, int64_t v) {
  const int64_t columns = problem.vocabulary - v;
  bf16* target = static_cast<bf16*>(problem.out) + row * problem.vocabulary + v;
  const bool lines = problem.vocabulary % kPair == 0 && reinterpret_cast<uintptr_t>(target) % kRowBytes == 0;
  alignas(64) bf16 bias[kPair] = {};
  if (problem.bias != nullptr) store_raw(bias, load_some(static_cast<const bf16*>(problem.bias) + v, columns));
  Vu words[2][kTile];
  transpose(first, words[0]);
  transpose(second, words[1]);
  for (int64_t n = 0; n < kTile && row + n < problem.rows; ++n, target += problem.vocabulary) {
    const Vf low = bits_as<Vf>(words[0][n]) + load(bias), high = bits_as<Vf>(words[1][n]) + load(bias + kTile);
    if (lines) {
      stream(target, low, high);
    } else {
      store_some(low, columns, target);
      store_some(high, columns - kTile, target + kTile);
    }
  }
}

inline void linear_logits(const LinearLogits& problem, const Parallel& pool) {
  const int64_t steps = pieces(problem.width, kDepth), groups = pieces(problem.rows, kTile), panel = steps * kTileBytes;
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
        transpose(tiles, words);
        std::memcpy(tiles, words, kTileBytes);
      }
    }
  });
  parallel_for(pool, pieces(problem.vocabulary, kPair), 8, [&](int64_t first, int64_t last) {
    const TileConfiguration configuration;
    const Scratch packed = new_tiles(2 * steps), sums = new_tiles(4);
    const int64_t end = last * kPair < problem.vocabulary ? last * kPair : problem.vocabulary;
    for (int64_t v = first * kPair; v < end; v += kPair) {
      Tiles a[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t row = v + i * kTile, rows = problem.vocabulary - row;
        a[i] = {reinterpret_cast<const char*>(weight + row * stride), kRowBytes, stride * 2};
        if (rows >= kTile && problem.width % kDepth == 0) continue;
        a[i] = {bytes_of(packed) + i * panel, kTileBytes, kRowBytes};
        pack_rows(weight + row * stride, stride, rows, problem.width, bytes_of(packed) + i * panel);
      }
      const int64_t ahead = end - v - kPair;
      PrefetchRows next(weight + (v + kPair) * stride, stride, ahead < kPair ? ahead : kPair, problem.width,
                        pieces(groups, 2));
      for (int64_t group = 0; group < groups; group += 2) {
        const char* pairs = bytes_of(right) + group * panel;
        const bool two = group + 1 < groups;
        next.step();
        float* c = sums.get();
        multiply_pairs(a, pairs, two ? pairs + panel : nullptr, steps, c);
        store_logits(problem, c, c + 2 * kTileWords, group * kTile, v);
        if (two) store_logits(problem, c + kTileWords, c + 3 * kTileWords, (group + 1) * kTile, v);
      }
    }
    stream_fence();
  });
}

}  // namespace e3::E3_ISA_NAMESPACE

#endif  // __AMX_BF16__
