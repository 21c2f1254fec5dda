// What a product is given: a packed weight, and rows of x in panels.
//
// Weights, in blocks of 16 output channels; a quad is 4 neighboring columns, an octet 8 (weight_packing.py makes them):
//   bytes    codes [N/16][K/4][16][4]        w + 128
//   nibbles  codes [N/16][K/8][16][4]        low nibble: columns 0-3 of an octet, high nibble: columns 4-7
//            step  [N/16][G][16]             a of each group, float32 or uint8
//            zero  [N/16][G][16]             z of each group, float32 or uint8, or none
//            offset [N/16][G/2][16][2]       two-level scales: a z of groups in pairs, uint8
//   scale, bias [N] float32, not padded
// Else N is padded to a multiple of 32, so that blocks go in pairs; K to whole quads or octets, for which x has zeros.
//
// Rows: panels of R rows, [K/4][R] quads: what a step in K needs of all rows lies together, and no two rows of a width
// that is a power of two meet in one set of a cache.

#pragma once

#include <c10/util/Half.h>

#include <algorithm>

#include "lanes.h"

namespace qcompile {

enum class Kind {
  bytes_int8,    // x int8
  dual_int8,     // x int8, two-level scales: integers up to the last step
  group_int8,    // x int8, float scales: integers within a group
  nibbles_bf16,  // x bfloat16, a table of sixteen values
  nibbles_f32,   // x float32, a table of sixteen values
  bytes_bf16,    // x bfloat16
  bytes_f32,     // x float32
};

enum class Stored { none, bytes, floats };  // how steps and zero points are stored

struct Linear {
  Kind kind;
  const u8* codes = nullptr;
  const void *step = nullptr, *zero = nullptr;
  Stored step_as = Stored::none, zero_as = Stored::none;
  const u8* offset = nullptr;
  float zero_bias = 0;  // added to every zero point
  const float *table = nullptr, *scale = nullptr, *bias = nullptr;
  i64 m = 0, n = 0, k = 0, quads = 0, group = 0;
  void* out = nullptr;
  int out_type = 0;  // 0 float32, 1 bfloat16, 2 float16

  bool is_int8() const { return kind <= Kind::group_int8; }
  bool has_nibbles() const { return kind != Kind::bytes_int8 && kind < Kind::bytes_bf16; }
  i64 columns() const { return 4 * quads; }
  i64 groups() const { return group ? (columns() + group - 1) / group : 0; }
  i64 pairs() const { return (groups() + 1) / 2; }
  i64 block_bytes() const { return quads * (has_nibbles() ? 32 : 64); }
  i64 blocks() const { return n / 32 * 2 + (n % 32 ? 2 : 0); }  // any n: it is checked by means of this
  i64 quad_size() const {  // bytes of a quad of x
    return is_int8() ? quad_bytes : kind == Kind::nibbles_bf16 || kind == Kind::bytes_bf16 ? 8 : 16;
  }
  i64 last_octet(i64 g) const { return std::min((g + 1) * group, columns()) / 8; }
};

struct Panel {
  const u8* quads;            // [K/4][R]
  const int16_t* pair_sums;   // dual_int8: minus the sum of each group, [pairs][R][2]
  const int32_t* group_sums;  // group_int8: sums, [G][R]; bytes_int8: of the whole row, [1][R]
  const float* float_sums;    // nibbles of floats: sums, [G][R]
  const float* scale;         // [R], of int8 rows
  i64 first;                  // row of x
  int rows;                   // that are there; R may be more
};

inline void store(const Linear& l, const Floats& values, i64 row, i64 column) {
  const i64 at = row * l.n + column, count = std::min<i64>(16, l.n - column);
  if (l.out_type == 0 && count == 16) return store_floats(static_cast<float*>(l.out) + at, values);
  if (l.out_type == 1 && count == 16) return store_bf16(static_cast<uint16_t*>(l.out) + at, values);
  alignas(64) float whole[16];
  store_floats(whole, values);
  for (i64 c = 0; c < count; c++) {
    if (l.out_type == 0) static_cast<float*>(l.out)[at + c] = whole[c];
    else if (l.out_type == 1) static_cast<uint16_t*>(l.out)[at + c] = to_bf16(whole[c]);
    else static_cast<c10::Half*>(l.out)[at + c] = c10::Half(whole[c]);
  }
}

inline Floats load_some(const float* at, i64 count) {
  if (count == 16) return load_floats(at);
  float values[16] = {};
  std::memcpy(values, at, count * sizeof(float));
  return load_floats(values);
}

// Sums -> values of the output: (sum x_scale) scale + bias, each rounded to float32, then to the output's dtype.
template <int R, int NB>
inline void finish(const Linear& l, const Panel& x, i64 block, Floats (&sums)[R][NB]) {
  EACH(int b = 0; b < NB; b++) {
    const i64 column = (block + b) * 16;
    if (column >= l.n) return;
    const i64 count = std::min<i64>(16, l.n - column);
    Floats scale, bias;
    if (l.scale) scale = load_some(l.scale + column, count);
    if (l.bias) bias = load_some(l.bias + column, count);
    EACH(int r = 0; r < R; r++) {
      if (r >= x.rows) break;
      Floats value = sums[r][b];
      if (l.is_int8()) value = multiply(value, floats(x.scale[r]));
      if (l.scale) value = multiply(value, scale);
      if (l.bias) value = add(value, bias);
      store(l, value, x.first + r, column);
    }
  }
}

}  // namespace qcompile
