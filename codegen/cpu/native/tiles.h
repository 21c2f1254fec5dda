// R rows of x times NB blocks of 16 channels, over all of K, with every sum in registers.
//
// Every function also fetches `Ahead` lines of the blocks to come for each line that it reads: memory is then never
// waited for. An inner loop reads a line of codes and the same columns of R rows.

#pragma once

#include "linear.h"

namespace qcompile {

template <int R, int NB, class V, class Value>
inline void fill(V (&sums)[R][NB], Value value) {
  EACH(int r = 0; r < R; r++) EACH(int b = 0; b < NB; b++) sums[r][b] = value(r);
}

template <int R, int NB, class V>
inline void fill_from(const V (&sums)[R][NB], V (&to)[R][NB]) {
  EACH(int r = 0; r < R; r++) EACH(int b = 0; b < NB; b++) to[r][b] = sums[r][b];
}

inline Floats load_parts(const void* parts, Stored as, i64 at) {
  return as == Stored::bytes ? load_floats(static_cast<const u8*>(parts) + at)
                             : load_floats(static_cast<const float*>(parts) + at);
}

// ---- x int8 ----------------------------------------------------------------------------------------------------------

template <int R, int NB, int Ahead>
inline void add_bytes(const u8* w, i64 stride, const u8* x, i64 quads, const u8* next, Ints (&sums)[R][NB]) {
  for (i64 q = 0; q < quads; q++) {
    Bytes codes[NB];
    EACH(int b = 0; b < NB; b++) codes[b] = load_bytes(w + b * stride + q * 64);
    EACH(int b = 0; b < Ahead; b++) prefetch(next + b * stride + q * 64);
    EACH(int r = 0; r < R; r++) {
      const Quad v = load_quad(x + (q * R + r) * quad_bytes);
      EACH(int b = 0; b < NB; b++) dot(sums[r][b], codes[b], v);
    }
  }
}

// Codes of octets [first, last) times rows, each times its step where there is one.
template <int R, int NB, int Ahead, bool Scaled>
inline void add_nibbles(const Linear& l, const u8* w, i64 first, i64 last, const Steps* steps, const u8* x, const u8* next,
                        Ints (&sums)[R][NB]) {
  const i64 stride = l.block_bytes();
  for (i64 t = first; t < last; t++) {
    Bytes low[NB], high[NB];
    EACH(int b = 0; b < NB; b++) {
      load_nibbles(w + b * stride + t * 64, low[b], high[b]);
      if (Scaled) scale(low[b], steps[b]), scale(high[b], steps[b]);
    }
    EACH(int b = 0; b < Ahead; b++) prefetch(next + b * stride + t * 64);
    const u8* at = x + 2 * t * R * quad_bytes;
    EACH(int r = 0; r < R; r++) {
      const Quad v = load_quad(at + r * quad_bytes);
      EACH(int b = 0; b < NB; b++) dot(sums[r][b], low[b], v);
    }
    EACH(int r = 0; r < R; r++) {
      const Quad v = load_quad(at + (R + r) * quad_bytes);
      EACH(int b = 0; b < NB; b++) dot(sums[r][b], high[b], v);
    }
  }
}

// Bytes are w + 128, so the sums start at -128 sum(x).
template <int R, int NB, int Ahead>
inline void bytes_product(const Linear& l, const Panel& x, i64 block, const u8* next, Ints (&sums)[R][NB]) {
  fill(sums, [&](int r) { return ints(int32_t(-128u * uint32_t(x.group_sums[r]))); });
  add_bytes<R, NB, Ahead>(l.codes + block * l.block_bytes(), l.block_bytes(), x.quads, l.quads, next, sums);
}

// sum over groups of a (q - z) x: a q fits a byte, and two groups' a z sum(x) are one instruction.
template <int R, int NB, int Ahead>
inline void dual_product(const Linear& l, const Panel& x, i64 block, const u8* expanded, const u8* next, Ints (&sums)[R][NB]) {
  fill(sums, [](int) { return ints(0); });
  for (i64 p = 0; p < l.pairs(); p++)
    EACH(int r = 0; r < R; r++) EACH(int b = 0; b < NB; b++)
    dot_pair(sums[r][b], l.offset + ((block + b) * l.pairs() + p) * 32, x.pair_sums + (p * R + r) * 2);
  if (expanded) return add_bytes<R, NB, 1>(expanded, 64 * l.quads, x.quads, l.quads, next, sums);
  for (i64 g = 0, t = 0; g < l.groups(); g++) {
    Steps steps[NB];
    EACH(int b = 0; b < NB; b++) steps[b] = load_steps(static_cast<const u8*>(l.step) + ((block + b) * l.groups() + g) * 16);
    const i64 last = l.last_octet(g);
    add_nibbles<R, NB, Ahead, true>(l, l.codes + block * l.block_bytes(), t, last, steps, x.quads, next, sums);
    t = last;
  }
}

inline Floats minus_zero(const Linear& l, i64 at) {
  if (l.zero_as == Stored::none) return floats(-l.zero_bias);
  return multiply(add(load_parts(l.zero, l.zero_as, at), floats(l.zero_bias)), floats(-1));
}

inline Floats to_floats(const Floats& sum) { return sum; }

// total += a (sums - z sum(x)), one group; x_sums: of its rows.
template <int R, int NB, class V, class X>
inline void add_group(const Linear& l, const X* x_sums, i64 block, i64 g, const V (&sums)[R][NB], Floats (&total)[R][NB]) {
  EACH(int b = 0; b < NB; b++) {
    const i64 at = ((block + b) * l.groups() + g) * 16;
    const Floats step = load_parts(l.step, l.step_as, at), zero = minus_zero(l, at);
    EACH(int r = 0; r < R; r++) {
      Floats value = to_floats(sums[r][b]);
      multiply_add(value, zero, floats(float(x_sums[g * R + r])));
      multiply_add(total[r][b], step, value);
    }
  }
}

// sum over groups of a (sum q x - z sum x), integers within a group.
template <int R, int NB, int Ahead>
inline void group_product(const Linear& l, const Panel& x, i64 block, const u8* next, Floats (&total)[R][NB]) {
  fill(total, [](int) { return floats(0); });
  for (i64 g = 0, t = 0; g < l.groups(); g++) {
    Ints sums[R][NB];
    fill(sums, [](int) { return ints(0); });
    const i64 last = l.last_octet(g);
    add_nibbles<R, NB, Ahead, false>(l, l.codes + block * l.block_bytes(), t, last, nullptr, x.quads, next, sums);
    t = last;
    add_group(l, x.group_sums, block, g, sums, total);
  }
}

// ---- x float -----------------------------------------------------------------------------------------------------------

// The column of a quad that the bits from Shift on stand for, times rows.
template <int Shift, int R, int NB>
inline void add_column(const Table& table, const Bytes (&packed)[NB], const u8* x, Floats (&sums)[R][NB]) {
  Floats values[NB];
  EACH(int b = 0; b < NB; b++) values[b] = look_up<Shift>(table, packed[b]);
  EACH(int r = 0; r < R; r++) {
    const Floats v = floats(read<float>(x + 16 * r + Shift / 8 * 4));
    EACH(int b = 0; b < NB; b++) multiply_add(sums[r][b], values[b], v);
  }
}

template <int R, int NB, int Ahead>
inline void nibbles_f32(const Linear& l, const Panel& x, i64 block, const u8* next, Floats (&total)[R][NB]) {
  const Table table = load_table(l.table);
  const i64 stride = l.block_bytes();
  const u8* w = l.codes + block * stride;
  fill(total, [](int) { return floats(0); });
  for (i64 g = 0, t = 0; g < l.groups(); g++) {
    Floats sums[R][NB];
    fill(sums, [](int) { return floats(0); });
    for (const i64 last = l.last_octet(g); t < last; t++) {
      Bytes packed[NB];
      EACH(int b = 0; b < NB; b++) packed[b] = load_bytes(w + b * stride + t * 64);
      EACH(int b = 0; b < Ahead; b++) prefetch(next + b * stride + t * 64);
      const u8 *low = x.quads + 2 * t * R * 16, *high = low + R * 16;
      add_column<0>(table, packed, low, sums), add_column<8>(table, packed, low, sums);
      add_column<16>(table, packed, low, sums), add_column<24>(table, packed, low, sums);
      add_column<4>(table, packed, high, sums), add_column<12>(table, packed, high, sums);
      add_column<20>(table, packed, high, sums), add_column<28>(table, packed, high, sums);
    }
    add_group(l, x.float_sums, block, g, sums, total);
  }
}

template <int Shift, int R, int NB>
inline void add_byte_column(const Bytes (&codes)[NB], const u8* x, Floats (&sums)[R][NB]) {
  Floats values[NB];
  EACH(int b = 0; b < NB; b++) values[b] = byte_to_floats<Shift>(codes[b]);
  EACH(int r = 0; r < R; r++) {
    const Floats v = floats(read<float>(x + 16 * r + Shift / 8 * 4));
    EACH(int b = 0; b < NB; b++) multiply_add(sums[r][b], values[b], v);
  }
}

template <int R, int NB, int Ahead>
inline void bytes_f32(const Linear& l, const Panel& x, i64 block, const u8* next, Floats (&total)[R][NB]) {
  const i64 stride = l.block_bytes();
  const u8* w = l.codes + block * stride;
  Floats sums[R][NB];  // not `total`, whose address is known elsewhere: it would not stay in registers
  fill(sums, [](int) { return floats(0); });
  for (i64 q = 0; q < l.quads; q++) {
    Bytes codes[NB];
    EACH(int b = 0; b < NB; b++) codes[b] = load_bytes(w + b * stride + q * 64);
    EACH(int b = 0; b < Ahead; b++) prefetch(next + b * stride + q * 64);
    const u8* at = x.quads + q * R * 16;
    add_byte_column<0>(codes, at, sums), add_byte_column<8>(codes, at, sums);
    add_byte_column<16>(codes, at, sums), add_byte_column<24>(codes, at, sums);
  }
  fill_from(sums, total);
}

// Floats [K][16] of a block that was dequantized before, times rows.
template <int R, int NB>
inline void add_floats(const float* w, i64 columns, const u8* x, const u8* next, Floats (&total)[R][NB]) {
  Floats sums[R][NB];  // not `total`, whose address is known elsewhere: it would not stay in registers
  fill(sums, [](int) { return floats(0); });
  for (i64 c = 0; c < columns; c++) {
    Floats values[NB];
    EACH(int b = 0; b < NB; b++) values[b] = load_floats(w + (b * columns + c) * 16);
    if (c % 8 == 0) prefetch(next + c * 8);
    EACH(int r = 0; r < R; r++) {
      const Floats v = floats(read<float>(x + (c / 4 * R + r) * 16 + c % 4 * 4));
      EACH(int b = 0; b < NB; b++) multiply_add(sums[r][b], values[b], v);
    }
  }
  fill_from(sums, total);
}

#if defined(QCOMPILE_BF16_PRODUCTS)

inline __m512i spread_pair(const u8* at) { return _mm512_set1_epi32(read<int32_t>(at)); }

// Two columns of a quad, as add_column.
template <int Shift, int R, int NB>
inline void add_pair(const PairTable& table, const Bytes (&packed)[NB], const u8* x, Floats (&sums)[R][NB]) {
  __m512i values[NB];
  EACH(int b = 0; b < NB; b++) values[b] = look_up<Shift>(table, packed[b]);
  EACH(int r = 0; r < R; r++) {
    const __m512i v = spread_pair(x + 8 * r + Shift / 8 * 4);
    EACH(int b = 0; b < NB; b++) dot(sums[r][b], values[b], v);
  }
}

// A word holds columns 0 and 2, or 1 and 3 of its quad: rows come in this order, k0 k2 k1 k3.
template <int R, int NB, int Ahead>
inline void nibbles_bf16(const Linear& l, const Panel& x, i64 block, const u8* next, Floats (&total)[R][NB]) {
  const PairTable table = load_pair_table(l.table);
  const i64 stride = l.block_bytes();
  const u8* w = l.codes + block * stride;
  fill(total, [](int) { return floats(0); });
  for (i64 g = 0, t = 0; g < l.groups(); g++) {
    Floats sums[R][NB];
    fill(sums, [](int) { return floats(0); });
    for (const i64 last = l.last_octet(g); t < last; t++) {
      Bytes packed[NB];
      EACH(int b = 0; b < NB; b++) packed[b] = load_bytes(w + b * stride + t * 64);
      EACH(int b = 0; b < Ahead; b++) prefetch(next + b * stride + t * 64);
      const u8 *low = x.quads + 2 * t * R * 8, *high = low + R * 8;
      add_pair<0>(table, packed, low, sums), add_pair<8>(table, packed, low, sums);
      add_pair<4>(table, packed, high, sums), add_pair<12>(table, packed, high, sums);
    }
    add_group(l, x.float_sums, block, g, sums, total);
  }
}

// w = 16 h + l with nibbles h - 8 and l, both exact in bfloat16: two lookups and two products for each word.
template <int R, int NB, int Ahead>
inline void bytes_bf16(const Linear& l, const Panel& x, i64 block, const u8* next, Floats (&total)[R][NB]) {
  alignas(64) float low_values[16], high_values[16];
  for (int i = 0; i < 16; i++) low_values[i] = float(i), high_values[i] = float(16 * (i - 8));
  const PairTable low = load_pair_table(low_values), high = load_pair_table(high_values);
  const i64 stride = l.block_bytes();
  const u8* w = l.codes + block * stride;
  Floats sums[R][NB];
  fill(sums, [](int) { return floats(0); });
  for (i64 q = 0; q < l.quads; q++) {
    Bytes codes[NB];
    EACH(int b = 0; b < NB; b++) codes[b] = load_bytes(w + b * stride + q * 64);
    EACH(int b = 0; b < Ahead; b++) prefetch(next + b * stride + q * 64);
    const u8* at = x.quads + q * R * 8;
    add_pair<0>(low, codes, at, sums), add_pair<4>(high, codes, at, sums);
    add_pair<8>(low, codes, at, sums), add_pair<12>(high, codes, at, sums);
  }
  fill_from(sums, total);
}

// Pairs of bfloat16 [K/2][16][2] of a block that was expanded before, times rows.
template <int R, int NB>
inline void add_pairs(const u8* w, i64 quads, const u8* x, const u8* next, Floats (&total)[R][NB]) {
  Floats sums[R][NB];  // not `total`, whose address is known elsewhere: it would not stay in registers
  fill(sums, [](int) { return floats(0); });
  for (i64 p = 0; p < 2 * quads; p++) {
    __m512i values[NB];
    EACH(int b = 0; b < NB; b++) values[b] = _mm512_loadu_si512(w + (b * 2 * quads + p) * 64);
    if (p % 2 == 0) prefetch(next + p * 32);
    EACH(int r = 0; r < R; r++) {
      const __m512i v = spread_pair(x + (p / 2 * R + r) * 8 + p % 2 * 4);
      EACH(int b = 0; b < NB; b++) dot(sums[r][b], values[b], v);
    }
  }
  fill_from(sums, total);
}
#endif

}  // namespace qcompile
