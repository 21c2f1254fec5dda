// Attention of few rows: what a decoded token does with its cache.
//
// The query heads that share a key head, and their positions, are rows over the same keys, each of which is read once. A
// task is a run of keys of one key head; it keeps, for each row, the largest score, the sum of exponentials and the sum
// of values that they weigh, and tasks of one head are put together last (FlashDecoding). Everything is float32.
//
// Keys and values are floats, or codes c of s (c - z) with a scale and a zero point for each head and token: then
// q . k = s (q . c - z sum(q)), and values are summed as codes that p s weighs, less the sum of p s z.

#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "rows.h"

namespace qcompile {

constexpr int most_query_rows = 16, most_head_size = 256, keys_at_a_time = 32;

struct Strided {  // [batch, heads, positions, head size], of which the last is dense
  const void* data;
  i64 batch, head, position;
};

enum class Element { f32, bf16, u8, u4 };  // of u4 two in a byte, the first in its low half

struct Scales {  // of codes: float16, and zero points; [batch, heads, positions]
  const uint16_t* scale;
  const u8* zero;
  i64 batch, head, position;  // strides of both
};

struct Keys {  // and their values
  Strided key, value;
  i64 count = 0;
  Element element;
  Scales key_scales, value_scales;
};

struct Attention {
  i64 batch, heads, shared, positions, width, value_width;  // `shared` key heads
  Strided query;
  Keys parts[3];  // one behind the other, as the mask counts: tokens that stay float, what a cache holds, what is new
  Strided code_query;  // float32, what multiplies codes of keys: the query, rotated as they are; or none, the query itself
  const float* code_bias;  // [batch, heads, positions], dense: added to it, times the scale; or none
  bool is_bf16;
  const void* mask;  // added to scores, float32; or which keys to see, bool
  bool mask_is_bool;
  i64 mask_batch, mask_head, mask_position, mask_key;  // strides
  float scale;
  void* out;  // [batch, positions, heads, value width]

  i64 group() const { return heads / shared; }
  int rows() const { return int(group() * positions); }
  i64 keys() const { return parts[0].count + parts[1].count + parts[2].count; }
};

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial (Cephes' expf); e^-87 below.
inline Floats exp_of(const Floats& given) {
  const Floats x = maximum(floats(-87.0f), given);
  Floats n = floats(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer, in its lowest bits
  multiply_add(n, x, floats(1.44269504088896341f));
  const Floats whole = add(n, floats(-12582912.0f));
  Floats r = x;
  multiply_add(r, whole, floats(-0.693359375f)), multiply_add(r, whole, floats(2.12194440e-4f));
  Floats p = floats(1.3981999507e-3f);
  multiply_add(p, r, floats(1.9875691500e-4f));
  for (const float c : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    Floats next = floats(c);
    multiply_add(next, p, r), p = next;
  }
  Floats y = add(r, floats(1.0f));
  multiply_add(y, multiply(p, r), r);
  return times_power_of_two(y, n);
}

template <Element E>
inline Floats load16(const void* row, i64 at) {
  if constexpr (E == Element::bf16) return load_bf16(static_cast<const uint16_t*>(row) + at);
  else if constexpr (E == Element::f32) return load_floats(static_cast<const float*>(row) + at);
  else if constexpr (E == Element::u8) return load_floats(static_cast<const u8*>(row) + at);
  else {
    alignas(16) u8 codes[16];
    const u8* pairs = static_cast<const u8*>(row) + at / 2;
#if defined(__SSE2__)
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs)), low = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), low);
    _mm_store_si128(reinterpret_cast<__m128i*>(codes), _mm_unpacklo_epi8(_mm_and_si128(both, low), high));
#else
    for (int i = 0; i < 8; i++) codes[2 * i] = pairs[i] & 15, codes[2 * i + 1] = pairs[i] >> 4;
#endif
    return load_floats(codes);
  }
}

template <Element E>
inline const void* row_of(const Strided& x, i64 batch, i64 head, i64 position) {
  constexpr int size = E == Element::f32 ? 4 : E == Element::bf16 ? 2 : 1;
  return static_cast<const u8*>(x.data) + (batch * x.batch + head * x.head + position * x.position) * size;
}

inline float from_half(uint16_t bits) { return c10::detail::fp16_ieee_to_fp32_value(bits); }

// What a task knows of a row: the largest score, the sum of e^(score - largest), and values weighed with these.
struct Partial {
  float most[most_query_rows], sum[most_query_rows];
  alignas(64) float values[most_query_rows * most_head_size];
};
static_assert(sizeof(Partial) % 64 == 0);

inline void mask_scores(const Attention& a, i64 batch, i64 head, i64 position, i64 first, i64 count, float* scores) {
  const i64 at = batch * a.mask_batch + head * a.mask_head + position * a.mask_position + first * a.mask_key;
  for (i64 j = 0; j < count; j++) {
    if (!a.mask_is_bool) scores[j] += static_cast<const float*>(a.mask)[at + j * a.mask_key];
    else if (!static_cast<const bool*>(a.mask)[at + j * a.mask_key]) scores[j] = -std::numeric_limits<float>::infinity();
  }
}

