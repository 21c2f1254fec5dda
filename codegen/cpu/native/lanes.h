// Sixteen output channels as vectors of this processor: AVX-512 with byte dot products, AVX2 with or without them, and
// plain C++ for others. All give the same integers; floats are multiplied and added in the same order.
//
//   Ints, Floats   one value of each channel
//   Bytes          four unsigned bytes of each channel, as they lie in memory: a channel's four columns of a quad
//   Quad           four signed bytes of one row of x, for all channels
//
// Integers wrap as they do in int32.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EACH _Pragma("GCC unroll 16") for

namespace qcompile {

using i64 = int64_t;
using u8 = uint8_t;

inline void prefetch(const u8* at) { __builtin_prefetch(at, 0, 2); }

template <class T>
inline T read(const void* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

inline uint16_t to_bf16(float value) {  // to nearest even; NaN stays NaN
  const uint32_t bits = read<uint32_t>(&value);
  return uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr const char* lanes_name = "AVX512-VNNI";
constexpr int rows_of_tile = 12;  // of x at a time: 12 rows times 2 blocks leave 8 of 32 registers
constexpr int blocks_of_tile = 2;
constexpr int blocks_of_two_rows = 4;  // streams of memory: what one or two rows wait for
constexpr int quad_bytes = 4;

struct Ints { __m512i v; };
struct Floats { __m512 v; };
struct Bytes { __m512i v; };
struct Quad { __m512i v; };
struct Steps { __m512i v; };

inline Ints ints(int32_t value) { return {_mm512_set1_epi32(value)}; }
inline Floats floats(float value) { return {_mm512_set1_ps(value)}; }
inline Bytes load_bytes(const u8* at) { return {_mm512_loadu_si512(at)}; }
inline Quad load_quad(const u8* at) { return {_mm512_set1_epi32(read<int32_t>(at))}; }
inline void store_quad(u8* at, const int8_t* x) { std::memcpy(at, x, 4); }

// By force in place: GCC 12 copies and spills the accumulators of the intrinsic.
inline void dot(Ints& sum, const Bytes& w, const Quad& x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(x.v)); }

// Two unsigned bytes of each channel times two int16.
inline void dot_pair(Ints& sum, const u8* bytes, const int16_t* pair) {
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)bytes));
  asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(words), "v"(_mm512_set1_epi32(read<int32_t>(pair))));
}

inline void load_nibbles(const u8* at, Bytes& low, Bytes& high) {
  const __m512i both = _mm512_loadu_si512(at), mask = _mm512_set1_epi8(15);
  low.v = _mm512_and_si512(both, mask), high.v = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
inline Steps load_steps(const u8* at) {  // a byte of each channel -> both words of its lane
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
  return {_mm512_or_si512(wide, _mm512_slli_epi32(wide, 16))};
}
inline void scale(Bytes& codes, const Steps& s) { codes.v = _mm512_mullo_epi16(codes.v, s.v); }
inline void store_bytes(u8* at, const Bytes& codes) { _mm512_storeu_si512(at, codes.v); }

inline Floats to_floats(const Ints& sum) { return {_mm512_cvtepi32_ps(sum.v)}; }
inline Floats load_floats(const float* at) { return {_mm512_loadu_ps(at)}; }
inline Floats load_floats(const u8* at) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at)))};
}
inline Floats load_bf16(const uint16_t* at) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16))};
}
inline void store_floats(float* at, const Floats& x) { _mm512_storeu_ps(at, x.v); }
inline float sum_of(const Floats& x) { return _mm512_reduce_add_ps(x.v); }
inline void store_bf16(uint16_t* at, const Floats& x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)at, (__m256i)_mm512_cvtneps_pbh(x.v));  // subnormal floats, below 1.2e-38, are zero
#else
  const __m512i bits = _mm512_castps_si512(x.v), high = _mm512_srli_epi32(bits, 16);
  const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), _mm512_and_si512(high, _mm512_set1_epi32(1)));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i words = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16(words));
