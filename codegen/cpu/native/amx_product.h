// A packed weight times x of large M, by tiles of AMX.
//
// Sums of 2 tiles of rows times 2 blocks of channels are four tiles; a step in K loads two tiles of x and two of channels
// for four products. Around it, from within: rows of a part, pairs of blocks, parts of K. A part of x is what the second
// cache takes; where K has more than one, sums of several pairs wait there too, so that a part of x is read for all of
// them. Sums of a group, and those of whole rows, are stored in the first cache, where the vectors finish them.

#pragma once

#include "amx_sums.h"

#if defined(QCOMPILE_TILES)
namespace qcompile {

// X tiles of rows times two blocks, added to tiles 0 to 3.
template <int X, Dot How>
inline void add_tiles(const u8* x, i64 x_bytes, const u8* w, i64 w_bytes, i64 steps) {
  for (i64 s = 0; s < steps; s++, x += tile_bytes, w += tile_bytes) {
    load_tile<6>(w), load_tile<4>(x), dot_tiles<How, 0, 4, 6>();
    load_tile<7>(w + w_bytes), dot_tiles<How, 1, 4, 7>();
    if constexpr (X == 2) load_tile<5>(x + x_bytes), dot_tiles<How, 2, 5, 6>(), dot_tiles<How, 3, 5, 7>();
  }
}

// A pair of blocks at work: part of its columns times tiles of rows from t on.
struct PairAtWork {
  const Linear& l;
  const TileRows& rows;
  i64 t, block;
  Span units;
  const u8* w;
  i64 w_bytes;  // from one block to the other
  bool plain;   // zero points are in the codes

  bool is_first() const { return units.first == 0; }
  bool is_last() const { return units.last == units_of(l); }
};

template <int X, Dot How>
inline void multiply_whole_rows(const PairAtWork& p, TileSums& sums) {
  const Linear& l = p.l;
  const i64 zeros = p.is_last() ? tiles_of_groups(l) : 0, steps = p.units.count();
  const u8* offset = p.w + steps * tile_bytes;
  alignas(64) TileSums high;
  if (zeros) {
    zero_sums(), add_tiles<X, Dot::signed_bytes>(p.rows.high(p.t), p.rows.bytes(), offset, p.w_bytes, zeros);
    store_sums<X>(high);
  }
  p.is_first() ? zero_sums() : load_sums<X>(sums);
  if (zeros) add_tiles<X, Dot::unsigned_bytes>(p.rows.low(p.t), p.rows.bytes(), offset, p.w_bytes, zeros);
  add_tiles<X, How>(p.rows.columns(p.t) + p.units.first * tile_bytes, p.rows.bytes(), p.w, p.w_bytes, steps);
  store_sums<X>(sums);
  if (!p.is_last()) return;
  finish_tiles<X>(l, p.t, p.block, [&](int x) {
    const float *low = sums[2 * x], *above = high[2 * x], *x_scale = p.rows.scale(p.t + x);
    const int32_t* starts = p.rows.starts(p.t + x);
    return [=](int b, int r) {
      const i64 at = 256 * b + 16 * r;
      if constexpr (How == Dot::bf16) return load_floats(low + at);
      const __m512i more = zeros ? _mm512_slli_epi32(load_ints(above + at), 8) : _mm512_set1_epi32(starts[r]);
      return multiply(to_floats(Ints{_mm512_add_epi32(load_ints(low + at), more)}), floats(x_scale[r]));
    };
  });
}

// total += a (sums - z sum(x)) of Count groups from g on, one after another.
template <int X, bool Int8, bool Plain, int Count>
inline void add_groups(const PairAtWork& p, i64 g, const TileSums (&sums)[2], TileSums& total) {
  const Linear& l = p.l;
  for (int b = 0; b < 2; b++) {
    Floats step[Count], zero[Count];
    EACH(int i = 0; i < Count; i++) {
      const i64 at = ((p.block + b) * l.groups() + g + i) * 16;
      step[i] = load_parts(l.step, l.step_as, at);
      if (!Plain) zero[i] = minus_zero(l, at);
    }
    for (int x = 0; x < X; x++) {
      const float* x_sums = p.rows.sums(p.t + x) + g * 16;
      for (int r = 0; r < 16; r++) {
        float* to = total[2 * x + b] + 16 * r;
        Floats row = load_floats(to);
        EACH(int i = 0; i < Count; i++) {
          const float* at = sums[i][2 * x + b] + 16 * r;
          Floats value = Int8 ? to_floats(Ints{load_ints(at)}) : load_floats(at);
          if (!Plain) multiply_add(value, zero[i], floats(x_sums[i * 16 + r]));
          multiply_add(row, step[i], value);
        }
        store_floats(to, row);
      }
    }
  }
}

template <int X, Dot How, bool Plain>
inline void multiply_groups(const PairAtWork& p, TileSums& total) {
  if (p.is_first()) std::memset(total, 0, sizeof total);
  alignas(64) TileSums sums[2];
  const u8* w = p.w;
  for (i64 g = p.units.first; g < p.units.last;) {
    const int count = p.units.last - g >= 2 ? 2 : 1;
    for (int i = 0; i < count; i++) {
      const Span span = tiles_of_group(p.l, g + i);
      zero_sums();
      add_tiles<X, How>(p.rows.columns(p.t) + span.first * tile_bytes, p.rows.bytes(), w, p.w_bytes, span.count());
      store_sums<X>(sums[i]);
      w += span.count() * tile_bytes;
    }
    if (count == 2) add_groups<X, How != Dot::bf16, Plain, 2>(p, g, sums, total);
    else add_groups<X, How != Dot::bf16, Plain, 1>(p, g, sums, total);
    g += count;
  }
  if (!p.is_last()) return;
  finish_tiles<X>(p.l, p.t, p.block, [&](int x) {
    const float *sum = total[2 * x], *x_scale = p.rows.scale(p.t + x);
    return [=](int b, int r) {
      const Floats value = load_floats(sum + 256 * b + 16 * r);
      return How == Dot::bf16 ? value : multiply(value, floats(x_scale[r]));
    };
  });
}

template <int X>
inline void multiply_pair(const PairAtWork& p, TileSums& sums) {
  switch (p.l.kind) {
    case Kind::bytes_bf16: return multiply_whole_rows<X, Dot::bf16>(p, sums);
    case Kind::group_int8:
      return p.plain ? multiply_groups<X, Dot::both_signed, true>(p, sums)
                     : multiply_groups<X, Dot::signed_bytes, false>(p, sums);
    case Kind::nibbles_bf16:
      return p.plain ? multiply_groups<X, Dot::bf16, true>(p, sums) : multiply_groups<X, Dot::bf16, false>(p, sums);
    default: return multiply_whole_rows<X, Dot::signed_bytes>(p, sums);
  }
}

// ---- all rows, all blocks -----------------------------------------------------------------------------------------------

// From the number of rows on where tiles were measured to be faster: fewer leave most of a tile empty, and 32 columns of a
// group half of one.
inline bool takes_tiles(const Linear& l) {
  if (!tiles_are_on || !l.k || l.kind == Kind::nibbles_f32 || l.kind == Kind::bytes_f32) return false;
  if (has_float_groups(l) && l.groups() > 1 && l.group < 32) return false;
  return l.m > (l.kind == Kind::group_int8 ? 48 : l.is_int8() ? 32 : 4);
}

struct TileParts {
  static constexpr i64 most_tiles_of_rows = 32, bytes_of_x = 1 << 20;
  i64 tiles, units, pairs;  // of rows, of K, blocks that share a part of x