struct Queries {  // of a key head, times the scale
  alignas(64) float query[most_query_rows][most_head_size];
  float sum[most_query_rows], bias[most_query_rows];  // what codes need besides
};

template <Element E>
void load_queries(const Attention& a, const Strided& from, const float* bias, i64 batch, i64 shared_head, Queries& rows) {
  for (int r = 0; r < a.rows(); r++) {
    const i64 head = shared_head * a.group() + r / a.positions, position = r % a.positions;
    const void* row = row_of<E>(from, batch, head, position);
    Floats sum = floats(0);
    for (i64 d = 0; d < a.width; d += 16) {
      const Floats scaled = multiply(load16<E>(row, d), floats(a.scale));
      store_floats(rows.query[r] + d, scaled), sum = add(sum, scaled);
    }
    rows.sum[r] = sum_of(sum);
    rows.bias[r] = bias ? bias[(batch * a.heads + head) * a.positions + position] * a.scale : 0;
  }
}

inline void start(const Attention& a, Partial& part) {
  for (int r = 0; r < a.rows(); r++) part.most[r] = -std::numeric_limits<float>::infinity(), part.sum[r] = 0;
  std::memset(part.values, 0, a.rows() * a.value_width * sizeof(float));
}

inline void load_scales(const Scales& from, i64 batch, i64 head, i64 first, i64 count, float* scale, float* zero) {
  for (i64 j = 0; j < count; j++) {
    const i64 at = batch * from.batch + head * from.head + (first + j) * from.position;
    scale[j] = from_half(from.scale[at]), zero[j] = from.zero[at];
  }
}

// Calls with a constant, so that what is kept of each row stays in registers.
template <class Call>
inline void with_rows(int rows, const Call& call) {
  if (rows == 4) call(std::integral_constant<int, 4>());
  else if (rows == 3) call(std::integral_constant<int, 3>());
  else if (rows == 2) call(std::integral_constant<int, 2>());
  else call(std::integral_constant<int, 1>());
}

// Keys first .. last of `k`, of which the mask counts from `offset`.
template <Element E>
void attend(const Attention& a, const Keys& k, i64 batch, i64 shared_head, i64 first, i64 last, i64 offset, const Queries& q,
            Partial& part) {
  constexpr bool coded = E == Element::u8 || E == Element::u4;
  const int rows = a.rows();
  alignas(64) float scores[most_query_rows][keys_at_a_time];
  float scale[keys_at_a_time], zero[keys_at_a_time];
  for (i64 key = first; key < last; key += keys_at_a_time) {
    const i64 count = std::min<i64>(keys_at_a_time, last - key);
    if constexpr (coded) load_scales(k.key_scales, batch, shared_head, key, count, scale, zero);
    for (i64 j = 0; j < count; j++) {
      const void* from = row_of<E>(k.key, batch, shared_head, key + j);
      for (int r = 0; r < rows; r += 4)
        with_rows(std::min(4, rows - r), [&](auto some) {
          Floats sums[some];
          EACH(int i = 0; i < some; i++) sums[i] = floats(0);
          for (i64 d = 0; d < a.width; d += 16) {
            const Floats x = load16<E>(from, d);
            EACH(int i = 0; i < some; i++) multiply_add(sums[i], x, load_floats(q.query[r + i] + d));
          }
          EACH(int i = 0; i < some; i++) scores[r + i][j] = sum_of(sums[i]);
        });
      if constexpr (coded)
        for (int r = 0; r < rows; r++) scores[r][j] = scale[j] * (scores[r][j] - zero[j] * q.sum[r]) + q.bias[r];
    }
    if constexpr (coded) load_scales(k.value_scales, batch, shared_head, key, count, scale, zero);
    for (int r = 0; r < rows; r++) {
      if (a.mask) mask_scores(a, batch, shared_head * a.group() + r / a.positions, r % a.positions, offset + key, count,
                              scores[r]);
      constexpr float lowest = -std::numeric_limits<float>::infinity();
      for (i64 j = count; j < (count + 15) / 16 * 16; j++) scores[r][j] = lowest;
      Floats top = floats(part.most[r]);
      for (i64 j = 0; j < count; j += 16) top = maximum(top, load_floats(scores[r] + j));
      const float most = max_of(top);
      const bool nothing = most == lowest;
      Floats sums = floats(0);
      for (i64 j = 0; j < count; j += 16) {
        const Floats powers = nothing ? floats(0) : exp_of(add(load_floats(scores[r] + j), floats(-most)));
        store_floats(scores[r] + j, powers), sums = add(sums, powers);
      }
      const float sum = sum_of(sums);
      const float before = nothing || part.sum[r] == 0 ? 0 : std::exp(part.most[r] - most);
      part.sum[r] = part.sum[r] * before + sum, part.most[r] = most;
      float* values = part.values + r * a.value_width;
      if (before != 1)
        for (i64 d = 0; d < a.value_width; d++) values[d] *= before;
      if constexpr (coded) {
        float shift = 0;
        for (i64 j = 0; j < count; j++) scores[r][j] *= scale[j], shift += scores[r][j] * zero[j];
        for (i64 d = 0; d < a.value_width; d++) values[d] -= shift;
      }
    }
    for (i64 d = 0; d < a.value_width; d += 16)
      for (int r = 0; r < rows; r += 4)
        with_rows(std::min(4, rows - r), [&](auto some) {
          Floats sums[some];
          EACH(int i = 0; i < some; i++) sums[i] = load_floats(part.values + (r + i) * a.value_width + d);
          for (i64 j = 0; j < count; j++) {
            const Floats value = load16<E>(row_of<E>(k.value, batch, shared_head, key + j), d);
            EACH(int i = 0; i < some; i++) multiply_add(sums[i], value, floats(scores[r + i][j]));
          }
          EACH(int i = 0; i < some; i++) store_floats(part.values + (r + i) * a.value_width + d, sums[i]);
        });
  }
}