#endif
}
inline Floats add(const Floats& a, const Floats& b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats multiply(const Floats& a, const Floats& b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline void multiply_add(Floats& sum, const Floats& a, const Floats& b) { sum.v = _mm512_fmadd_ps(a.v, b.v, sum.v); }

inline Floats maximum(const Floats& a, const Floats& b) { return {_mm512_max_ps(a.v, b.v)}; }  // NaN in b stays
inline float max_of(const Floats& x) { return _mm512_reduce_max_ps(x.v); }
inline Floats largest_magnitude(const Floats& most, const Floats& x) {  // most >= 0; NaN is the largest
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7FFFFFFF));
  return {_mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(most.v), bits))};
}
inline Floats divide(const Floats& a, const Floats& b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats subtract(const Floats& a, const Floats& b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline void store_rounded(int8_t* at, const Floats& x) {  // to nearest even; -127 to 127
  _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
inline Floats times_power_of_two(const Floats& x, const Floats& n) {  // n: its lowest bits, as an integer
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_slli_epi32(_mm512_castps_si512(n.v), 23)))};
}

struct Table { __m512 v; };  // sixteen floats
inline Table load_table(const float* at) { return {_mm512_loadu_ps(at)}; }
template <int Shift>
inline Floats look_up(const Table& table, const Bytes& packed) {  // four bits of each channel's 32
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(packed.v, Shift), table.v)};
}
template <int Shift>
inline Floats byte_to_floats(const Bytes& codes) {  // one of its four bytes, read as w + 128
  const __m512i byte = _mm512_and_si512(_mm512_srli_epi32(codes.v, Shift), _mm512_set1_epi32(255));
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(byte, _mm512_set1_epi32(128)))};
}

#elif defined(__AVX2__) && defined(__FMA__)

#if defined(__AVXVNNI__)
constexpr const char* lanes_name = "AVX-VNNI";
constexpr int quad_bytes = 4;
#else
constexpr const char* lanes_name = "AVX2";
constexpr int quad_bytes = 8;  // k0 k2 k1 k3 as int16: there is no exact product of bytes
#endif
constexpr int rows_of_tile = 4;  // of x at a time: 4 rows times 2 vectors leave 8 of 16 registers
constexpr int blocks_of_tile = 1, blocks_of_two_rows = 1;

struct Ints { __m256i v[2]; };
struct Floats { __m256 v[2]; };
struct Steps { __m256i v[2]; };

#define HALVES EACH(int h = 0; h < 2; h++)

