// Pairs of blocks as tiles of AMX. K is cut into units: a tile of columns or, where floats follow each group, a group.
//
// Bytes of whole tiles are read as they are packed. Else the units at work are expanded into the second cache: bytes and
// their zeros behind K, a q of two-level scales, bfloat16. A group begins with a tile of its own, in which the columns of
// its neighbors are zero, and its codes are q - z where that is an integer.

#pragma once

#include "amx_rows.h"
#include "expanded_blocks.h"

#if defined(QCOMPILE_TILES)
namespace qcompile {

inline bool has_float_groups(const Linear& l) { return l.kind == Kind::group_int8 || l.kind == Kind::nibbles_bf16; }
inline bool is_read_as_packed(const Linear& l) { return l.kind == Kind::bytes_int8 && l.quads % 16 == 0; }
inline i64 units_of(const Linear& l) { return has_float_groups(l) ? l.groups() : tiles_of_columns(l); }

struct Span {
  i64 first, last;
  i64 count() const { return last - first; }
};

inline Span tiles_of_group(const Linear& l, i64 g) {
  const i64 width = tile_columns(l);
  return {g * l.group / width, (8 * l.last_octet(g) + width - 1) / width};
}

inline i64 tiles_of_units(const Linear& l, const Span& units) {
  if (!has_float_groups(l)) return units.count();
  i64 count = 0;
  for (i64 g = units.first; g < units.last; g++) count += tiles_of_group(l, g).count();
  return count;
}

inline __m512i pair_words(__m512i low, __m512i high) { return _mm512_mask_blend_epi16(0xAAAAAAAA, low, high); }
inline __m512i bits_of(const Floats& x) { return _mm512_castps_si512(x.v); }

inline void expand_bf16_bytes(const u8* w, i64 quads, u8* to) {
  const auto put = [](u8* at, const Floats& low, const Floats& high) {
    _mm512_store_si512(at, pair_words(_mm512_srli_epi32(bits_of(low), 16), bits_of(high)));
  };
  for (i64 q = 0; q < quads; q++) {
    const Bytes codes = load_bytes(w + q * 64);
    put(to + 128 * q, byte_to_floats<0>(codes), byte_to_floats<8>(codes));
    put(to + 128 * q + 64, byte_to_floats<16>(codes), byte_to_floats<24>(codes));
  }
}

// Offsets of four groups together: quads.
inline void expand_offsets(const Linear& l, i64 block, u8* to) {
  std::memset(to, 0, tiles_of_groups(l) * tile_bytes);
  const u8* offset = l.offset + block * l.pairs() * 32;
  for (i64 p = 0; p < l.pairs(); p++)
    for (int c = 0; c < 16; c++) std::memcpy(to + p / 2 * 64 + c * 4 + p % 2 * 2, offset + p * 32 + c * 2, 2);
}

// q - z of group g, or q, as bytes or in pairs of bfloat16.
inline void expand_group(const Linear& l, i64 block, i64 g, bool plain, u8* to) {
  const Span span = tiles_of_group(l, g);
  const i64 octet = l.is_int8() ? 128 : 256, first = g ? l.last_octet(g - 1) : 0;
  u8 *at = to + (8 * first - span.first * tile_columns(l)) / 8 * octet, *end = to + span.count() * tile_bytes;
  std::memset(to, 0, at - to);
  const Floats minus_z = plain ? minus_zero(l, (block * l.groups() + g) * 16) : floats(0);
  const __m512i low_byte = _mm512_and_si512(_mm512_cvtps_epi32(minus_z.v), _mm512_set1_epi32(255));
  const __m512i z = _mm512_mullo_epi32(low_byte, _mm512_set1_epi32(0x01010101));
  const Table table = l.is_int8() ? Table{} : load_table(l.table);
  const auto put = [&](u8* out, const Floats& low, const Floats& high) {
    _mm512_store_si512(out, pair_words(_mm512_srli_epi32(bits_of(add(low, minus_z)), 16), bits_of(add(high, minus_z))));
  };
  const u8* w = l.codes + block * l.block_bytes();
  for (i64 t = first; t < l.last_octet(g); t++, at += octet) {
    const Bytes packed = load_bytes(w + t * 64);
    if (l.is_int8()) {
      Bytes low, high;
      load_nibbles(w + t * 64, low, high);
      store_bytes(at, {_mm512_add_epi8(low.v, z)}), store_bytes(at + 64, {_mm512_add_epi8(high.v, z)});
    } else {
      put(at, look_up<0>(table, packed), look_up<8>(table, packed));
      put(at + 64, look_up<16>(table, packed), look_up<24>(table, packed));
      put(at + 128, look_up<4>(table, packed), look_up<12>(table, packed));
      put(at + 192, look_up<20>(table, packed), look_up<28>(table, packed));
    }
  }
  std::memset(at, 0, end - at);
}

// Units of a block as tiles; behind the last ones the offsets of two-level scales.
inline void expand_units(const Linear& l, i64 block, const Span& units, bool plain, u8* to) {
  if (has_float_groups(l)) {
    for (i64 g = units.first; g < units.last; to += tiles_of_group(l, g).count() * tile_bytes, g++)
      expand_group(l, block, g, plain, to);
    return;
  }
  const i64 width = tile_columns(l) / 4, first = units.first * width, last = std::min(units.last * width, l.quads);
  const u8* w = l.codes + block * l.block_bytes() + first * 64;  // of bytes
  u8 *at = to + (last - first) * (l.is_int8() ? 64 : 128), *end = to + units.count() * tile_bytes;
  if (l.kind == Kind::dual_int8) expand_dual(l, block, first / 2, last / 2, to);
  else if (l.kind == Kind::bytes_bf16) expand_bf16_bytes(w, last - first, to);
  else std::memcpy(to, w, at - to);
  std::memset(at, 0, end - at);
  if (l.kind == Kind::dual_int8 && units.last == units_of(l)) expand_offsets(l, block, end);
}

}  // namespace qcompile
#endif
