// Matmuls with 8- and 4-bit weights for small m (decode), and unpacking of 4-bit weights for large m (prefill).
//
// Shapes: x [m, k], weight [n, k], out [m, n], all dense. A nibble weight is [n, groups, half] bytes:
// byte j of a group holds the group's column j in its low nibble and column half + j in its high one,
// so that both halves are read and written in order. A ragged last group is padded with zero codes.
//
// A channel of the weight is expanded in the first cache or in registers and multiplied by every row of x:
// memory is read once, in its packed form. Vectors are the compilers' own (vector_size), so that one
// source serves AVX-512, AVX2 and NEON; only the byte dot product names an instruction.
//
// Nothing is checked here: the operators (cpu_op_checks.py) refuse sizes, dtypes and layouts other than these. m, n and k
// may be zero. Sums of integers wrap as uint32 and are read as int32: a part of a sum may exceed what the sum does not.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace {

using i64 = int64_t;

template <int W>
struct Vector {
  typedef uint8_t bytes __attribute__((vector_size(W)));
  typedef uint16_t words __attribute__((vector_size(W)));
};
typedef uint8_t byte16 __attribute__((vector_size(16)));
typedef int32_t int16x __attribute__((vector_size(64)));
typedef float float16 __attribute__((vector_size(64)));

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline i64 padded(i64 k) { return (k + 63) / 64 * 64; }

// ---- expansion of codes --------------------------------------------------------------------------

// s q - o in bytes that wrap, one group. Two nibbles share a 16-bit product: s q <= 17 * 15 = 255.
template <int W>
inline void expand_group(const uint8_t* from, i64 half, uint8_t scale, uint8_t offset, uint8_t* out) {
  using B = typename Vector<W>::bytes;
  using S = typename Vector<W>::words;
  const uint16_t s = scale;
  for (i64 j = 0; j < half; j += W) {
    const S both = load<S>(from + j);
    const S low = (both & 0x0F0F) * s, high = ((both >> 4) & 0x0F0F) * s;
    store<B>(out + j, (B)low - offset);
    store<B>(out + half + j, (B)high - offset);
  }
}

inline void expand(const uint8_t* from, i64 half, uint8_t scale, uint8_t offset, uint8_t* out) {
  if (half % 64 == 0)
    expand_group<64>(from, half, scale, offset, out);
  else if (half % 32 == 0)
    expand_group<32>(from, half, scale, offset, out);
  else
    expand_group<16>(from, half, scale, offset, out);
}

// Bytes to floats by way of integers: one instruction each, where a direct conversion becomes several.
inline float16 widen(byte16 bytes) {
  return __builtin_convertvector(__builtin_convertvector(bytes, int16x), float16);
}

// a q - c in float, one group.
inline void expand(const uint8_t* from, i64 half, float a, float c, float* out) {
  for (i64 j = 0; j < half; j += 16) {
    const byte16 both = load<byte16>(from + j);
    store<float16>(out + j, widen(both & 15) * a - c);
    store<float16>(out + half + j, widen(both >> 4) * a - c);
  }
}

// ---- dot products: one channel times R rows, `stride` values from one row to the next ----------------

// Unsigned times signed bytes; k is a multiple of 64.
template <int R>
inline void dots(const uint8_t* w, const int8_t* x, i64 k, i64 stride, int32_t* out, i64 n) {
#if defined(__AVX512VNNI__)
  __m512i sums[R];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (i64 j = 0; j < k; j += 64) {
    const __m512i a = _mm512_loadu_si512(w + j);
    for (int r = 0; r < R; r++) sums[r] = _mm512_dpbusd_epi32(sums[r], a, _mm512_loadu_si512(x + r * stride + j));
  }
  for (int r = 0; r < R; r++) out[r * n] = _mm512_reduce_add_epi32(sums[r]);
#else
  for (int r = 0; r < R; r++) {
    uint32_t sum = 0;
    for (i64 j = 0; j < k; j++) sum += uint32_t(w[j] * x[r * stride + j]);
    out[r * n] = int32_t(sum);
  }
#endif
}