inline Ints ints(int32_t value) { return {{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
inline Floats floats(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
inline __m256i load_half(const u8* at, int h) { return _mm256_loadu_si256((const __m256i*)(at + 32 * h)); }

#if defined(__AVXVNNI__)
struct Bytes { __m256i v[2]; };
struct Quad { __m256i v; };
inline Bytes load_bytes(const u8* at) { return {{load_half(at, 0), load_half(at, 1)}}; }
inline Quad load_quad(const u8* at) { return {_mm256_set1_epi32(read<int32_t>(at))}; }
inline void store_quad(u8* at, const int8_t* x) { std::memcpy(at, x, 4); }
inline void dot(Ints& sum, const Bytes& w, const Quad& x) {
  HALVES asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.v[h]) : "x"(w.v[h]), "x"(x.v));
}
inline void load_nibbles(const u8* at, Bytes& low, Bytes& high) {
  const __m256i mask = _mm256_set1_epi8(15);
  HALVES {
    const __m256i both = load_half(at, h);
    low.v[h] = _mm256_and_si256(both, mask), high.v[h] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  }
}
inline void scale(Bytes& codes, const Steps& s) { HALVES codes.v[h] = _mm256_mullo_epi16(codes.v[h], s.v[h]); }
inline void store_bytes(u8* at, const Bytes& codes) { HALVES _mm256_storeu_si256((__m256i*)(at + 32 * h), codes.v[h]); }
#else
struct Bytes { __m256i even[2], odd[2]; };  // columns 0, 2 and 1, 3 as words
struct Quad { __m256i even, odd; };
inline Bytes split(__m256i first, __m256i second) {
  const __m256i mask = _mm256_set1_epi16(255);
  return {{_mm256_and_si256(first, mask), _mm256_and_si256(second, mask)},
          {_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8)}};
}
inline Bytes load_bytes(const u8* at) { return split(load_half(at, 0), load_half(at, 1)); }
inline Quad load_quad(const u8* at) {
  return {_mm256_set1_epi32(read<int32_t>(at)), _mm256_set1_epi32(read<int32_t>(at + 4))};
}
inline void store_quad(u8* at, const int8_t* x) {
  const int16_t words[4] = {x[0], x[2], x[1], x[3]};
  std::memcpy(at, words, 8);
}
inline void dot(Ints& sum, const Bytes& w, const Quad& x) {
  HALVES sum.v[h] = _mm256_add_epi32(sum.v[h], _mm256_add_epi32(_mm256_madd_epi16(w.even[h], x.even),
                                                                 _mm256_madd_epi16(w.odd[h], x.odd)));
}
inline void load_nibbles(const u8* at, Bytes& low, Bytes& high) {
  const __m256i mask = _mm256_set1_epi16(15);
  HALVES {
    const __m256i both = load_half(at, h);
    low.even[h] = _mm256_and_si256(both, mask), high.even[h] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    low.odd[h] = _mm256_and_si256(_mm256_srli_epi16(both, 8), mask), high.odd[h] = _mm256_srli_epi16(both, 12);
  }
}
inline void scale(Bytes& codes, const Steps& s) {
  HALVES codes.even[h] = _mm256_mullo_epi16(codes.even[h], s.v[h]), codes.odd[h] = _mm256_mullo_epi16(codes.odd[h], s.v[h]);
}
inline void store_bytes(u8* at, const Bytes& codes) {
  HALVES _mm256_storeu_si256((__m256i*)(at + 32 * h),
                             _mm256_or_si256(codes.even[h], _mm256_slli_epi16(codes.odd[h], 8)));
}
#endif

inline void dot_pair(Ints& sum, const u8* bytes, const int16_t* pair) {
  const __m256i x = _mm256_set1_epi32(read<int32_t>(pair));
  HALVES {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(bytes + 16 * h)));
    sum.v[h] = _mm256_add_epi32(sum.v[h], _mm256_madd_epi16(words, x));
  }
}
inline __m256i widen_half(const u8* at, int h) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(at + 8 * h))); }
inline Steps load_steps(const u8* at) {
  Steps s;
  HALVES s.v[h] = _mm256_or_si256(widen_half(at, h), _mm256_slli_epi32(widen_half(at, h), 16));
  return s;
}
inline Floats to_floats(const Ints& sum) { return {{_mm256_cvtepi32_ps(sum.v[0]), _mm256_cvtepi32_ps(sum.v[1])}}; }
inline Floats load_floats(const float* at) { return {{_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}}; }
inline Floats load_floats(const u8* at) {
  return {{_mm256_cvtepi32_ps(widen_half(at, 0)), _mm256_cvtepi32_ps(widen_half(at, 1))}};
}
inline Floats load_bf16(const uint16_t* at) {
  Floats x;
  HALVES x.v[h] = _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(at + 8 * h))), 16));
  return x;
}
inline void store_floats(float* at, const Floats& x) { HALVES _mm256_storeu_ps(at + 8 * h, x.v[h]); }
inline float sum_of(const Floats& x) {
  const __m256 eight = _mm256_add_ps(x.v[0], x.v[1]);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline void store_bf16(uint16_t* at, const Floats& x) {
  __m256i words[2];
  HALVES {
    const __m256i bits = _mm256_castps_si256(x.v[h]), high = _mm256_srli_epi32(bits, 16);
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7FFF), _mm256_and_si256(high, _mm256_set1_epi32(1)));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v[h], x.v[h], _CMP_UNORD_Q));
    words[h] = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  }
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words[0], words[1]), 0xD8);
  _mm256_storeu_si256((__m256i*)at, packed);
}
inline Floats add(const Floats& a, const Floats& b) {
  return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
}
inline Floats multiply(const Floats& a, const Floats& b) {
  return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
}
inline void multiply_add(Floats& sum, const Floats& a, const Floats& b) {
  HALVES sum.v[h] = _mm256_fmadd_ps(a.v[h], b.v[h], sum.v[h]);
}

