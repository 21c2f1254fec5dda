// torch.ops.qcompile_cpu.short_attention: its arguments, checked one by one before a pointer is read.

#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <optional>
#include <string>

#include "short_attention.h"

namespace qcompile {

template <class... Words>
void demand_of_short_attention(bool holds, const char* argument, const at::Tensor& value, const Words&... words) {
  if (!holds)
    C10_THROW_ERROR(ValueError, c10::str("qcompile_cpu::short_attention: ", argument, " is ",
                                         c10::getDtypeNames(value.scalar_type()).first, " ", value.sizes(), " on ",
                                         value.device(), ", but must be ", words...));
}

// What is added to scores: float32 or bfloat16, expanded, with keys side by side.
inline at::Tensor added_mask(const at::Tensor& mask, at::IntArrayRef sizes) {
  at::Tensor added = mask;
  if (mask.scalar_type() == at::kBool) {
    added = at::zeros_like(mask, mask.options().dtype(at::kFloat));
    added.masked_fill_(mask.logical_not(), -std::numeric_limits<float>::infinity());
  } else if (mask.scalar_type() != at::kFloat && mask.scalar_type() != at::kBFloat16) {
    added = mask.to(at::kFloat);
  }
  while (added.dim() < 4) added = added.unsqueeze(0);
  if (added.size(3) != sizes[3]) added = added.expand({added.size(0), added.size(1), added.size(2), sizes[3]});
  if (added.stride(3) != 1 && sizes[3] > 1) added = added.contiguous();
  return added.expand(sizes);
}

// query [B, H, S, D], key [B, G, T, D], value [B, G, T, E], mask broadcasts to [B, H, S, T] -> [B, H, S, E], whose memory is
// [B, S, H, E], as torch's own attention has it.
inline at::Tensor short_attention_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                     const std::optional<at::Tensor>& mask, double scale) {
  const auto demand = [](bool holds, const char* argument, const at::Tensor& given, const auto&... words) {
    demand_of_short_attention(holds, argument, given, words...);
  };
  const auto type = query.scalar_type();
  demand(query.dim() == 4 && query.is_cpu() && (type == at::kFloat || type == at::kBFloat16), "query", query,
         "float32 or bfloat16 [B, H, S, D] on cpu");
  demand(key.dim() == 4 && key.size(1) > 0 && query.size(1) % key.size(1) == 0, "key", key,
         "[B, G, T, D] with H a multiple of G");
  demand(value.dim() == 4, "value", value, "[B, G, T, E]");
  ShortAttention a{};
  a.batch = query.size(0), a.heads = query.size(1), a.positions = query.size(2), a.width = query.size(3);
  a.shared = key.size(1), a.keys = key.size(2), a.value_width = value.size(3);
  const auto fits = [&](const at::Tensor& x, i64 width) {
    return x.scalar_type() == type && x.is_cpu() && x.sizes() == at::IntArrayRef({a.batch, a.shared, a.keys, width});
  };
  demand(fits(key, a.width), "key", key, "[B, G, T, D] of query's batch, width and dtype");
  demand(fits(value, a.value_width), "value", value, "[B, G, T, E] of key's sizes and query's dtype");
  demand(a.keys >= 1, "key", key, "of at least one position");
  const auto takes = [](i64 width) { return width > 0 && width <= most_short_head && width % 8 == 0; };
  demand(takes(a.width), "key", key, "D a multiple of 8, up to ", most_short_head);
  demand(takes(a.value_width), "value", value, "E a multiple of 8, up to ", most_short_head);
  const auto dense = [](const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const at::Tensor q = dense(query), k = dense(key), v = dense(value);
  const auto strided = [](const at::Tensor& x) { return Strided{x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; };
  a.query = strided(q), a.key = strided(k), a.value = strided(v);
  at::Tensor added;
  if (mask) {
    const at::DimVector sizes{a.batch, a.heads, a.positions, a.keys};
    demand(mask->is_cpu() && (mask->scalar_type() == at::kBool || mask->is_floating_point()) && mask->dim() <= 4 &&
               at::is_expandable_to(mask->sizes(), sizes),
           "mask", *mask, "bool or float, of a shape that broadcasts to ", at::IntArrayRef(sizes));
    added = added_mask(*mask, sizes);
    a.mask = added.const_data_ptr(), a.mask_is_bf16 = added.scalar_type() == at::kBFloat16;
    a.mask_batch = added.stride(0), a.mask_head = added.stride(1), a.mask_position = added.stride(2);
  }
  at::Tensor out = at::empty({a.batch, a.positions, a.heads, a.value_width}, query.options().requires_grad(false));
  a.is_bf16 = type == at::kBFloat16, a.scale = float(scale), a.out = out.data_ptr();
  if (out.numel()) short_attention(a);
  return out.transpose(1, 2);
}

}  // namespace qcompile
