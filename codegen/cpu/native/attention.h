// Attention of few rows: what a decoded token does with its cache.
//
// The query heads that share a key head, and their positions, are rows over the same keys, each of which is read once. A
// task is a run of keys of one key head; it keeps, for each row, the largest score, the sum of exponentials and the sum
// of values that they weigh, and tasks of one head are put together last (FlashDecoding). Everything is float32.

#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>

#include "rows.h"

namespace qcompile {

constexpr int most_query_rows = 16, most_head_size = 256, keys_at_a_time = 32;

struct Strided {  // [batch, heads, positions, head size], of which the last is dense
  const void* data;
  i64 batch, head, position;
};

struct Keys {  // and their values
  Strided key, value;
  i64 count;
};

struct Attention {
  i64 batch, heads, shared, positions, width, value_width;  // `shared` key heads
  Strided query;
  Keys past, fresh;  // what a cache holds, and what comes behind it
  bool is_bf16;
  const void* mask;  // added to scores, float32; or which keys to see, bool
  bool mask_is_bool;
  i64 mask_batch, mask_head, mask_position, mask_key;  // strides
  float scale;
  void* out;  // [batch, positions, heads, value width]

  i64 group() const { return heads / shared; }
  int rows() const { return int(group() * positions); }
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

template <bool BF16>
inline Floats load16(const void* row, i64 at) {
  return BF16 ? load_bf16(static_cast<const uint16_t*>(row) + at) : load_floats(static_cast<const float*>(row) + at);
}

template <bool BF16>
inline const void* row_of(const Strided& x, i64 batch, i64 head, i64 position) {
  return static_cast<const u8*>(x.data) + (batch * x.batch + head * x.head + position * x.position) * (BF16 ? 2 : 4);
}

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
};

template <bool BF16>
void start(const Attention& a, i64 batch, i64 shared_head, Queries& rows, Partial& part) {
  for (int r = 0; r < a.rows(); r++) {
    const void* from = row_of<BF16>(a.query, batch, shared_head * a.group() + r / a.positions, r % a.positions);
    for (i64 d = 0; d < a.width; d += 16) store_floats(rows.query[r] + d, multiply(load16<BF16>(from, d), floats(a.scale)));
    part.most[r] = -std::numeric_limits<float>::infinity(), part.sum[r] = 0;
    std::memset(part.values + r * a.value_width, 0, a.value_width * sizeof(float));
  }
}

// Keys first .. last of `k`, of which the mask counts from `offset`.
template <bool BF16>
void attend(const Attention& a, const Keys& k, i64 batch, i64 shared_head, i64 first, i64 last, i64 offset, const Queries& q,
            Partial& part) {
  const int rows = a.rows();
  alignas(64) float scores[most_query_rows][keys_at_a_time];
  for (i64 key = first; key < last; key += keys_at_a_time) {
    const i64 count = std::min<i64>(keys_at_a_time, last - key);
    for (i64 j = 0; j < count; j++) {
      const void* from = row_of<BF16>(k.key, batch, shared_head, key + j);
      for (int r = 0; r < rows; r++) {
        Floats sum = floats(0);
        for (i64 d = 0; d < a.width; d += 16) multiply_add(sum, load16<BF16>(from, d), load_floats(q.query[r] + d));
        scores[r][j] = sum_of(sum);
      }
    }
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
      if (before != 1)
        for (i64 d = 0; d < a.value_width; d++) part.values[r * a.value_width + d] *= before;
    }
    for (i64 d = 0; d < a.value_width; d += 16)
      for (int r = 0; r < rows; r += 4) {
        const int some = std::min(4, rows - r);
        Floats sums[4];
        for (int i = 0; i < some; i++) sums[i] = load_floats(part.values + (r + i) * a.value_width + d);
        for (i64 j = 0; j < count; j++) {
          const Floats value = load16<BF16>(row_of<BF16>(k.value, batch, shared_head, key + j), d);
          for (int i = 0; i < some; i++) multiply_add(sums[i], value, floats(scores[r + i][j]));
        }
        for (int i = 0; i < some; i++) store_floats(part.values + (r + i) * a.value_width + d, sums[i]);
      }
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

template <bool BF16>
void attend_run(const Attention& a, i64 batch, i64 shared_head, i64 first, i64 last, Partial& part) {
  Queries rows;
  start<BF16>(a, batch, shared_head, rows, part);
  const i64 past = a.past.count;
  attend<BF16>(a, a.past, batch, shared_head, first, std::min(last, past), 0, rows, part);
  attend<BF16>(a, a.fresh, batch, shared_head, std::max<i64>(first - past, 0), last - past, past, rows, part);
}

inline void attention(const Attention& a) {
  const i64 heads = a.batch * a.shared, threads = at::get_num_threads(), keys = a.past.count + a.fresh.count;
  // As many runs of keys as let every thread have as much; none of fewer than 128 keys.
  const i64 runs = heads % threads == 0 ? 1 : std::clamp<i64>(keys / 128, 1, threads);
  const i64 span = (keys + runs - 1) / runs;
  auto* parts = reinterpret_cast<Partial*>(block_scratch.get(heads * runs * i64(sizeof(Partial))));
  const i64 work = std::max<i64>(1, span * a.rows() * a.width);
  at::parallel_for(0, heads * runs, std::max<i64>(1, 50000 / work), [&](i64 first, i64 last) {
    for (i64 task = first; task < last; task++) {
      const i64 head = task / runs, from = task % runs * span, to = std::min(keys, from + span);
      if (a.is_bf16) attend_run<true>(a, head / a.shared, head % a.shared, from, to, parts[task]);
      else attend_run<false>(a, head / a.shared, head % a.shared, from, to, parts[task]);
    }
  });
  for (i64 head = 0; head < heads; head++) combine(a, head / a.shared, head % a.shared, &parts[head * runs], runs);
}

}  // namespace qcompile
