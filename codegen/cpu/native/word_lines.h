// Products of activations: words of 32 bits, each two bfloat16 or one float32, of some rows times lines of sixteen.
//
// A line has one word of each of sixteen rows (or columns) of the other operand, so that a step of the product is a line
// times one word of each of R rows, with all sums in registers.

#pragma once

#include "attention.h"

namespace qcompile {

// How 32-bit words come from rows in memory: as they lie there, or each bfloat16 widened.
enum class Words { floats, pairs, widened };

template <Words W>
constexpr i64 columns_of_word = W == Words::pairs ? 2 : 1;
template <Words W>
constexpr i64 bytes_of_column = W == Words::floats ? 4 : 2;

template <Words W>
inline const u8* row_at(const Strided& x, i64 batch, i64 head, i64 position) {
  return static_cast<const u8*>(x.data) + (batch * x.batch + head * x.head + position * x.position) * bytes_of_column<W>;
}

template <Words W>
inline uint32_t word_at(const u8* row, i64 word) {
  return W == Words::widened ? uint32_t(read<uint16_t>(row + 2 * word)) << 16 : read<uint32_t>(row + 4 * word);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
template <Words W>
inline __m512i words_at(const u8* row, i64 first, __mmask16 which) {
  if (W != Words::widened) return _mm512_maskz_loadu_epi32(which, row + 4 * first);
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, row + 2 * first)), 16);
}

// Sixteen rows of sixteen words -> their columns.
inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  EACH(int i = 0; i < 8; i++) {
    y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]), y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
  EACH(int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]), x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]), x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  EACH(int i = 0; i < 4; i++) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xDD);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88), y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xDD);
  }
  EACH(int i = 0; i < 4; i++) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88), x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xDD);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88), x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xDD);
  }
}
#elif defined(__AVX2__)
template <Words W>
inline __m256 words_at(const u8* row, i64 first) {
  if (W != Words::widened) return _mm256_loadu_ps(reinterpret_cast<const float*>(row) + first);
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(row + 2 * first)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// Eight rows of eight words -> their columns.
inline void transpose(__m256 (&x)[8]) {
  __m256 y[8];
  EACH(int i = 0; i < 8; i += 2) y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  EACH(int i = 0; i < 8; i += 4) {
    x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44), x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xEE);
    x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44), x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xEE);
  }
  EACH(int i = 0; i < 4; i++) {
    y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20), y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
  }
  EACH(int i = 0; i < 8; i++) x[i] = y[i];
}
#endif

// Up to sixteen rows -> words, Step bytes apart: what each row has of a word lies together. Rows that are not there are
// zero. Writes up to 64 bytes behind the last word.
template <Words W, i64 Step>
inline void pack_rows(const u8* rows, i64 stride, i64 count, i64 words, u8* to) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  for (i64 first = 0; first < words; first += 16) {
    const i64 some = std::min<i64>(16, words - first);
    const auto which = __mmask16((1u << some) - 1);
    __m512i x[16];
    if (count == 16) {
      EACH(int r = 0; r < 16; r++) x[r] = words_at<W>(rows + r * stride, first, which);
    } else {
      EACH(int r = 0; r < 16; r++)
      x[r] = r < count ? words_at<W>(rows + r * stride, first, which) : _mm512_setzero_si512();
    }
    transpose(x);
    EACH(int w = 0; w < 16; w++) if (w < some) _mm512_storeu_si512(to + (first + w) * Step, x[w]);
  }
#elif defined(__AVX2__)
  for (i64 r = 0; r * 4 < Step; r += 8)
    for (i64 first = 0; first < words; first += 8) {  // widths are multiples of 8
      __m256 x[8];
      EACH(int i = 0; i < 8; i++) x[i] = r + i < count ? words_at<W>(rows + (r + i) * stride, first) : _mm256_setzero_ps();
      transpose(x);
      EACH(int i = 0; i < 8; i++) _mm256_storeu_ps(reinterpret_cast<float*>(to + (first + i) * Step + r * 4), x[i]);
    }
#else
  if (count * 4 < Step) std::memset(to, 0, words * Step);
  for (i64 r = 0; r < count; r++)
    for (i64 w = 0; w < words; w++) {
      const uint32_t word = word_at<W>(rows + r * stride, w);
      std::memcpy(to + w * Step + r * 4, &word, 4);
    }
#endif
}

// Some values, and zeros behind them.
inline Floats load_first(const uint16_t* at, i64 count) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  const __m256i words = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), at);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
#else
  uint16_t words[16] = {};
  std::memcpy(words, at, count * 2);
  return load_bf16(words);
#endif
}
inline Floats load_first(const float* at, i64 count) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return {_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), at)};
#else
  return load_some(at, count);
#endif
}

// NB lines of each step times a word of R rows, whose steps are Step bytes apart, and rows Row bytes; to out [R][NB 16],
// whose rows are `stride` floats apart. Not inline: GCC 12 then spills sums.
template <bool Pairs, int R, int NB, i64 Step, i64 Row>
[[gnu::noinline]] void multiply_lines(const u8* rows, const u8* lines, i64 steps, float* out, i64 stride) {
  Floats sums[R][NB];
  EACH(int r = 0; r < R; r++) EACH(int b = 0; b < NB; b++) sums[r][b] = floats(0);
  for (i64 s = 0; s < steps; s++) {
    const u8* at = rows + s * Step;
#if defined(QCOMPILE_BF16_PRODUCTS)
    if constexpr (Pairs) {
      __m512i line[NB];
      EACH(int b = 0; b < NB; b++) line[b] = _mm512_loadu_si512(lines + (b * steps + s) * 64);
      EACH(int r = 0; r < R; r++) {
        const __m512i word = _mm512_set1_epi32(read<int32_t>(at + r * Row));
        EACH(int b = 0; b < NB; b++) dot(sums[r][b], line[b], word);
      }
    } else
#endif
    {
      Floats line[NB];
      EACH(int b = 0; b < NB; b++) line[b] = load_floats(reinterpret_cast<const float*>(lines + (b * steps + s) * 64));
      EACH(int r = 0; r < R; r++) {
        const Floats word = floats(read<float>(at + r * Row));
        EACH(int b = 0; b < NB; b++) multiply_add(sums[r][b], line[b], word);
      }
    }
  }
  EACH(int r = 0; r < R; r++) EACH(int b = 0; b < NB; b++) store_floats(out + r * stride + b * 16, sums[r][b]);
}

// Rows times blocks of lines [blocks][steps][16] -> out [R][blocks 16].
template <bool Pairs, int R, i64 Step, i64 Row>
inline void multiply_all(const u8* rows, const u8* lines, i64 blocks, i64 steps, float* out, i64 stride) {
  i64 block = 0;
  for (; block + blocks_of_tile <= blocks; block += blocks_of_tile)
    multiply_lines<Pairs, R, blocks_of_tile, Step, Row>(rows, lines + block * steps * 64, steps, out + block * 16, stride);
  for (; block < blocks; block++)
    multiply_lines<Pairs, R, 1, Step, Row>(rows, lines + block * steps * 64, steps, out + block * 16, stride);
}

}  // namespace qcompile
