// Rounding of fixed-point training in one pass over memory: codes, what lies beyond the clip, and the random values.
//
// The values are bit for bit those of the PyTorch definitions (qcompile/numerics: counter_random.py,
// gradient_interval.py, fixed_point_operand.py): the same float32 operations in the same order, and a hash of integers
// that wrap around. Nothing is checked here; the callers give dense float32 arrays.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using i64 = int64_t;

// MurmurHash3's finalizer of counter i in a stream.
inline uint32_t hash(uint32_t i, uint32_t stream) {
  uint32_t h = i * 0x9E3779B9u + stream;
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  return h ^ (h >> 16);
}

constexpr i64 kBlock = 1 << 12;  // a power of two; indices in a block are 32 bits, so that loops become vectors

inline i64 blocks(i64 n) { return (n + kBlock - 1) / kBlock; }

inline float clamp(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

inline float zero_for_nan(float v) { return v == v ? v : 0.0f; }

// In two loops: GCC makes no vectors of one that has both the clamp and what follows from it.
void stochastic_block(const float* g, int8_t* codes, int32_t count, float step, float top, uint32_t first,
                      uint32_t stream) {
  float values[kBlock];
  for (int32_t j = 0; j < count; ++j) values[j] = zero_for_nan(clamp(g[j] / step, -top, top));
  for (int32_t j = 0; j < count; ++j) {
    const float v = values[j];
    const int32_t whole = (int32_t)v, low = whole - (int32_t)((float)whole > v);
    const uint32_t bits = hash(first + (uint32_t)j, stream) & 0xFFFFFFu;
    const float u = (float)(int32_t)bits * 0x1p-24f;
    codes[j] = (int8_t)(low + (int32_t)(v - (float)low > u));
  }
}

void nearest_block(const float* g, int8_t* codes, int32_t count, float step, float low, float high) {
  for (int32_t j = 0; j < count; ++j)
    codes[j] = (int8_t)(int32_t)zero_for_nan(clamp(std::nearbyint(g[j] / step), low, high));
}

int32_t beyond_block(const float* g, int32_t count, float limit) {
  int32_t total = 0;
  for (int32_t j = 0; j < count; ++j) total += std::fabs(g[j]) > limit;
  return total;
}

int32_t nan_block(const float* x, int32_t count) {
  int32_t total = 0;
  for (int32_t j = 0; j < count; ++j) total += x[j] != x[j];
  return total;
}

}  // namespace

// codes = clamp(g / step, -levels, levels), rounded up with a probability of what is cut off, or to nearest; NaN is 0.
// beyond[0] = how many |g| are above limit. steps: step, limit.
extern "C" void round_gradient(const float* g, int8_t* codes, i64* beyond, const float* steps, i64 n, i64 levels,
                               i64 stochastic, i64 stream, i64 threads) {
  const float step = steps[0], limit = steps[1], top = (float)levels;
  i64 total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (i64 block = 0; block < blocks(n); ++block) {
    const i64 first = block * kBlock;
    const int32_t count = (int32_t)(first + kBlock < n ? kBlock : n - first);
    if (stochastic)
      stochastic_block(g + first, codes + first, count, step, top, (uint32_t)first, (uint32_t)stream);
    else
      nearest_block(g + first, codes + first, count, step, -top, top);
    total += beyond_block(g + first, count, limit);
  }
  beyond[0] = total;
}

// codes = clamp(round(x / step), low, high), NaN is 0 and counted in lost[0]. steps: step.
extern "C" void round_values(const float* x, int8_t* codes, i64* lost, const float* steps, i64 n, i64 low, i64 high,
                             i64 threads) {
  const float step = steps[0];
  i64 total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (i64 block = 0; block < blocks(n); ++block) {
    const i64 first = block * kBlock;
    const int32_t count = (int32_t)(first + kBlock < n ? kBlock : n - first);
    nearest_block(x + first, codes + first, count, step, (float)low, (float)high);
    total += nan_block(x + first, count);
  }
  lost[0] = total;
}

// A change of a weight in uint8 codes with integer zero points, groups of a row (qcompile/numerics/code_update.py):
// w = (q - z) s keep + change, quantized again with a new range; a group in which nothing changes stays.
// old and fresh: codes [rows, columns], scale and zero [rows, groups]. stochastic: rounded up with the probability of
// what is cut off. bad[0] = how many groups are not finite; what they become is not defined.
extern "C" void change_codes(const float* change, const uint8_t* old_codes, const float* old_scale,
                             const uint8_t* old_zero, uint8_t* codes, float* scale, uint8_t* zero, i64* bad,
                             const float* limits, i64 rows, i64 columns, i64 group, i64 decays, i64 stochastic,
                             i64 stream, i64 threads) {
  const float keep = limits[0], least_scale = limits[1];
  const i64 groups = (columns + group - 1) / group;
  i64 total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (i64 row = 0; row < rows; ++row) {
    std::vector<float> values(group);
    float* v = values.data();
    for (i64 g = 0; g < groups; ++g) {
      const i64 first = row * columns + g * group, place = row * groups + g;
      const int32_t count = (int32_t)std::min(group, columns - g * group);
      const float s = old_scale[place], z = (float)old_zero[place];
      const uint8_t* q = old_codes + first;
      const float* c = change + first;
      int32_t changed = 0;
      for (int32_t j = 0; j < count; ++j) {
        const float old = ((float)(int32_t)q[j] - z) * s;
        v[j] = (decays ? old * keep : old) + c[j];
        changed += v[j] != old;
      }
      float low = 0.0f, high = 0.0f;
      for (int32_t j = 0; j < count; ++j) low = v[j] < low ? v[j] : low, high = v[j] > high ? v[j] : high;
      const float span = high - low;
      total += nan_block(v, count) > 0 || span - span != 0.0f;
      if (!changed) {
        std::copy(q, q + count, codes + first);
        scale[place] = s, zero[place] = old_zero[place];
        continue;
      }
      float fresh = span / 255.0f;
      fresh = fresh > least_scale ? fresh : 1.0f;
      const float offset = std::nearbyint(-low / fresh);
      if (stochastic)
        for (int32_t j = 0; j < count; ++j) {
          const uint32_t bits = hash((uint32_t)first + (uint32_t)j, (uint32_t)stream) & 0xFFFFFFu;
          const float sum = (v[j] / fresh + offset) + (float)(int32_t)bits * 0x1p-24f;
          const int32_t whole = (int32_t)sum;  // above -1, so that rounding towards zero is the floor or zero
          codes[first + j] = (uint8_t)(whole > 255 ? 255 : whole);
        }
      else
        for (int32_t j = 0; j < count; ++j) {
          const int32_t whole = (int32_t)(std::nearbyint(v[j] / fresh) + offset);
          codes[first + j] = (uint8_t)(whole < 0 ? 0 : whole > 255 ? 255 : whole);
        }
      scale[place] = fresh, zero[place] = (uint8_t)(int32_t)offset;
    }
  }
  bad[0] = total;
}
