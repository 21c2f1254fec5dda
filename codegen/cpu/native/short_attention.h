// Attention over short sequences, of all positions at once: a text, an image, or a window of one.
//
// A task is a run of queries of one head. It packs the head's keys and values into lines of sixteen 32-bit words, each two
// bfloat16 or one float32, and takes a few queries at a time: scores, a softmax in float32, and values that it weighs.
// Both products are the same: a word of each of R rows times lines, with sums in registers. All of it stays in the
// second cache, and scores never leave it. More than 1024 keys are taken in parts, whose sums are put together.

#pragma once

#include <vector>

#include "activations.h"
#include "word_lines.h"

namespace qcompile {

constexpr i64 keys_of_part = 1024, most_short_head = 256;
constexpr i64 score_stride = keys_of_part + 16;  // floats: rows of one column are in different sets of a cache
constexpr int queries_at_a_time = rows_of_tile >= 12 ? 12 : 6;  // sums in 24 of 32 registers, or 12 of 16

struct ShortAttention {
  i64 batch, heads, shared, positions, keys, width, value_width;  // `shared` key heads
  Strided query, key, value;
  bool is_bf16;
  const void* mask;  // added to scores, or none
  bool mask_is_bf16;
  i64 mask_batch, mask_head, mask_position;  // strides; keys are dense
  float scale;
  void* out;  // [batch, positions, heads, value width]

  i64 value_blocks() const { return (value_width + 15) / 16; }
};

// Values of keys first .. last -> [E/16][words][16]; a word is one key, or two that follow each other.
template <Words W>
inline void pack_values(const ShortAttention& a, i64 batch, i64 head, i64 first_key, i64 last_key, u8* to) {
  const i64 words = (last_key - first_key + columns_of_word<W> - 1) / columns_of_word<W>;
  constexpr i64 size = bytes_of_column<W>;
  for (i64 e = 0; e < a.value_width; e += 16) {
    const i64 some = std::min<i64>(16, a.value_width - e);
    alignas(64) u8 whole[2][64] = {};
    const auto columns = [&](i64 key, int place) -> const u8* {
      if (first_key + key >= last_key) return static_cast<const u8*>(std::memset(whole[place], 0, 64));
      const u8* at = row_at<W>(a.value, batch, head, first_key + key) + e * size;
      return some == 16 ? at : static_cast<const u8*>(std::memcpy(whole[place], at, some * size));
    };
    for (i64 word = 0; word < words; word++, to += 64) {
      if constexpr (W == Words::floats) {
        std::memcpy(to, columns(word, 0), 64);
      } else if constexpr (W == Words::widened) {
        store_floats(reinterpret_cast<float*>(to), load_bf16(reinterpret_cast<const uint16_t*>(columns(word, 0))));
      } else {
#if defined(QCOMPILE_BF16_PRODUCTS)
        const auto wide = [](const u8* at) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)); };
        const __m512i first = wide(columns(2 * word, 0)), second = wide(columns(2 * word + 1, 1));
        _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
#endif
      }
    }
  }
}

inline void store_probabilities(u8* at, const Floats& x, bool pairs) {
#if defined(QCOMPILE_BF16_PRODUCTS)
  if (pairs) return _mm256_storeu_si256((__m256i*)at, (__m256i)_mm512_cvtneps_pbh(x.v));
#endif
  store_floats(reinterpret_cast<float*>(at), x);
}

constexpr float hides = -std::numeric_limits<float>::infinity();
alignas(64) inline constexpr float lowest_behind[32] = {
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, hides, hides, hides, hides, hides, hides, hides, hides,
    hides, hides, hides, hides, hides, hides, hides, hides};  // what is added where there is no key

struct Softmax {  // of a row, so far
  float most = -std::numeric_limits<float>::infinity(), sum = 0;
};

