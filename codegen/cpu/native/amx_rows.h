// Rows of x in tiles of AMX: 16 rows of 64 columns of int8, or of 32 of bfloat16, then the next columns of these rows.
//
// Columns and rows that are not there are zeros. Sums of groups are beside them, for zero points: float32 [G][16], or, for
// two-level scales, minus the sum in two bytes, [G/64] tiles of low bytes (unsigned) and as many of high bytes (signed).

#pragma once

#include "amx.h"
#include "rows.h"

#if defined(QCOMPILE_TILES)
namespace qcompile {

inline i64 tile_columns(const Linear& l) { return l.is_int8() ? 64 : 32; }
inline i64 tiles_of_columns(const Linear& l) { return (l.columns() + tile_columns(l) - 1) / tile_columns(l); }
inline i64 tiles_of_groups(const Linear& l) { return l.kind == Kind::dual_int8 ? (l.groups() + 63) / 64 : 0; }

inline __mmask64 mask_of_bytes(i64 count) { return count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1; }

inline int32_t sum_of_codes(const int8_t* x, i64 k) {
  __m512i sums = _mm512_setzero_si512();
  for (i64 c = 0; c < k; c += 64)
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(mask_of_bytes(k - c), x + c));
  return _mm512_reduce_add_epi32(sums);
}

// put(g, sum): of each group of columns, a multiple of 8.
template <class Put>
inline void sum_groups(const int8_t* x, i64 k, i64 group, const Put& put) {
  const __m512i half = _mm512_set1_epi8(-128), eight = _mm512_set1_epi64(8 * 128);
  const i64 octets = std::min<i64>(group, 1 << 20) / 8;  // which is more than K has
  i64 g = 0, left = octets;
  int32_t sum = 0;
  for (i64 c = 0; c < k; c += 64) {
    const __m512i bytes = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask_of_bytes(k - c), x + c), half);
    alignas(32) int32_t sums[8];
    const __m512i of_octets = _mm512_sub_epi64(_mm512_sad_epu8(bytes, _mm512_setzero_si512()), eight);
    _mm256_store_si256((__m256i*)sums, _mm512_cvtepi64_epi32(of_octets));
    for (const int32_t octet : sums) {
      sum += octet;
      if (!--left) put(g++, sum), sum = 0, left = octets;
    }
  }
  if (left < octets) put(g, sum);
}

// Whether groups need no sums of x: z is zero, or q - z an integer that tiles multiply as it is, with sums that float32 has.
inline bool has_plain_zeros(const Linear& l) {
  if (l.zero_as == Stored::none && l.zero_bias == 0) return true;
  const auto is_small = [](float value, float most) { return value == std::floor(value) && std::fabs(value) <= most; };
  if (l.zero_as == Stored::floats || !is_small(l.zero_bias, 32)) return false;
  u8 largest = 0;
  if (l.zero_as == Stored::bytes)
    for (i64 at = 0; at < l.blocks() * l.groups() * 16; at++) largest = std::max(largest, static_cast<const u8*>(l.zero)[at]);
  if (largest > 64) return false;
  if (l.is_int8()) return l.group <= 1024;
  return l.table && std::all_of(l.table, l.table + 16, [&](float value) { return is_small(value, 64); });
}

class TileRows {
 public:
  TileRows(const Linear& l) : l_(l), plain_(has_plain_zeros(l)) {
    codes_bytes_ = tiles_of_columns(l) * tile_bytes, zeros_bytes_ = tiles_of_groups(l) * tile_bytes;
    const i64 sums = l.kind == Kind::bytes_int8 ? 1 : l.kind == Kind::dual_int8 ? 0 : l.groups();
    sums_bytes_ = sums * 64;
    bytes_ = codes_bytes_ + 2 * zeros_bytes_ + sums_bytes_ + 64;
    at_ = rows_scratch.get(count() * bytes_);
  }
  i64 count() const { return (l_.m + 15) / 16; }
  bool plain() const { return plain_; }
  i64 bytes() const { return bytes_; }  // from one tile of rows to the next

