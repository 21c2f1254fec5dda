// Sums of two tiles of rows times two blocks of channels: between tiles and memory, and finished as values of the output.

#pragma once

#include "amx_blocks.h"

#if defined(QCOMPILE_TILES)
namespace qcompile {

using TileSums = float[4][256];  // int32 where they are of integers

inline void zero_sums() { zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>(); }
template <int X>
inline void load_sums(const TileSums& from) {
  load_tile<0>(from[0]), load_tile<1>(from[1]);
  if constexpr (X == 2) load_tile<2>(from[2]), load_tile<3>(from[3]);
}
template <int X>
inline void store_sums(TileSums& to) {
  store_tile<0>(to[0]), store_tile<1>(to[1]);
  if constexpr (X == 2) store_tile<2>(to[2]), store_tile<3>(to[3]);
}
inline __m512i load_ints(const float* at) { return _mm512_load_si512(at); }

enum class Put { floats, bf16, any };  // any: two blocks that end before 32 channels, or float16

// value(b, r): sums of block b for row r, times the scale of the row.
template <Put As, class Value>
inline void finish_rows(const Linear& l, i64 block, i64 first, i64 count, const Value& value) {
  const i64 column = 16 * block, n = l.n, blocks = As != Put::any || column + 16 < n ? 2 : 1;
  const bool has_scale = l.scale, has_bias = l.bias;
  Floats scale[2], bias[2];
  for (i64 b = 0; b < blocks; b++) {
    const i64 from = column + 16 * b, some = std::min<i64>(16, n - from);
    if (has_scale) scale[b] = load_some(l.scale + from, some);
    if (has_bias) bias[b] = load_some(l.bias + from, some);
  }
  auto* out = static_cast<u8*>(l.out) + (first * n + column) * (As == Put::bf16 ? 2 : 4);
  const auto put = [&](i64 r, int b) {
    Floats v = value(b, int(r));
    if (has_scale) v = multiply(v, scale[b]);
    if (has_bias) v = add(v, bias[b]);
    if constexpr (As == Put::floats) store_floats(reinterpret_cast<float*>(out) + r * n + 16 * b, v);
    else if constexpr (As == Put::bf16) store_bf16(reinterpret_cast<uint16_t*>(out) + r * n + 16 * b, v);
    else store(l, v, first + r, column + 16 * b);
  };
  i64 r = 0;
  if constexpr (As != Put::any)
    for (; r + 4 <= count; r += 4) EACH(int i = 0; i < 4; i++) EACH(int b = 0; b < 2; b++) put(r + i, b);
  for (; r < count; r++)
    for (int b = 0; b < blocks; b++) put(r, b);
}

// values(x): of tile x of rows, which is the one at t + x.
template <int X, class Values>
inline void finish_tiles(const Linear& l, i64 t, i64 block, const Values& values) {
  const bool whole = 16 * block + 32 <= l.n;
  for (int x = 0; x < X; x++) {
    const i64 first = (t + x) * 16, count = std::min<i64>(16, l.m - first);
    if (whole && l.out_type == 0) finish_rows<Put::floats>(l, block, first, count, values(x));
    else if (whole && l.out_type == 1) finish_rows<Put::bf16>(l, block, first, count, values(x));
    else finish_rows<Put::any>(l, block, first, count, values(x));
  }
}

}  // namespace qcompile
#endif