// Scores of a row with keys first .. last -> e^(score - largest so far), in place, as words of the second product; gives
// what the sums so far are to be multiplied by. A row that sees no key has no sum.
template <bool Pairs>
inline float softmax_row(const ShortAttention& a, i64 batch, i64 head, i64 position, i64 first, i64 last, float* scores,
                         Softmax& row) {
  constexpr float lowest = -std::numeric_limits<float>::infinity(), log2_e = 1.44269504088896341f;
  const i64 at = batch * a.mask_batch + head * a.mask_head + position * a.mask_position + first;
  const i64 count = last - first, whole = count / 16 * 16, some = count - whole, end = (count + 15) / 16 * 16;
  const bool in_place = a.mask || !(a.scale > 0);  // else they are multiplied by the scale on their way to the exponent
  if (in_place) {
    const auto* words = static_cast<const uint16_t*>(a.mask) + (a.mask_is_bf16 ? at : 0);
    const auto* wide = static_cast<const float*>(a.mask) + (a.mask_is_bf16 ? 0 : at);
    const auto put = [&](i64 j, const Floats& mask) {
      store_floats(scores + j, add(multiply(load_floats(scores + j), floats(a.scale)), mask));
    };
    for (i64 j = 0; j < whole; j += 16)
      put(j, !a.mask ? floats(0) : a.mask_is_bf16 ? load_bf16(words + j) : load_floats(wide + j));
    if (some)
      put(whole, !a.mask ? floats(0) : a.mask_is_bf16 ? load_first(words + whole, some) : load_first(wide + whole, some));
  }
  if (some)
    store_floats(scores + whole, add(load_floats(scores + whole), load_floats(lowest_behind + 16 - some)));
  const float scale = in_place ? 1.0f : a.scale;
  Floats top = floats(lowest);
  for (i64 j = 0; j < end; j += 16) top = maximum(top, load_floats(scores + j));
  const float here = max_of(top), before = row.most / scale;
  const float largest = before > here ? before : here;
  const bool nothing = largest == lowest;
  const float factor = scale * (Pairs ? log2_e : 1.0f);
  Floats sums = floats(0);
  auto* out = reinterpret_cast<u8*>(scores);
  for (i64 j = 0; j < end; j += 16) {
    // Differences first: a mask of the lowest float times a factor would be infinite.
    const Floats less = multiply(subtract(load_floats(scores + j), floats(largest)), floats(factor));
    const Floats powers = nothing ? floats(0) : Pairs ? rough_power_of_two(less) : exp_of(less);
    sums = add(sums, powers);
    store_probabilities(out + j * (Pairs ? 2 : 4), powers, Pairs);
  }
  const float kept = row.sum == 0 ? 0 : std::exp(row.most - largest * scale);
  row.sum = row.sum * kept + sum_of(sums), row.most = largest * scale;
  return kept;
}

inline void store_output(const ShortAttention& a, i64 at, i64 count, const Floats& values) {
  if (a.is_bf16 && count == 16) return store_bf16(static_cast<uint16_t*>(a.out) + at, values);
  if (count == 16) return store_floats(static_cast<float*>(a.out) + at, values);
  alignas(64) float whole[16];
  store_floats(whole, values);
  for (i64 c = 0; c < count; c++) {
    if (a.is_bf16) static_cast<uint16_t*>(a.out)[at + c] = to_bf16(whole[c]);
    else static_cast<float*>(a.out)[at + c] = whole[c];
  }
}

struct Part {  // keys first .. last of a head, packed
  i64 first, last;
  const u8 *keys, *values;
};

struct Buffers {  // of a thread
  u8* queries;      // words of R queries
  float *scores, *weighed, *total;  // [R][keys of a part], and [R][value width] of a part and of all
};

template <Words W, int R>
inline void attend_rows(const ShortAttention& a, const std::vector<Part>& parts, i64 batch, i64 head, i64 first, int count,
                        const Buffers& to) {
  constexpr bool pairs = W == Words::pairs;
  Softmax rows[R];
  for (const Part& part : parts) {
    const i64 keys = part.last - part.first, words = a.width / columns_of_word<W>;
    multiply_all<pairs, R, queries_at_a_time * 4, 4>(to.queries, part.keys, (keys + 15) / 16, words, to.scores, score_stride);
    float kept[R];
    for (int r = 0; r < count; r++)
      kept[r] = softmax_row<pairs>(a, batch, head, first + r, part.first, part.last, to.scores + r * score_stride, rows[r]);
    const bool is_first = !part.first;
    multiply_all<pairs, R, 4, score_stride * 4>(reinterpret_cast<const u8*>(to.scores), part.values, a.value_blocks(),
                                                (keys + columns_of_word<W> - 1) / columns_of_word<W>,
                                                is_first ? to.total : to.weighed, most_short_head);
    if (is_first) continue;
    for (int r = 0; r < count; r++)
      for (i64 e = r * most_short_head; e < r * most_short_head + a.value_width; e += 16) {
        Floats sum = load_floats(to.weighed + e);
        multiply_add(sum, load_floats(to.total + e), floats(kept[r])), store_floats(to.total + e, sum);
      }
  }
  for (int r = 0; r < count; r++) {
    const i64 at = ((batch * a.positions + first + r) * a.heads + head) * a.value_width;
    const Floats inverse = floats(rows[r].sum == 0 ? 0.0f : 1.0f / rows[r].sum);
    for (i64 e = 0; e < a.value_width; e += 16)
      store_output(a, at + e, std::min<i64>(16, a.value_width - e),
                   multiply(load_floats(to.total + r * most_short_head + e), inverse));
  }
}