inline Floats maximum(const Floats& a, const Floats& b) {
  return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}};
}
inline float max_of(const Floats& x) {
  const __m256 eight = _mm256_max_ps(x.v[0], x.v[1]);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline Floats largest_magnitude(const Floats& most, const Floats& x) {
  Floats y;
  HALVES {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x.v[h]), _mm256_set1_epi32(0x7FFFFFFF));
    y.v[h] = _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(most.v[h]), bits));
  }
  return y;
}
inline Floats divide(const Floats& a, const Floats& b) {
  return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}};
}
inline Floats subtract(const Floats& a, const Floats& b) {
  return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
}
inline void store_rounded(int8_t* at, const Floats& x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.v[0]), _mm256_cvtps_epi32(x.v[1]));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
  _mm_storeu_si128((__m128i*)at, _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
inline Floats times_power_of_two(const Floats& x, const Floats& n) {
  Floats y;
  HALVES y.v[h] = _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(x.v[h]), _mm256_slli_epi32(_mm256_castps_si256(n.v[h]), 23)));
  return y;
}

struct Table { __m256 first, second; };
inline Table load_table(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
inline __m256i packed_half(const Bytes& packed, int h) {
#if defined(__AVXVNNI__)
  return packed.v[h];
#else
  return _mm256_or_si256(packed.even[h], _mm256_slli_epi16(packed.odd[h], 8));
#endif
}
template <int Shift>
inline Floats look_up(const Table& table, const Bytes& packed) {
  Floats found;
  HALVES {
    const __m256i four = _mm256_srli_epi32(packed_half(packed, h), Shift);  // their lowest three choose, the fourth which half
    const __m256 which = _mm256_castsi256_ps(_mm256_slli_epi32(four, 28));
    found.v[h] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.first, four),
                                  _mm256_permutevar8x32_ps(table.second, four), which);
  }
  return found;
}
template <int Shift>
inline Floats byte_to_floats(const Bytes& codes) {
  Floats found;
  HALVES {
    const __m256i byte = _mm256_and_si256(_mm256_srli_epi32(packed_half(codes, h), Shift), _mm256_set1_epi32(255));
    found.v[h] = _mm256_cvtepi32_ps(_mm256_sub_epi32(byte, _mm256_set1_epi32(128)));
  }
  return found;
}

#else

constexpr const char* lanes_name = "plain";
constexpr int rows_of_tile = 4, blocks_of_tile = 1, blocks_of_two_rows = 1;
constexpr int quad_bytes = 4;

#define CHANNELS for (int c = 0; c < 16; c++)

struct Ints { uint32_t v[16]; };  // unsigned, whose overflow is defined
struct Floats { float v[16]; };
struct Bytes { u8 v[16][4]; };
struct Quad { int8_t v[4]; };
struct Steps { u8 v[16]; };