  TileParts(const Linear& l, const TileRows& rows) {
    const i64 parts = (rows.count() + most_tiles_of_rows - 1) / most_tiles_of_rows;
    tiles = ((rows.count() + parts - 1) / parts + 1) / 2 * 2;
    const i64 of_k = std::max<i64>(1, (tiles * tiles_of_columns(l) * tile_bytes + bytes_of_x - 1) / bytes_of_x);
    units = (units_of(l) + of_k - 1) / of_k;
    pairs = units < units_of(l) ? 8 : 1;
  }
};

inline void multiply_blocks(const Linear& l, const TileRows& rows, i64 first, i64 last) {
  const TileState state;
  const TileParts part(l, rows);
  const bool packed = is_read_as_packed(l), plain = rows.plain();
  const i64 all = units_of(l), expanded_bytes = packed ? 0 : (tiles_of_units(l, {0, all}) + tiles_of_groups(l)) * tile_bytes;
  const i64 sums_of_pair = part.tiles / 2, all_sums = part.pairs * sums_of_pair * i64(sizeof(TileSums));
  u8* scratch = block_scratch.get(all_sums + 2 * expanded_bytes);
  auto* sums = reinterpret_cast<TileSums*>(scratch);
  u8* expanded = scratch + all_sums;
  const auto multiply = [&](i64 first_tile, i64 block, const Span& units, TileSums* at) {
    PairAtWork p{l, rows, first_tile, block, units, expanded, expanded_bytes, plain};
    if (packed) p.w = l.codes + block * l.block_bytes() + units.first * tile_bytes, p.w_bytes = l.block_bytes();
    else expand_units(l, block, units, plain, expanded), expand_units(l, block + 1, units, plain, expanded + expanded_bytes);
    const i64 end = std::min(first_tile + part.tiles, rows.count());
    for (; p.t < end; p.t += 2, at += units.count() < all)
      p.t + 1 < end ? multiply_pair<2>(p, *at) : multiply_pair<1>(p, *at);
  };
  for (i64 t = 0; t < rows.count(); t += part.tiles)
    for (i64 from = first; from < last; from += 2 * part.pairs)
      for (i64 unit = 0; unit < all; unit += part.units)
        for (i64 b = 0; b < part.pairs && from + 2 * b < last; b++)
          multiply(t, from + 2 * b, {unit, std::min(unit + part.units, all)}, sums + b * sums_of_pair);
}

}  // namespace qcompile
#endif