inline i64 up_to_line(i64 bytes) { return (bytes + 63) / 64 * 64; }

template <Words W>
void attend_head(const ShortAttention& a, i64 batch, i64 head, i64 first, i64 last) {
  const i64 shared = head / (a.heads / a.shared), words = a.width / columns_of_word<W>, size = bytes_of_column<W>;
  const i64 key_bytes = (a.keys + 15) / 16 * words * 64;
  const i64 value_bytes = (a.keys / columns_of_word<W> + 1) * a.value_blocks() * 64;
  const i64 query_bytes = up_to_line(words * queries_at_a_time * 4) + 64, rows = queries_at_a_time;
  u8* keys = block_scratch.get(key_bytes + value_bytes + query_bytes + rows * (score_stride + 2 * most_short_head) * 4);
  u8 *values = keys + key_bytes, *queries = values + value_bytes;
  auto* scores = reinterpret_cast<float*>(queries + query_bytes);
  float *weighed = scores + rows * score_stride, *total = weighed + rows * most_short_head;
  const Buffers to{queries, scores, weighed, total};
  std::vector<Part> parts;
  for (i64 key = 0; key < a.keys; key += keys_of_part) {
    const i64 end = std::min(a.keys, key + keys_of_part);
    parts.push_back({key, end, keys + key / 16 * words * 64, values + key / columns_of_word<W> * a.value_blocks() * 64});
    pack_values<W>(a, batch, shared, key, end, const_cast<u8*>(parts.back().values));
  }
  for (i64 key = 0; key < a.keys; key += 16)
    pack_rows<W, 64>(row_at<W>(a.key, batch, shared, key), a.key.position * size, std::min<i64>(16, a.keys - key), words,
                     keys + key / 16 * words * 64);
  for (i64 query = first; query < last; query += queries_at_a_time) {
    const int count = int(std::min<i64>(queries_at_a_time, last - query));
    const u8* from = row_at<W>(a.query, batch, head, query);
    pack_rows<W, queries_at_a_time * 4>(from, a.query.position * size, count, words, queries);
    if constexpr (queries_at_a_time == 12) {
      if (count > 8) attend_rows<W, 12>(a, parts, batch, head, query, count, to);
      else if (count > 4) attend_rows<W, 8>(a, parts, batch, head, query, count, to);
      else attend_rows<W, 4>(a, parts, batch, head, query, count, to);
    } else {
      attend_rows<W, queries_at_a_time>(a, parts, batch, head, query, count, to);
    }
  }
}

inline void short_attention(const ShortAttention& a) {
  const i64 heads = a.batch * a.heads, threads = at::get_num_threads();
  const i64 blocks = (a.positions + queries_at_a_time - 1) / queries_at_a_time;
  const i64 parts = std::clamp<i64>((threads + heads - 1) / heads, 1, blocks);  // of a head's queries
  const i64 span = (blocks + parts - 1) / parts * queries_at_a_time;
  const i64 work = std::max<i64>(1, span * a.keys * (a.width + a.value_width));
  at::parallel_for(0, heads * parts, std::max<i64>(1, 50000 / work), [&](i64 from, i64 to) {
    for (i64 task = from; task < to; task++) {
      const i64 head = task / parts, first = task % parts * span, last = std::min(a.positions, first + span);
      if (first >= last) continue;
      const i64 batch = head / a.heads, of_batch = head % a.heads;
      if (!a.is_bf16) attend_head<Words::floats>(a, batch, of_batch, first, last);
#if defined(QCOMPILE_BF16_PRODUCTS)
      else attend_head<Words::pairs>(a, batch, of_batch, first, last);
#else
      else attend_head<Words::widened>(a, batch, of_batch, first, last);
#endif
    }
  });
}

}  // namespace qcompile
