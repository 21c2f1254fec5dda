// torch.ops.qcompile_cpu.gelu_codes: GELU and quantization of rows in one pass, before the second product of an MLP.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "activations.h"
#include "word_lines.h"

namespace qcompile {

// x [m, k] -> codes [m, k] and scales [m] of what gelu gives in the dtype of x.
template <bool BF16, bool Tanh>
void gelu_rows(const void* x, i64 m, i64 k, int8_t* codes, float* scales) {
  const i64 whole = k / 16 * 16, serial = 8192;  // values that a second thread would not be worth
  at::parallel_for(0, m, std::max<i64>(1, serial / std::max<i64>(k, 1)), [&](i64 first, i64 last) {
    auto* values = reinterpret_cast<float*>(row_scratch.get((k + 16) * 4));
    alignas(64) uint16_t words[16];
    const auto load_whole = [&](i64 at) {
      return BF16 ? load_bf16(static_cast<const uint16_t*>(x) + at) : load_floats(static_cast<const float*>(x) + at);
    };
    const auto put = [&](float* to, const Floats& given) {  // rounded as it would be in memory
      Floats value = gelu_of<BF16, Tanh>(given);
      if (BF16) store_bf16(words, value), value = load_bf16(words);
      store_floats(to, value);
      return value;
    };
    for (i64 row = first; row < last; row++) {
      Floats most = floats(0);
      for (i64 c = 0; c < whole; c += 16) most = largest_magnitude(most, put(values + c, load_whole(row * k + c)));
      if (whole < k) {
        const i64 at = row * k + whole, some = k - whole;
        const Floats rest = BF16 ? load_first(static_cast<const uint16_t*>(x) + at, some)
                                 : load_first(static_cast<const float*>(x) + at, some);
        most = largest_magnitude(most, put(values + whole, rest));  // gelu(0) is 0
      }
      scales[row] = quantize_row(values, bits_of_lanes(most), k, codes + row * k);
    }
  });
}

// gelu(x) of x [.., K], quantized by rows: int8 [.., K] and float32 [.., 1].
inline std::tuple<at::Tensor, at::Tensor> gelu_codes_of(const at::Tensor& x, bool tanh) {
  const auto type = x.scalar_type();
  if (!x.dim() || !x.is_cpu() || (type != at::kFloat && type != at::kBFloat16))
    C10_THROW_ERROR(ValueError, c10::str("qcompile_cpu::gelu_codes: x is ", c10::getDtypeNames(type).first, " ", x.sizes(),
                                         " on ", x.device(), ", but must be float32 or bfloat16 [.., K] on cpu"));
  auto sizes = x.sizes().vec();
  const i64 k = sizes.back();
  sizes.back() = 1;
  const at::Tensor rows = x.contiguous();
  at::Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kChar).requires_grad(false));
  at::Tensor scales = at::empty(sizes, x.options().dtype(at::kFloat).requires_grad(false));
  auto* to = static_cast<int8_t*>(codes.data_ptr());
  auto* scale = static_cast<float*>(scales.data_ptr());
  const auto run_rows = [&](auto rows_of) { rows_of(rows.const_data_ptr(), scales.numel(), k, to, scale); };
  if (type == at::kBFloat16) tanh ? run_rows(gelu_rows<true, true>) : run_rows(gelu_rows<true, false>);
  else tanh ? run_rows(gelu_rows<false, true>) : run_rows(gelu_rows<false, false>);
  return {codes, scales};
}

}  // namespace qcompile