template <int R>
inline void reduce(const float16* sums, float* out, i64 n) {
  for (int r = 0; r < R; r++) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += sums[r][i];
    out[r * n] = sum;
  }
}

// Signed bytes, read as w + 128, times floats.
template <int R>
inline void dots(const int8_t* w, const float* x, i64 k, i64 stride, float* out, i64 n) {
  float16 sums[R] = {};
  const auto add = [&](byte16 bytes, i64 j) __attribute__((always_inline)) {
    const float16 a = widen(bytes ^ 0x80);
    for (int r = 0; r < R; r++) sums[r] += a * load<float16>(x + r * stride + j);
  };
  i64 j = 0;
  for (; j + 16 <= k; j += 16) add(load<byte16>(w + j), j);
  if (j < k) {
    byte16 rest = {};
    std::memcpy(&rest, w + j, k - j);
    add(rest, j);
  }
  reduce<R>(sums, out, n);
}

// Nibbles times floats, each group times its scale.
template <int R>
inline void dots(const uint8_t* w, const float* scale, i64 groups, i64 half, const float* x, i64 stride, float* out,
                 i64 n) {
  float16 sums[R] = {};
  for (i64 g = 0; g < groups; g++, x += 2 * half, w += half) {
    float16 parts[R] = {};
    for (i64 j = 0; j < half; j += 16) {
      const byte16 both = load<byte16>(w + j);
      const float16 low = widen(both & 15), high = widen(both >> 4);
      for (int r = 0; r < R; r++) {
        parts[r] += low * load<float16>(x + r * stride + j);
        parts[r] += high * load<float16>(x + r * stride + half + j);
      }
    }
    for (int r = 0; r < R; r++) sums[r] += parts[r] * scale[g];
  }
  reduce<R>(sums, out, n);
}

// ---- small m ---------------------------------------------------------------------------------------

// Rows of x, padded with zeros to whole vectors. A stride of a power of two would make them share cache sets.
template <class T>
struct Rows {
  i64 stride;
  std::vector<T> data;
  Rows(const T* x, i64 m, i64 k, i64 wide) : stride(padded(wide) + 64 / i64(sizeof(T))), data(m * stride, 0) {
    for (i64 r = 0; r < m; r++) std::memcpy(&data[r * stride], x + r * k, k * sizeof(T));
  }
  const T* operator[](i64 r) const { return &data[r * stride]; }
};

// Calls block.operator()<R>(first row) until m rows are done.
template <class Block>
inline void by_blocks(i64 m, Block block) {
  i64 r = 0;
  for (; r + 8 <= m; r += 8) block.template operator()<8>(r);
  for (; r + 4 <= m; r += 4) block.template operator()<4>(r);
  for (; r + 2 <= m; r += 2) block.template operator()<2>(r);
  for (; r < m; r++) block.template operator()<1>(r);
}

// Sums of each group of each row, [groups, m].
template <class Sum, class T>
std::vector<Sum> group_sums(const T* x, i64 m, i64 k, i64 groups, i64 group) {
  std::vector<Sum> sums(m * groups, 0);
  for (i64 r = 0; r < m; r++)
    for (i64 g = 0; g < groups; g++) {
      Sum sum = 0;
      for (i64 j = g * group; j < std::min(k, (g + 1) * group); j++) sum += Sum(x[r * k + j]);
      sums[g * m + r] = sum;
    }
  return sums;
}

// out[r] -= sum over groups of offset(g) times the sum of row r's group (the zero points' share of the product).
template <class Sum, class Offset, class Out>
inline void subtract_offsets(const std::vector<Sum>& sums, i64 m, i64 groups, Offset offset, Out* out, i64 n) {
  for (i64 first = 0; first < m; first += 16) {
    Sum total[16] = {};
    const i64 count = std::min<i64>(16, m - first);
    for (i64 g = 0; g < groups; g++) {
      const Sum factor = offset(g);
      for (i64 r = 0; r < count; r++) total[r] += factor * sums[g * m + first + r];
    }
    for (i64 r = 0; r < count; r++) out[(first + r) * n] = Out(Sum(out[(first + r) * n]) - total[r]);
  }
}

