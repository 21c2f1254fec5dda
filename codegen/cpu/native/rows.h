// Rows of x, quantized where they come as floats, summed and packed into panels.

#pragma once

#include <c10/util/Exception.h>

#include <cmath>
#include <cstdlib>

#include "linear.h"

namespace qcompile {

// Memory that a thread keeps: fresh megabytes cost page faults.
class Scratch {
 public:
  ~Scratch() { std::free(at_); }
  u8* get(i64 bytes) {
    if (bytes > size_) {
      std::free(at_);
      size_ = (bytes + 4095) / 4096 * 4096;
      at_ = static_cast<u8*>(std::aligned_alloc(64, size_));
      TORCH_CHECK_WITH(OutOfMemoryError, at_, "qcompile_cpu: no memory for ", bytes, " bytes of packed rows");
    }
    return at_;
  }

 private:
  u8* at_ = nullptr;
  i64 size_ = 0;
};

inline thread_local Scratch rows_scratch, row_scratch, block_scratch;

constexpr float min_scale = 1e-30f;  // qcompile/numerics/qparams.py: a smaller scale becomes one
constexpr int panel_sizes[] = {1, 2, 3, 4, 6, 8, 10, 12};

inline int panel_size(i64 rows) {
  for (const int size : panel_sizes)
    if (size >= rows) return size;
  return rows_of_tile;
}

// The bits of the largest magnitude: they are ordered as magnitudes are, with NaN above all.
inline uint32_t bits_of_lanes(const Floats& most) {
  alignas(64) float of_lanes[16];
  store_floats(of_lanes, most);
  uint32_t bits = 0;
  for (const float& lane : of_lanes) bits = std::max(bits, read<uint32_t>(&lane));
  return bits;
}

inline uint32_t largest_bits(const float* x, i64 k) {
  Floats most = floats(0);
  i64 c = 0;
  for (; c + 16 <= k; c += 16) most = largest_magnitude(most, load_floats(x + c));
  uint32_t bits = bits_of_lanes(most);
  for (; c < k; c++) bits = std::max(bits, read<uint32_t>(x + c) & 0x7FFFFFFF);
  return bits;
}

// Codes of x / scale to nearest even, with the scale max|x| / 127, as qcompile::quantize has it; gives the scale, which is
// NaN where x has one. A quotient is that of a division: x times 1 / scale, with its error put right by an exact remainder
// (Markstein 1990, Computation of elementary functions on the IBM RISC System/6000 processor).
inline float quantize_row(const float* x, uint32_t largest, i64 k, int8_t* codes) {
  float scale = read<float>(&largest) / 127.0f;
  if (!(scale > min_scale)) scale = 1;
  const Floats inverse = floats(1 / scale), minus_scale = floats(-scale);
  i64 c = 0;
  for (; c + 16 <= k; c += 16) {
    const Floats values = load_floats(x + c);
    Floats quotient = multiply(values, inverse), remainder = values;
    multiply_add(remainder, quotient, minus_scale), multiply_add(quotient, remainder, inverse);
    store_rounded(codes + c, quotient);
  }
  constexpr float whole = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  for (; c < k; c++) codes[c] = int8_t(int32_t(x[c] / scale + whole - whole));
  return largest > 0x7F800000 ? read<float>(&largest) : scale;
}

// How rows are cut into panels, and where each part of a panel lies in one piece of memory.
class Rows {
 public:
  Rows(const Linear& l) : l_(l) {
    const i64 panels = std::max<i64>(1, (l.m + rows_of_tile - 1) / rows_of_tile);
    most_ = panel_size((l.m + panels - 1) / panels);
    quads_bytes_ = up(most_ * l.quads * l.quad_size());
    const i64 sums = l.kind == Kind::bytes_int8 ? 1 : l.groups();
    sums_bytes_ = up(most_ * sums * 4), pairs_bytes_ = l.kind == Kind::dual_int8 ? up(most_ * l.pairs() * 4) : 0;
    panel_bytes_ = quads_bytes_ + sums_bytes_ + pairs_bytes_ + up(most_ * 4);
    at_ = rows_scratch.get(panel_bytes_ * count());
  }
  i64 count() const { return (l_.m + most_ - 1) / most_; }

  Panel operator[](i64 p) const {
    const u8* at = at_ + p * panel_bytes_;
    Panel panel{};
    panel.quads = at, at += quads_bytes_;
    panel.group_sums = reinterpret_cast<const int32_t*>(at), panel.float_sums = reinterpret_cast<const float*>(at);
    panel.pair_sums = reinterpret_cast<const int16_t*>(at + sums_bytes_), at += sums_bytes_ + pairs_bytes_;
    panel.scale = reinterpret_cast<const float*>(at);
    panel.first = p * most_, panel.rows = int(std::min<i64>(most_, l_.m - p * most_));
    return panel;
  }

