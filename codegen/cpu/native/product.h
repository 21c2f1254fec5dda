// A packed weight times all rows.
//
// A thread owns a run of blocks of the weight. While it multiplies a pair of blocks with every panel of rows, the next
// pair is fetched; sums stay in registers and leave them as values of the output. Where there are many rows, codes are
// expanded once into the second cache.

#pragma once

#include <ATen/Parallel.h>

#include "amx_product.h"
#include "expanded_blocks.h"
#include "rows.h"
#include "tiles.h"

namespace qcompile {

// ---- one panel times NB blocks --------------------------------------------------------------------------------------------

template <int R, int NB>
inline void finish_ints(const Linear& l, const Panel& x, i64 block, const Ints (&sums)[R][NB]) {
  Floats values[R][NB];
  EACH(int r = 0; r < R; r++) EACH(int b = 0; b < NB; b++) values[r][b] = to_floats(sums[r][b]);
  finish(l, x, block, values);
}

template <int R, int NB, int Ahead>
void product(const Linear& l, const Panel& x, i64 block, const u8* expanded, const u8* next) {
  if (l.kind == Kind::bytes_int8 || l.kind == Kind::dual_int8) {
    Ints sums[R][NB];
    if (l.kind == Kind::bytes_int8) bytes_product<R, NB, Ahead>(l, x, block, next, sums);
    else dual_product<R, NB, Ahead>(l, x, block, expanded, next, sums);
    return finish_ints(l, x, block, sums);
  }
  Floats total[R][NB];
  switch (l.kind) {
    case Kind::group_int8: group_product<R, NB, Ahead>(l, x, block, next, total); break;
#if defined(QCOMPILE_BF16_PRODUCTS)
    case Kind::nibbles_bf16: nibbles_bf16<R, NB, Ahead>(l, x, block, next, total); break;
    case Kind::bytes_bf16:
      if (expanded) add_pairs<R, NB>(expanded, l.quads, x.quads, next, total);
      else bytes_bf16<R, NB, Ahead>(l, x, block, next, total);
      break;
#endif
    default:
      if (expanded) add_floats<R, NB>(reinterpret_cast<const float*>(expanded), l.columns(), x.quads, next, total);
      else if (l.kind == Kind::nibbles_f32) nibbles_f32<R, NB, Ahead>(l, x, block, next, total);
      else bytes_f32<R, NB, Ahead>(l, x, block, next, total);
  }
  finish(l, x, block, total);
}

using Product = void (*)(const Linear&, const Panel&, i64, const u8*, const u8*);

template <int R>
Product choose(bool one_panel, int blocks) {
  if constexpr (R > rows_of_tile) return nullptr;
  else if constexpr (R <= 2) return blocks == blocks_of_tile ? product<R, blocks_of_tile, blocks_of_tile>
                                                            : product<R, blocks_of_two_rows, blocks_of_two_rows>;
  else return one_panel ? product<R, blocks_of_tile, blocks_of_tile> : product<R, blocks_of_tile, 1>;
}

inline Product choose(int rows, bool one_panel, int blocks) {
  switch (panel_size(rows)) {
    case 1: return choose<1>(one_panel, blocks);
    case 2: return choose<2>(one_panel, blocks);
    case 3: return choose<3>(one_panel, blocks);
    case 4: return choose<4>(one_panel, blocks);
    case 6: return choose<6>(one_panel, blocks);
    case 8: return choose<8>(one_panel, blocks);
    case 10: return choose<10>(one_panel, blocks);
    default: return choose<12>(one_panel, blocks);
  }
}

// ---- all rows, all blocks ---------------------------------------------------------------------------------------------------

inline void multiply_blocks(const Linear& l, const Rows& rows, i64 first, i64 last) {
  const i64 bytes = l.block_bytes();
  if (rows.count() == 1 && (l.kind != Kind::bytes_bf16 || l.m <= 4)) {  // which is expanded for more
    const Panel panel = rows[0];
    for (i64 block = first; block < last;) {
      const bool four = panel_size(panel.rows) <= 2 && block + blocks_of_two_rows <= last;
      const int blocks = four ? blocks_of_two_rows : blocks_of_tile;
      const u8* here = l.codes + block * bytes;
      choose(panel.rows, true, blocks)(l, panel, block, nullptr, here + 4096);  // fetches a little ahead of what it reads
      block += blocks;
    }
    return;
  }
  const i64 size = expanded_bytes(l);
  u8* expanded = size ? block_scratch.get(2 * size) : nullptr;
  for (i64 block = first; block < last; block += 2) {
    if (expanded) expand(l, block, expanded), expand(l, block + 1, expanded + size);
    for (i64 p = 0; p < rows.count(); p++) {
      const Panel panel = rows[p];
      const Product multiply = choose(panel.rows, false, blocks_of_tile);
      // The first two panels fetch the next two blocks.
      const u8* next = l.codes + (p < 2 && block + 2 < last ? block + 2 + p : block) * bytes;
      for (int b = 0; b < 2; b += blocks_of_tile)
        multiply(l, panel, block + b, expanded ? expanded + b * size : nullptr, next);
    }
  }
}

template <class RowsOfX, class PutRow>
inline void run_as(const Linear& l, const PutRow& put_row) {
  const RowsOfX rows(l);
  rows.clear();
  const i64 serial = 32768;  // values of x that a second thread would not be worth
  at::parallel_for(0, l.m, std::max<i64>(1, serial / std::max<i64>(l.k, 1)), [&](i64 first, i64 last) {
    for (i64 row = first; row < last; row++) put_row(rows, row);
  });
  const i64 pair_work = 32 * std::max<i64>(l.m * l.k, 1);
  at::parallel_for(0, l.blocks() / 2, std::max<i64>(1, 20000 / pair_work), [&](i64 first, i64 last) {
    multiply_blocks(l, rows, 2 * first, 2 * last);
  });
}

template <class PutRow>
inline void run(const Linear& l, const PutRow& put_row) {
  if (!l.m || !l.n) return;
#if defined(QCOMPILE_TILES)
  if (takes_tiles(l)) return run_as<TileRows>(l, put_row);
#endif
  run_as<Rows>(l, put_row);
}

}  // namespace qcompile