// Whether there is nothing to multiply: no value of out, or only sums of nothing.
template <class T>
inline bool empty(T* out, i64 m, i64 k, i64 n) {
  if (!k) std::fill(out, out + m * n, T(0));
  return !m || !k || !n;
}

// float32 -> bfloat16, to nearest even; NaN stays NaN.
inline void floats_to_bf16(const float* from, uint16_t* to, i64 count) {
  for (i64 j = 0; j < count; j++) {
    uint32_t bits;
    std::memcpy(&bits, from + j, 4);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    to[j] = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded);
  }
}

}  // namespace

extern "C" {

// x int8, w int8. Bytes of w are read as w + 128, and 128 sum(x) is subtracted.
void small_m_int8(const int8_t* x, const int8_t* w, int32_t* out, i64 m, i64 k, i64 n, i64 threads) {
  if (empty(out, m, k, n)) return;
  const auto sums = group_sums<uint32_t>(x, m, k, 1, k);
  const Rows<int8_t> rows(x, m, k, k);
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> codes(padded(k), 0);
#pragma omp for schedule(static)
    for (i64 c = 0; c < n; c++) {
      for (i64 j = 0; j < k; j++) codes[j] = uint8_t(w[c * k + j]) ^ 0x80;
      by_blocks(m, [&]<int R>(i64 r) { dots<R>(codes.data(), rows[r], padded(k), rows.stride, out + r * n + c, n); });
      subtract_offsets(sums, m, 1, [](i64) { return 128u; }, out + c, n);
    }
  }
}

// x int8, w = s (q - z): sum of q s x, less sum over groups of s z sum(x).
void small_m_dual(const int8_t* x, const uint8_t* nibbles, const int8_t* scale, const uint8_t* zero, int32_t* out,
                  i64 m, i64 k, i64 n, i64 groups, i64 half, i64 threads) {
  if (empty(out, m, k, n)) return;
  const i64 group = 2 * half, wide = padded(groups * group);
  const auto sums = group_sums<uint32_t>(x, m, k, groups, group);
  const Rows<int8_t> rows(x, m, k, wide);
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> codes(wide, 0);
#pragma omp for schedule(static)
    for (i64 c = 0; c < n; c++) {
      const i64 at = c * groups;
      for (i64 g = 0; g < groups; g++)
        expand(nibbles + (at + g) * half, half, uint8_t(scale[at + g]), uint8_t(0), &codes[g * group]);
      by_blocks(m, [&]<int R>(i64 r) { dots<R>(codes.data(), rows[r], wide, rows.stride, out + r * n + c, n); });
      const auto offset = [&](i64 g) { return uint32_t(scale[at + g] * zero[at + g]); };
      subtract_offsets(sums, m, groups, offset, out + c, n);
    }
  }
}

// x float, w int8 without its scale. Bytes of w are read as w + 128.
void small_m_int8_float(const float* x, const int8_t* w, float* out, i64 m, i64 k, i64 n, i64 threads) {
  if (empty(out, m, k, n)) return;
  const auto sums = group_sums<float>(x, m, k, 1, k);
  const Rows<float> rows(x, m, k, k);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 c = 0; c < n; c++) {
    by_blocks(m, [&]<int R>(i64 r) { dots<R>(w + c * k, rows[r], k, rows.stride, out + r * n + c, n); });
    subtract_offsets(sums, m, 1, [](i64) { return 128.0f; }, out + c, n);
  }
}