  const u8* columns(i64 t) const { return at_ + t * bytes_; }
  const u8* low(i64 t) const { return columns(t) + codes_bytes_; }
  const u8* high(i64 t) const { return low(t) + zeros_bytes_; }
  const float* sums(i64 t) const { return reinterpret_cast<const float*>(high(t) + zeros_bytes_); }
  const int32_t* starts(i64 t) const { return reinterpret_cast<const int32_t*>(sums(t)); }  // bytes_int8: of sums
  const float* scale(i64 t) const { return reinterpret_cast<const float*>(high(t) + zeros_bytes_ + sums_bytes_); }

  void clear() const {  // rows that are not there
    if (l_.m % 16) std::memset(at_ + (count() - 1) * bytes_, 0, bytes_);
  }

  void put_codes(i64 row, const int8_t* x, float scale) const {
    const i64 t = row / 16, r = row % 16;
    const_cast<float*>(this->scale(t))[r] = scale;
    u8* out = const_cast<u8*>(columns(t)) + r * 64;
    for (i64 c = 0; c < l_.k; c += 64)
      _mm512_store_si512(out + c * 16, _mm512_maskz_loadu_epi8(mask_of_bytes(l_.k - c), x + c));
    auto* sums = const_cast<float*>(this->sums(t));
    if (l_.kind == Kind::bytes_int8) {
      const_cast<int32_t*>(starts(t))[r] = -128 * sum_of_codes(x, l_.k);
    } else if (l_.kind == Kind::dual_int8) {
      u8 *low = const_cast<u8*>(this->low(t)) + r * 64, *high = const_cast<u8*>(this->high(t)) + r * 64;
      for (i64 at = 0; at < zeros_bytes_; at += tile_bytes) std::memset(low + at, 0, 64), std::memset(high + at, 0, 64);
      sum_groups(x, l_.k, l_.group, [&](i64 g, int32_t sum) {
        const i64 at = g / 64 * tile_bytes + g % 64;
        if (g < l_.groups()) low[at] = u8(-sum), high[at] = u8(-sum >> 8);
      });
    } else if (!plain_) {
      sum_groups(x, l_.k, l_.group, [&](i64 g, int32_t sum) {
        if (g < l_.groups()) sums[g * 16 + r] = float(sum);
      });
    }
  }

  void put_quantized(i64 row, const float* x) const {
    const i64 k = l_.k;
    auto* codes = reinterpret_cast<int8_t*>(row_scratch.get(k * 5)) + k * 4;
    put_codes(row, codes, quantize_row(x, largest_bits(x, k), k, codes));
  }

  bool put_bf16(i64 row, const uint16_t* x) const {  // false where sums are needed
    if (l_.is_int8() || (l_.groups() && !plain_)) return false;
    u8* out = const_cast<u8*>(columns(row / 16)) + row % 16 * 64;
    for (i64 c = 0; c < l_.k; c += 32)
      _mm512_store_si512(out + c * 32, _mm512_maskz_loadu_epi16(__mmask32(mask_of_bytes(l_.k - c)), x + c));
    return true;
  }

  void put_values(i64 row, const float* x) const {  // rounded to bfloat16
    const i64 t = row / 16, r = row % 16, k = l_.k;
    u8* out = const_cast<u8*>(columns(t)) + r * 64;
    for (i64 c = 0; c < tiles_of_columns(l_) * 32; c += 16)
      store_bf16(reinterpret_cast<uint16_t*>(out + c / 32 * tile_bytes + c % 32 * 2), load_up_to(x, c, k));
    for (i64 g = 0; g < l_.groups() && !plain_; g++) {
      Floats sum = floats(0);
      const i64 end = std::min(k, (g + 1) * l_.group);
      for (i64 c = g * l_.group; c < end; c += 16) sum = add(sum, load_up_to(x, c, end));
      const_cast<float*>(sums(t))[g * 16 + r] = sum_of(sum);
    }
  }

 private:
  static Floats load_up_to(const float* x, i64 c, i64 end) {
    const i64 count = std::clamp<i64>(end - c, 0, 16);
    return {_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), x + c)};
  }

  const Linear& l_;
  const bool plain_;
  i64 codes_bytes_, zeros_bytes_, sums_bytes_, bytes_;
  u8* at_;
};

}  // namespace qcompile
#endif