  void clear() const {  // rows and columns that are not there
    const Panel last = (*this)[count() - 1];
    if (l_.columns() > l_.k || panel_size(last.rows) > last.rows)
      for (i64 p = 0; p < count(); p++) std::memset(at_ + p * panel_bytes_, 0, quads_bytes_ + sums_bytes_ + pairs_bytes_);
  }

  void put_codes(i64 row, const int8_t* x, float scale) const {
    const Panel panel = (*this)[row / most_];
    const i64 k = l_.k, whole = k / 4;  // bytes may alias anything, so that members would be read again for each quad
    const int R = panel_size(panel.rows), r = int(row % most_);
    const_cast<float*>(panel.scale)[r] = scale;
    u8* out = const_cast<u8*>(panel.quads) + r * quad_bytes;
    if (!k) {  // no memory behind x, and no group
      if (l_.kind == Kind::bytes_int8) const_cast<int32_t*>(panel.group_sums)[r] = 0;
      return;
    }
    i64 q = 0;
    if (R == 1 && quad_bytes == 4) q = whole, std::memcpy(out, x, q * 4);
    for (; q < whole; q++) store_quad(out + q * R * quad_bytes, x + 4 * q);
    if (k % 4) {
      int8_t last[4] = {};
      std::memcpy(last, x + 4 * q, k % 4);
      store_quad(out + q * R * quad_bytes, last);
    }
    const i64 span = l_.kind == Kind::bytes_int8 ? l_.columns() : l_.group;
    auto* sums = const_cast<int32_t*>(panel.group_sums);
    auto* pairs = const_cast<int16_t*>(panel.pair_sums);
    for (i64 g = 0, first = 0; first < l_.columns(); g++, first += span) {
      int32_t sum = 0;
      for (i64 c = first, last = std::min(k, first + span); c < last; c++) sum += x[c];
      sums[g * R + r] = sum;
      if (l_.kind == Kind::dual_int8) pairs[(g / 2 * R + r) * 2 + g % 2] = int16_t(-sum);
    }
    if (l_.kind == Kind::dual_int8 && l_.groups() % 2) pairs[(l_.groups() / 2 * R + r) * 2 + 1] = 0;
  }

  void put_quantized(i64 row, const float* x) const {
    const i64 k = l_.k;
    auto* codes = reinterpret_cast<int8_t*>(row_scratch.get(k * 5)) + k * 4;
    put_codes(row, codes, quantize_row(x, largest_bits(x, k), k, codes));
  }

  bool put_bf16(i64, const uint16_t*) const { return false; }  // panels are packed from floats

  // float32, or bfloat16 where products take it.
  void put_values(i64 row, const float* x) const {
    const Panel panel = (*this)[row / most_];
    const int R = panel_size(panel.rows), r = int(row % most_);
    const i64 size = l_.quad_size(), whole = l_.k / 4;
    u8* out = const_cast<u8*>(panel.quads) + r * size;
    const auto put = [&](i64 q, const float* quad) {
      if (size == 16) {
        std::memcpy(out + q * R * 16, quad, 16);
      } else {
        const uint16_t words[4] = {to_bf16(quad[0]), to_bf16(quad[2]), to_bf16(quad[1]), to_bf16(quad[3])};
        std::memcpy(out + q * R * 8, words, 8);
      }
    };
    for (i64 q = 0; q < whole; q++) put(q, x + 4 * q);
    if (l_.k % 4) {
      float last[4] = {};
      std::memcpy(last, x + 4 * whole, l_.k % 4 * sizeof(float));
      put(whole, last);
    }
    auto* sums = const_cast<float*>(panel.float_sums);
    for (i64 g = 0; g < l_.groups(); g++) {
      i64 c = g * l_.group;
      const i64 end = std::min(l_.k, c + l_.group);
      alignas(64) float parts[16];
      Floats sum = floats(0);
      for (; c + 16 <= end; c += 16) sum = add(sum, load_floats(x + c));
      store_floats(parts, sum);
      for (; c < end; c++) parts[c % 16] += x[c];
      float total = 0;
      for (const float part : parts) total += part;
      sums[g * R + r] = total;
    }
  }

 private:
  static i64 up(i64 bytes) { return (bytes + 63) / 64 * 64; }
  const Linear& l_;
  i64 most_, quads_bytes_, sums_bytes_, pairs_bytes_, panel_bytes_;
  u8* at_;
};

}  // namespace qcompile