// Tasks of one key head -> rows of the output. A row that sees no key is zero.
inline void combine(const Attention& a, i64 batch, i64 shared_head, const Partial* parts, i64 count) {
  for (int r = 0; r < a.rows(); r++) {
    float most = -std::numeric_limits<float>::infinity(), sum = 0;
    for (i64 p = 0; p < count; p++) most = parts[p].most[r] > most || parts[p].most[r] != parts[p].most[r] ? parts[p].most[r] : most;
    alignas(64) float values[most_head_size] = {};
    for (i64 p = 0; p < count; p++) {
      const float by = parts[p].sum[r] == 0 ? 0 : std::exp(parts[p].most[r] - most);
      sum += parts[p].sum[r] * by;
      for (i64 d = 0; d < a.value_width; d++) values[d] += parts[p].values[r * a.value_width + d] * by;
    }
    const i64 head = shared_head * a.group() + r / a.positions;
    const i64 at = ((batch * a.positions + r % a.positions) * a.heads + head) * a.value_width;
    for (i64 d = 0; d < a.value_width; d++) {
      const float value = sum == 0 ? 0 : values[d] / sum;
      if (a.is_bf16) static_cast<uint16_t*>(a.out)[at + d] = to_bf16(value);
      else static_cast<float*>(a.out)[at + d] = value;
    }
  }
}

template <Element E>  // of the query
void attend_run(const Attention& a, i64 batch, i64 shared_head, i64 first, i64 last, Partial& part) {
  Queries rows, code_rows;
  load_queries<E>(a, a.query, nullptr, batch, shared_head, rows);
  if (a.code_query.data) load_queries<Element::f32>(a, a.code_query, a.code_bias, batch, shared_head, code_rows);
  else load_queries<E>(a, a.query, a.code_bias, batch, shared_head, code_rows);
  start(a, part);
  i64 offset = 0;
  for (const Keys& k : a.parts) {
    const i64 from = std::max<i64>(first - offset, 0), to = std::min(last - offset, k.count);
    if (k.element == Element::u8) attend<Element::u8>(a, k, batch, shared_head, from, to, offset, code_rows, part);
    else if (k.element == Element::u4) attend<Element::u4>(a, k, batch, shared_head, from, to, offset, code_rows, part);
    else attend<E>(a, k, batch, shared_head, from, to, offset, rows, part);
    offset += k.count;
  }
}

inline void attention(const Attention& a) {
  const i64 heads = a.batch * a.shared, threads = at::get_num_threads(), keys = a.keys();
  // As many runs of keys as let every thread have as much; none of fewer than 128 keys.
  const i64 runs = heads % threads == 0 ? 1 : std::clamp<i64>(keys / 128, 1, threads);
  const i64 span = (keys + runs - 1) / runs;
  auto* parts = reinterpret_cast<Partial*>(block_scratch.get(heads * runs * i64(sizeof(Partial))));
  const i64 work = std::max<i64>(1, span * a.rows() * a.width);
  at::parallel_for(0, heads * runs, std::max<i64>(1, 50000 / work), [&](i64 first, i64 last) {
    for (i64 task = first; task < last; task++) {
      const i64 head = task / runs, from = task % runs * span, to = std::min(keys, from + span);
      if (a.is_bf16) attend_run<Element::bf16>(a, head / a.shared, head % a.shared, from, to, parts[task]);
      else attend_run<Element::f32>(a, head / a.shared, head % a.shared, from, to, parts[task]);
    }
  });
  for (i64 head = 0; head < heads; head++) combine(a, head / a.shared, head % a.shared, &parts[head * runs], runs);
}

}  // namespace qcompile
