// The tiles of AMX: eight registers of 16 lines of 64 bytes, and products of two of them.
//
// A product adds to a tile of sums [16 rows of x][16 channels], 32 bits each, what 64 bytes of each row of x (a line) and
// 64 bytes of each channel give: 16384 products of bytes, or 8192 of bfloat16. A tile of channels has on each line four
// bytes (two bfloat16) of all 16 channels: so lie the quads of a packed block.
//
// Linux gives a process its tiles only when it asks. Where it does not, or the processor has none, `has_tiles` is false
// and the other loops serve, so that one library runs on both.

#pragma once

#include "lanes.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(QCOMPILE_BF16_PRODUCTS) && defined(__linux__)
#define QCOMPILE_TILES 1

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace qcompile {

inline bool ask_for_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed) return false;
  const int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

inline const bool has_tiles = ask_for_tiles();
inline std::atomic<bool> tiles_are_on{has_tiles};  // tests compare both ways

constexpr i64 tile_bytes = 1024;

// All tiles of a thread have their whole size while one of these lives.
class TileState {
 public:
  TileState() {
    alignas(64) u8 config[64] = {1};  // palette 1; bytes of a line from 16 on, lines from 48 on
    for (int tile = 0; tile < 8; tile++) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileState() { asm volatile("tilerelease"); }
  TileState(const TileState&) = delete;
};

// Not the intrinsics: those of GCC 12 do not say that they read and write memory.
template <int T>
inline void load_tile(const void* at) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(i64(64)), "i"(T) : "memory");
}
template <int T>
inline void store_tile(void* at) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(i64(64)), "i"(T) : "memory");
}
template <int T>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

enum class Dot { signed_bytes, both_signed, unsigned_bytes, bf16 };  // of x; but for both_signed, channels are unsigned

template <Dot How, int Sum, int X, int W>
inline void dot_tiles() {
  if constexpr (How == Dot::signed_bytes)
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(X), "i"(W));
  else if constexpr (How == Dot::both_signed)
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(X), "i"(W));
  else if constexpr (How == Dot::unsigned_bytes)
    asm volatile("tdpbuud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(X), "i"(W));
  else asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(X), "i"(W));
}

}  // namespace qcompile
#endif