inline Ints ints(int32_t value) { Ints sum; CHANNELS sum.v[c] = uint32_t(value); return sum; }
inline Floats floats(float value) { Floats x; CHANNELS x.v[c] = value; return x; }
inline Bytes load_bytes(const u8* at) { return read<Bytes>(at); }
inline Quad load_quad(const u8* at) { return read<Quad>(at); }
inline void store_quad(u8* at, const int8_t* x) { std::memcpy(at, x, 4); }
inline void dot(Ints& sum, const Bytes& w, const Quad& x) {
  CHANNELS for (int j = 0; j < 4; j++) sum.v[c] += uint32_t(w.v[c][j] * x.v[j]);
}
inline void dot_pair(Ints& sum, const u8* bytes, const int16_t* pair) {
  CHANNELS sum.v[c] += uint32_t(bytes[2 * c] * pair[0] + bytes[2 * c + 1] * pair[1]);
}
inline void load_nibbles(const u8* at, Bytes& low, Bytes& high) {
  CHANNELS for (int j = 0; j < 4; j++) low.v[c][j] = at[4 * c + j] & 15, high.v[c][j] = at[4 * c + j] >> 4;
}
inline Steps load_steps(const u8* at) { return read<Steps>(at); }
inline void scale(Bytes& codes, const Steps& s) { CHANNELS for (int j = 0; j < 4; j++) codes.v[c][j] *= s.v[c]; }
inline void store_bytes(u8* at, const Bytes& codes) { std::memcpy(at, &codes, sizeof codes); }
inline Floats to_floats(const Ints& sum) { Floats x; CHANNELS x.v[c] = float(int32_t(sum.v[c])); return x; }
inline Floats load_floats(const float* at) { return read<Floats>(at); }
inline Floats load_floats(const u8* at) { Floats x; CHANNELS x.v[c] = at[c]; return x; }
inline Floats load_bf16(const uint16_t* at) {
  Floats x;
  CHANNELS {
    const uint32_t bits = uint32_t(at[c]) << 16;
    std::memcpy(x.v + c, &bits, 4);
  }
  return x;
}
inline void store_floats(float* at, const Floats& x) { std::memcpy(at, &x, sizeof x); }
inline float sum_of(const Floats& x) { float sum = 0; CHANNELS sum += x.v[c]; return sum; }
inline void store_bf16(uint16_t* at, const Floats& x) { CHANNELS at[c] = to_bf16(x.v[c]); }
inline Floats add(Floats a, const Floats& b) { CHANNELS a.v[c] += b.v[c]; return a; }
inline Floats multiply(Floats a, const Floats& b) { CHANNELS a.v[c] *= b.v[c]; return a; }
inline void multiply_add(Floats& sum, const Floats& a, const Floats& b) {
  CHANNELS sum.v[c] = __builtin_fmaf(a.v[c], b.v[c], sum.v[c]);
}
inline Floats maximum(const Floats& a, Floats b) { CHANNELS b.v[c] = a.v[c] > b.v[c] ? a.v[c] : b.v[c]; return b; }
inline float max_of(const Floats& x) { float most = x.v[0]; CHANNELS most = x.v[c] > most ? x.v[c] : most; return most; }
inline Floats largest_magnitude(const Floats& most, const Floats& x) {
  Floats y;
  CHANNELS {
    const uint32_t bits = read<uint32_t>(x.v + c) & 0x7FFFFFFF, before = read<uint32_t>(most.v + c);
    std::memcpy(y.v + c, bits > before ? &bits : &before, 4);
  }
  return y;
}
inline Floats divide(Floats a, const Floats& b) { CHANNELS a.v[c] /= b.v[c]; return a; }
inline Floats subtract(Floats a, const Floats& b) { CHANNELS a.v[c] -= b.v[c]; return a; }
inline void store_rounded(int8_t* at, const Floats& x) {
  constexpr float whole = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  CHANNELS at[c] = int8_t(int32_t(x.v[c] + whole - whole));
}
inline Floats times_power_of_two(Floats x, const Floats& n) {
  CHANNELS {
    const uint32_t bits = read<uint32_t>(x.v + c) + (read<uint32_t>(n.v + c) << 23);
    std::memcpy(x.v + c, &bits, 4);
  }
  return x;
}
struct Table { float v[16]; };
inline Table load_table(const float* at) { return read<Table>(at); }
template <int Shift>
inline Floats look_up(const Table& table, const Bytes& packed) {
  Floats x;
  CHANNELS x.v[c] = table.v[packed.v[c][Shift / 8] >> Shift % 8 & 15];
  return x;
}
template <int Shift>
inline Floats byte_to_floats(const Bytes& codes) { Floats x; CHANNELS x.v[c] = float(codes.v[c][Shift / 8]) - 128; return x; }

#endif

// ---- bfloat16 products, two columns at a time --------------------------------------------------------------------

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define QCOMPILE_BF16_PRODUCTS 1

struct PairTable { __m512i v; };  // sixteen bfloat16, twice, as the lookup reads five bits
inline PairTable load_pair_table(const float* at) {
  alignas(64) uint16_t words[32];
  for (int i = 0; i < 32; i++) words[i] = uint16_t(read<uint32_t>(at + i % 16) >> 16);
  return {_mm512_load_si512(words)};
}
template <int Shift>
inline __m512i look_up(const PairTable& table, const Bytes& packed) {  // four bits of each 16-bit word
  return _mm512_permutexvar_epi16(Shift ? _mm512_srli_epi16(packed.v, Shift) : packed.v, table.v);
}
inline void dot(Floats& sum, __m512i w, __m512i x) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(w), "v"(x)); }
#endif

}  // namespace qcompile