// x float, w = a q - c.
void small_m_nibble(const float* x, const uint8_t* nibbles, const float* a, const float* c, float* out, i64 m, i64 k,
                    i64 n, i64 groups, i64 half, i64 threads) {
  if (empty(out, m, k, n)) return;
  const auto sums = group_sums<float>(x, m, k, groups, 2 * half);
  const Rows<float> rows(x, m, k, groups * 2 * half);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 channel = 0; channel < n; channel++) {
    const i64 at = channel * groups;
    by_blocks(m, [&]<int R>(i64 r) {
      dots<R>(nibbles + at * half, a + at, groups, half, rows[r], rows.stride, out + r * n + channel, n);
    });
    subtract_offsets(sums, m, groups, [&](i64 g) { return c[at + g]; }, out + channel, n);
  }
}

// Integer sums [m, count] -> columns first .. first + count of out [m, n]: sums x_scale[row] scale[column]
// + bias[column], as float32 or, when `to_bf16`, bfloat16 rounded to nearest even. bias may be null.
void finish(const int32_t* sums, const float* x_scale, const float* scale, const float* bias, void* out, i64 to_bf16,
            i64 m, i64 count, i64 first, i64 n, i64 threads) {
  if (!m || !count) return;
#pragma omp parallel for num_threads(threads) schedule(static) if (m * count > 16384)
  for (i64 r = 0; r < m; r++) {
    const int32_t* from = sums + r * count;
    const float row = x_scale[r];
    if (!to_bf16) {
      float* to = static_cast<float*>(out) + r * n + first;
      for (i64 j = 0; j < count; j++) to[j] = float(from[j]) * row * scale[j];
      if (bias)
        for (i64 j = 0; j < count; j++) to[j] += bias[j];
      continue;
    }
    uint16_t* to = static_cast<uint16_t*>(out) + r * n + first;
    constexpr i64 strip = 256;
    float values[strip];
    for (i64 start = 0; start < count; start += strip) {
      const i64 some = std::min(strip, count - start);
      for (i64 j = 0; j < some; j++) values[j] = float(from[start + j]) * row * scale[start + j];
      if (bias)
        for (i64 j = 0; j < some; j++) values[j] += bias[start + j];
      floats_to_bf16(values, to + start, some);
    }
  }
}

// -> s (q - z), int8 [n, k].
void unpack_dual(const uint8_t* nibbles, const int8_t* scale, const uint8_t* zero, int8_t* out, i64 k, i64 n,
                 i64 groups, i64 half, i64 threads) {
  if (!k || !n) return;
  const i64 group = 2 * half;
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> whole(group);
#pragma omp for schedule(static)
    for (i64 c = 0; c < n; c++)
      for (i64 g = 0, at = c * groups; g < groups; g++, at++) {
        uint8_t* to = reinterpret_cast<uint8_t*>(out) + c * k + g * group;
        const i64 remaining = k - g * group;
        expand(nibbles + at * half, half, uint8_t(scale[at]), uint8_t(scale[at] * zero[at]),
               remaining < group ? whole.data() : to);
        if (remaining < group) std::memcpy(to, whole.data(), remaining);
      }
  }
}

// -> a q - c, float32 or, when `to_bf16`, bfloat16 rounded to nearest even, [n, k].
void unpack_nibble(const uint8_t* nibbles, const float* a, const float* c, void* out, i64 to_bf16, i64 k, i64 n,
                   i64 groups, i64 half, i64 threads) {
  if (!k || !n) return;
  const i64 wide = groups * 2 * half;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row(wide);
#pragma omp for schedule(static)
    for (i64 channel = 0; channel < n; channel++) {
      for (i64 g = 0, at = channel * groups; g < groups; g++, at++)
        expand(nibbles + at * half, half, a[at], c[at], &row[g * 2 * half]);
      if (!to_bf16) {
        std::memcpy(static_cast<float*>(out) + channel * k, row.data(), k * sizeof(float));
        continue;
      }
      floats_to_bf16(row.data(), static_cast<uint16_t*>(out) + channel * k, k);
    }
  }
}

}  // extern "C"
