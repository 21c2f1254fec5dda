// Blocks of channels that are expanded once, into the second cache, for all panels of rows.

#pragma once

#include "rows.h"
#include "tiles.h"

namespace qcompile {

inline i64 expanded_bytes(const Linear& l) {  // of one block; 0: codes are read as they are stored
  switch (l.kind) {
    case Kind::dual_int8: return 64 * l.quads;
    case Kind::bytes_bf16: return 128 * l.quads;
    case Kind::nibbles_f32:
    case Kind::bytes_f32: return 256 * l.quads;
    default: return 0;
  }
}

inline void expand_dual(const Linear& l, i64 block, i64 t, i64 end, u8* to) {  // a q of octets [t, end)
  const u8* w = l.codes + block * l.block_bytes();
  while (t < end) {
    const i64 g = 8 * t / l.group, last = std::min(l.last_octet(g), end);
    const Steps steps = load_steps(static_cast<const u8*>(l.step) + (block * l.groups() + g) * 16);
    for (; t < last; t++, to += 128) {
      Bytes low, high;
      load_nibbles(w + t * 64, low, high);
      scale(low, steps), scale(high, steps);
      store_bytes(to, low), store_bytes(to + 64, high);
    }
  }
}

inline void expand_nibbles(const Linear& l, i64 block, float* to) {  // a (table[q] - z), [K][16]
  const u8* w = l.codes + block * l.block_bytes();
  const Table table = load_table(l.table);
  for (i64 g = 0, t = 0; g < l.groups(); g++) {
    const i64 at = (block * l.groups() + g) * 16;
    const Floats step = load_parts(l.step, l.step_as, at), zero = minus_zero(l, at);
    for (const i64 last = l.last_octet(g); t < last; t++) {
      const Bytes packed = load_bytes(w + t * 64);
      float* out = to + 128 * t;
      const auto put = [&](int column, const Floats& value) {
        store_floats(out + 16 * column, multiply(add(value, zero), step));
      };
      put(0, look_up<0>(table, packed)), put(1, look_up<8>(table, packed));
      put(2, look_up<16>(table, packed)), put(3, look_up<24>(table, packed));
      put(4, look_up<4>(table, packed)), put(5, look_up<12>(table, packed));
      put(6, look_up<20>(table, packed)), put(7, look_up<28>(table, packed));
    }
  }
}

inline void expand_bytes(const Linear& l, i64 block, float* to) {  // w, [K][16]
  const u8* w = l.codes + block * l.block_bytes();
  for (i64 q = 0; q < l.quads; q++) {
    const Bytes codes = load_bytes(w + q * 64);
    float* out = to + 64 * q;
    store_floats(out, byte_to_floats<0>(codes)), store_floats(out + 16, byte_to_floats<8>(codes));
    store_floats(out + 32, byte_to_floats<16>(codes)), store_floats(out + 48, byte_to_floats<24>(codes));
  }
}

#if defined(QCOMPILE_BF16_PRODUCTS)
inline void expand_to_pairs(const Linear& l, i64 block, u8* to) {  // w, [K/2][16][2], columns k0 k2 and k1 k3 of a quad
  const u8* w = l.codes + block * l.block_bytes();
  const __m512i high = _mm512_set1_epi32(int(0xFFFF0000));
  const auto pair = [&](const Floats& first, const Floats& second) {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first.v), 16),
                           _mm512_and_si512(_mm512_castps_si512(second.v), high));
  };
  for (i64 q = 0; q < l.quads; q++) {
    const Bytes codes = load_bytes(w + q * 64);
    _mm512_storeu_si512(to + 128 * q, pair(byte_to_floats<0>(codes), byte_to_floats<16>(codes)));
    _mm512_storeu_si512(to + 128 * q + 64, pair(byte_to_floats<8>(codes), byte_to_floats<24>(codes)));
  }
}
#endif

inline void expand(const Linear& l, i64 block, u8* to) {
  switch (l.kind) {
    case Kind::dual_int8: return expand_dual(l, block, 0, l.quads / 2, to);
    case Kind::nibbles_f32: return expand_nibbles(l, block, reinterpret_cast<float*>(to));
    case Kind::bytes_f32: return expand_bytes(l, block, reinterpret_cast<float*>(to));
#if defined(QCOMPILE_BF16_PRODUCTS)
    case Kind::bytes_bf16: return expand_to_pairs(l, block, to);
#endif
    default: return;
  }
}

}  // namespace qcompile
