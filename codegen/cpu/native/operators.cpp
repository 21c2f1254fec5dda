// torch.ops.qcompile_cpu: x [.., K] times a packed weight [N, K], for any number of rows.
//
// Schemas and fakes are in native_kernels.py; here is what runs. Every argument is checked before a pointer is read: shape,
// dtype, device and layout.

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "attention.h"
#include "gelu_codes.h"
#include "library_calls.h"
#include "product.h"
#include "short_attention_call.h"

namespace qcompile {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

std::string name_of(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }
std::string describe(const Tensor& tensor) {
  return c10::str(name_of(tensor.scalar_type()), " ", tensor.sizes(), " on ", tensor.device());
}
std::string describe(at::ScalarType dtype) { return name_of(dtype); }
template <class Value>
std::string describe(const Value& value) {
  return c10::str(value);
}

// An operator at work: its arguments, checked one by one.
class Call {
 public:
  Call(const char* name, Kind kind) : name_(name) { l.kind = kind; }

  void weight(const Tensor& codes, i64 n, i64 k, i64 group) {
    l.n = n, l.k = k, l.group = group;
    const bool nibbles = l.has_nibbles();
    l.quads = nibbles ? (k + 7) / 8 * 2 : (k + 3) / 4;
    demand(n >= 0, "n", n, "0 or more");
    demand(k >= 0 && k <= most_columns, "K", k, "0 to ", most_columns, ", where int32 sums are exact");
    const i64 most = l.kind == Kind::dual_int8 ? 248 : i64(1) << 62;
    demand(!nibbles || (group > 0 && group <= most && group % 8 == 0), "group", group, "a multiple of 8, up to ", most);
    l.codes = pointer<u8>("codes", codes, {l.blocks(), nibbles ? l.quads / 2 : l.quads, 16, 4});
  }

  void steps(const Tensor& step, const Optional& zero, double zero_bias) {
    l.step = of_groups("step", step, &l.step_as);
    if (zero) l.zero = of_groups("zero", *zero, &l.zero_as);
    l.zero_bias = float(zero_bias);
  }

  void offsets(const Tensor& offset) { l.offset = pointer<u8>("offset", offset, {l.blocks(), l.pairs(), 16, 2}); }
  void table(const Tensor& values) { l.table = pointer<float>("table", values, {16}); }
  void epilogue(const Optional& scale, const Optional& bias) {
    if (scale) l.scale = one_for_each("scale", *scale, l.n);
    if (bias) l.bias = one_for_each("bias", *bias, l.n);
  }

  Tensor operator()(const Tensor& x, const Optional& x_scale, at::ScalarType dtype) {
    const auto type = x.scalar_type();
    const bool codes = l.is_int8() && x_scale.has_value();
    demand(codes ? type == at::kChar : is_float(type), "x", x,
           l.is_int8() ? "int8 with x_scale, or float32, bfloat16 or float16 without" : "float32, bfloat16 or float16");
    demand(is_float(dtype), "dtype", dtype, "float32, bfloat16 or float16");
    l.out_type = dtype == at::kFloat ? 0 : dtype == at::kBFloat16 ? 1 : 2;
    auto sizes = x.sizes().vec();
    sizes.back() = l.n;
    l.m = 1;
    for (size_t d = 0; d + 1 < sizes.size(); d++) l.m *= sizes[d];
    const Tensor rows = x.contiguous();
    Tensor out = at::empty(sizes, x.options().dtype(dtype).requires_grad(false));
    l.out = out.data_ptr();
    if (codes) {
      const bool one = x_scale->dim() == 0;
      auto of_rows = x.sizes().vec();
      of_rows.back() = 1;
      demand(one || x_scale->sizes() == at::IntArrayRef(of_rows), "x_scale", *x_scale, at::IntArrayRef(of_rows), " or []");
      const float* scale = one_for_each("x_scale", *x_scale, one ? 1 : l.m);
      const auto* from = static_cast<const int8_t*>(rows.data_ptr());
      run(l, [&](const auto& to, i64 row) { to.put_codes(row, from + row * l.k, scale[one ? 0 : row]); });
    } else {
      run(l, [&](const auto& to, i64 row) {
        if (type == at::kBFloat16 && to.put_bf16(row, static_cast<const uint16_t*>(rows.data_ptr()) + row * l.k)) return;
        const float* values = as_floats(rows, type, row);
        l.is_int8() ? to.put_quantized(row, values) : to.put_values(row, values);
      });
    }
    return out;
  }

  Linear l;

 private:
  static constexpr i64 most_columns = 131071;

  static bool is_float(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf; }

  template <class Value, class... Words>
  void demand(bool holds, const char* argument, const Value& value, const Words&... words) const {
    if (!holds)
      C10_THROW_ERROR(ValueError, c10::str("qcompile_cpu::", name_, ": ", argument, " is ", describe(value),
                                           ", but must be ", words...));
  }

  const Tensor& kept(const Tensor& tensor) {  // dense, for as long as the call lasts
    kept_.push_back(tensor.contiguous());
    return kept_.back();
  }

  template <class T>
  const T* pointer(const char* argument, const Tensor& tensor, at::IntArrayRef sizes) {
    const auto dtype = c10::CppTypeToScalarType<T>::value;
    demand(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.sizes() == sizes, argument, tensor, name_of(dtype),
           " ", sizes, " on cpu");
    return kept(tensor).const_data_ptr<T>();
  }

  const float* one_for_each(const char* argument, const Tensor& values, i64 count) {
    demand(values.is_cpu() && values.scalar_type() == at::kFloat && values.numel() == count, argument, values, "float32 with ",
           count, " values on cpu");
    return kept(values).const_data_ptr<float>();
  }

  const void* of_groups(const char* argument, const Tensor& part, Stored* as) {
    const at::DimVector sizes{l.blocks(), l.groups(), 16};
    *as = part.scalar_type() == at::kByte ? Stored::bytes : Stored::floats;
    if (*as == Stored::bytes || l.kind == Kind::dual_int8) return pointer<u8>(argument, part, sizes);
    return pointer<float>(argument, part, sizes);
  }

  const float* as_floats(const Tensor& rows, at::ScalarType type, i64 row) {
    if (type == at::kFloat) return static_cast<const float*>(rows.data_ptr()) + row * l.k;
    auto* out = reinterpret_cast<float*>(row_scratch.get(l.k * 5 + 64));
    const i64 k = l.k, whole = k / 16 * 16;
    if (type == at::kBFloat16) {
      const auto* from = static_cast<const uint16_t*>(rows.data_ptr()) + row * k;
      for (i64 c = 0; c < whole; c += 16) store_floats(out + c, load_bf16(from + c));
      for (i64 c = whole; c < k; c++) {
        const uint32_t bits = uint32_t(from[c]) << 16;
        std::memcpy(out + c, &bits, 4);
      }
    } else {
      const auto* from = static_cast<const c10::Half*>(rows.data_ptr()) + row * k;
      for (i64 c = 0; c < k; c++) out[c] = float(from[c]);
    }
    return out;
  }

  const char* name_;
  c10::SmallVector<Tensor, 8> kept_;
};

Kind of_floats(const Tensor& x, Kind bf16, Kind f32) {
#if defined(QCOMPILE_BF16_PRODUCTS)
  if (x.scalar_type() == at::kBFloat16) return bf16;
#endif
  return f32;
}

i64 columns_of(const Tensor& x) { return x.dim() ? x.size(-1) : -1; }  // none of which are refused

Tensor int8_linear(const Tensor& x, const Optional& x_scale, const Tensor& codes, const Tensor& scale, const Optional& bias,
                   i64 n, at::ScalarType dtype) {
  Call call("int8_linear", Kind::bytes_int8);
  call.weight(codes, n, columns_of(x), 0), call.epilogue(scale, bias);
  return call(x, x_scale, dtype);
}

Tensor dual_linear(const Tensor& x, const Optional& x_scale, const Tensor& codes, const Tensor& step, const Tensor& offset,
                   const Tensor& scale, const Optional& bias, i64 group, i64 n, at::ScalarType dtype) {
  Call call("dual_linear", Kind::dual_int8);
  call.weight(codes, n, columns_of(x), group), call.steps(step, std::nullopt, 0), call.offsets(offset);
  call.epilogue(scale, bias);
  return call(x, x_scale, dtype);
}

Tensor group_linear(const Tensor& x, const Optional& x_scale, const Tensor& codes, const Tensor& step, const Optional& zero,
                    const Optional& scale, const Optional& bias, double zero_bias, i64 group, i64 n, at::ScalarType dtype) {
  Call call("group_linear", Kind::group_int8);
  call.weight(codes, n, columns_of(x), group), call.steps(step, zero, zero_bias), call.epilogue(scale, bias);
  return call(x, x_scale, dtype);
}

Tensor table_linear(const Tensor& x, const Tensor& codes, const Tensor& table, const Tensor& step, const Optional& zero,
                    const Optional& scale, const Optional& bias, double zero_bias, i64 group, i64 n, at::ScalarType dtype) {
  Call call("table_linear", Kind::nibbles_f32);
  call.table(table);
  const auto is_bf16 = [](float value) { return (read<uint32_t>(&value) & 0xFFFF) == 0; };
  if (std::all_of(call.l.table, call.l.table + 16, is_bf16)) call.l.kind = of_floats(x, Kind::nibbles_bf16, Kind::nibbles_f32);
  call.weight(codes, n, columns_of(x), group), call.steps(step, zero, zero_bias), call.epilogue(scale, bias);
  return call(x, std::nullopt, dtype);
}

Tensor int8_float_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Optional& bias, i64 n,
                         at::ScalarType dtype) {
  Call call("int8_float_linear", of_floats(x, Kind::bytes_bf16, Kind::bytes_f32));
  call.weight(codes, n, columns_of(x), 0), call.epilogue(scale, bias);
  return call(x, std::nullopt, dtype);
}

Strided strided(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }
Tensor dense_rows(const Tensor& x) { return x.stride(3) == 1 || x.numel() == 0 ? x : x.contiguous(); }

// An attention at work: its arguments, checked one by one.
class AttentionCall {
 public:
  // query [B, H, S, D], key [B, G, ..], value [.., E].
  AttentionCall(const char* name, const Tensor& query, const Tensor& key, const Tensor& value, double scale) : name_(name) {
    const auto type = query.scalar_type();
    demand(query.dim() == 4 && query.is_cpu() && (type == at::kFloat || type == at::kBFloat16), "query", query,
           "float32 or bfloat16 [B, H, S, D]");
    a.batch = query.size(0), a.heads = query.size(1), a.positions = query.size(2), a.width = query.size(3);
    demand(key.dim() == 4 && key.size(1) > 0 && a.heads % key.size(1) == 0, "key", key,
           "[B, G, T, D] with H a multiple of G");
    demand(value.dim() == 4, "value", value, "[B, G, T, E]");
    a.shared = key.size(1), a.value_width = value.size(3), a.scale = float(scale), a.is_bf16 = type == at::kBFloat16;
    demand(a.group() * a.positions <= most_query_rows, "query", query, "up to ", most_query_rows, " rows for a key head");
    demand(a.width % 16 == 0 && a.width <= most_head_size, "query", query, "D a multiple of 16, up to ", most_head_size);
    demand(a.value_width % 16 == 0 && a.value_width <= most_head_size, "value", value, "E a multiple of 16, up to ",
           most_head_size);
    query_ = query, a.query = strided(keep(query));
  }

  // Keys [B, G, T, D] and values [B, G, T, E] of the query's dtype.
  void keys(int part, const char* names[2], const Tensor& key, const Tensor& value) {
    Keys& k = a.parts[part];
    k.count = key.dim() == 4 ? key.size(2) : -1, k.element = a.is_bf16 ? Element::bf16 : Element::f32;
    const auto of = [&](const char* name, const Tensor& x, i64 width) {
      const at::DimVector sizes{a.batch, a.shared, k.count, width};
      demand(x.scalar_type() == query_.scalar_type() && x.is_cpu() && x.sizes() == at::IntArrayRef(sizes), name, x,
             at::IntArrayRef(sizes), " of query's dtype");
      return strided(keep(x));
    };
    k.key = of(names[0], key, a.width), k.value = of(names[1], value, a.value_width);
  }

  // Codes u8 [B, G, T, D or D / 2], their scales float16 and zero points u8 [B, G, T, 1].
  Strided codes(const char* name, const Tensor& x, i64 width) {
    Keys& k = a.parts[1];
    const at::DimVector sizes{a.batch, a.shared, k.count, k.element == Element::u4 ? width / 2 : width};
    demand(x.scalar_type() == at::kByte && x.is_cpu() && x.sizes() == at::IntArrayRef(sizes), name, x, "uint8 ",
           at::IntArrayRef(sizes));
    return strided(keep(x));
  }
  Scales scales(const char* name, const Tensor& scale, const Tensor& zero) {
    const at::DimVector sizes{a.batch, a.shared, a.parts[1].count, 1};
    demand(scale.scalar_type() == at::kHalf && scale.is_cpu() && scale.sizes() == at::IntArrayRef(sizes), name, scale,
           "float16 ", at::IntArrayRef(sizes));
    demand(zero.scalar_type() == at::kByte && zero.is_cpu() && zero.sizes() == at::IntArrayRef(sizes) &&
               zero.strides() == scale.strides(),
           name, zero, "uint8 ", at::IntArrayRef(sizes), " laid out as its scales");
    return {static_cast<const uint16_t*>(scale.const_data_ptr()), zero.const_data_ptr<u8>(), scale.stride(0),
            scale.stride(1), scale.stride(2)};
  }

  void mask(const Optional& given) {
    if (!given) return;
    const at::DimVector sizes{a.batch, a.heads, a.positions, a.keys()};
    demand(given->is_cpu() && (given->scalar_type() == at::kBool || given->is_floating_point()) && given->dim() <= 4 &&
               at::is_expandable_to(given->sizes(), sizes),
           "mask", *given, "bool or float, of a shape that broadcasts to ", at::IntArrayRef(sizes));
    a.mask_is_bool = given->scalar_type() == at::kBool;
    const Tensor whole = (a.mask_is_bool ? *given : given->to(at::kFloat)).expand(sizes);
    kept_.push_back(whole);
    a.mask = whole.const_data_ptr(), a.mask_batch = whole.stride(0), a.mask_head = whole.stride(1);
    a.mask_position = whole.stride(2), a.mask_key = whole.stride(3);
  }

  // [B, H, S, E], whose memory is [B, S, H, E], as torch's own attention has it.
  Tensor run() {
    const Tensor out =
        at::empty({a.batch, a.positions, a.heads, a.value_width}, query_.options().requires_grad(false));
    a.out = out.data_ptr();
    if (out.numel()) attention(a);
    return out.transpose(1, 2);
  }

  template <class... Words>
  void demand(bool holds, const char* argument, const Tensor& value, const Words&... words) const {
    if (!holds)
      C10_THROW_ERROR(ValueError, c10::str("qcompile_cpu::", name_, ": ", argument, " is ", describe(value),
                                           ", but must be ", words...));
  }

  const Tensor& keep(const Tensor& x) {  // dense along the last dimension
    kept_.push_back(x.stride(-1) == 1 || x.numel() == 0 ? x : x.contiguous());
    return kept_.back();
  }

  Attention a{};

 private:
  const char* name_;
  Tensor query_;
  c10::SmallVector<Tensor, 12> kept_;  // what `a` points into
};

// Keys and values of a cache, those behind it [B, G, N, ..], mask broadcasts to [B, H, S, T + N].
Tensor attention_of_rows(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& new_key,
                         const Optional& new_value, const Optional& mask, double scale) {
  AttentionCall call("attention", query, key, value, scale);
  const char *names[] = {"key", "value"}, *new_names[] = {"new_key", "new_value"};
  call.keys(1, names, key, value);
  call.demand(new_key.has_value() == new_value.has_value(), "query", query, "called with both new_key and new_value");
  if (new_key) call.keys(2, new_names, *new_key, *new_value);
  call.mask(mask);
  return call.run();
}

// As `attention`, of a cache of codes: `code_query` float32 [B, H, S, D] multiplies its keys, `code_bias` float32 [B, H, S] is added
// to that product; `first` keys and values [B, G, F, ..] are floats before the codes.
Tensor attention_of_codes(const Tensor& query, const Optional& code_query, const Optional& code_bias,
                          const Optional& first_key, const Optional& first_value, const Tensor& key, const Tensor& key_scale,
                          const Tensor& key_zero, const Tensor& value, const Tensor& value_scale, const Tensor& value_zero,
                          const Tensor& new_key, const Tensor& new_value, const Optional& mask, double scale) {
  AttentionCall call("code_attention", query, key, new_value, scale);
  Attention& a = call.a;
  Keys& past = a.parts[1];
  past.count = key.size(2), past.element = key.size(3) * 2 == a.width ? Element::u4 : Element::u8;
  past.key = call.codes("key", key, a.width), past.value = call.codes("value", value, a.value_width);
  past.key_scales = call.scales("key_scale", key_scale, key_zero);
  past.value_scales = call.scales("value_scale", value_scale, value_zero);
  if (code_query) {
    call.demand(code_query->sizes() == query.sizes() && code_query->scalar_type() == at::kFloat && code_query->is_cpu(),
                "code_query", *code_query, "float32 ", query.sizes());
    a.code_query = strided(call.keep(*code_query));
  }
  if (code_bias) {
    call.demand(code_bias->scalar_type() == at::kFloat && code_bias->is_cpu() &&
                    code_bias->sizes() == query.sizes().slice(0, 3),
                "code_bias", *code_bias, "float32 ", query.sizes().slice(0, 3));
    a.code_bias = call.keep(code_bias->contiguous()).const_data_ptr<float>();
  }
  const char *first_names[] = {"first_key", "first_value"}, *new_names[] = {"new_key", "new_value"};
  call.demand(first_key.has_value() == first_value.has_value(), "query", query, "called with both first_key and first_value");
  if (first_key) call.keys(0, first_names, *first_key, *first_value);
  call.keys(2, new_names, new_key, new_value);
  call.mask(mask);
  return call.run();
}

// buffers [B, G, C, ..] <- rows [B, G, N, ..] from position `at` on, for each of a cache's tensors.
void append_rows(at::TensorList buffers, at::TensorList rows, i64 at) {
  const auto demand = [](bool holds, const auto&... words) {
    if (!holds) C10_THROW_ERROR(ValueError, c10::str("qcompile_cpu::append_rows: ", words...));
  };
  demand(buffers.size() == rows.size(), buffers.size(), " buffers and ", rows.size(), " rows, but must be as many");
  for (size_t i = 0; i < rows.size(); i++) {
    const Tensor &to = buffers[i], &from = rows[i];
    const bool fits = to.dim() == 4 && from.dim() == 4 && to.size(0) == from.size(0) && to.size(1) == from.size(1) &&
                      to.size(3) == from.size(3) && to.scalar_type() == from.scalar_type() && to.is_contiguous() &&
                      to.is_cpu() && from.is_cpu() && at >= 0 && at + from.size(2) <= to.size(2);
    demand(fits, "rows ", i, " is ", describe(from), ", but must fit a dense buffer, which is ", describe(to), ", from ", at);
  }
  for (size_t i = 0; i < rows.size(); i++) {
    const Tensor to = buffers[i], from = dense_rows(rows[i]);
    const i64 size = to.element_size(), width = to.size(3) * size;
    auto* out = static_cast<u8*>(to.data_ptr());
    const auto* in = static_cast<const u8*>(from.const_data_ptr());
    for (i64 b = 0; b < from.size(0); b++)
      for (i64 g = 0; g < from.size(1); g++)
        for (i64 n = 0; n < from.size(2); n++)
          std::memcpy(out + ((b * to.size(1) + g) * to.size(2) + at + n) * width,
                      in + (b * from.stride(0) + g * from.stride(1) + n * from.stride(2)) * size, width);
  }
}

}  // namespace
}  // namespace qcompile

TORCH_LIBRARY_IMPL(qcompile_cpu, CPU, m) {
  m.impl("int8_linear", qcompile::int8_linear);
  m.impl("dual_linear", qcompile::dual_linear);
  m.impl("group_linear", qcompile::group_linear);
  m.impl("table_linear", qcompile::table_linear);
  m.impl("int8_float_linear", qcompile::int8_float_linear);
  m.impl("attention", qcompile::attention_of_rows);
  m.impl("code_attention", qcompile::attention_of_codes);
  m.impl("append_rows", qcompile::append_rows);
  m.impl("short_attention", qcompile::short_attention_of);
  m.impl("gelu_codes", qcompile::gelu_codes_of);
}

#if defined(QCOMPILE_TILES)
extern "C" const char* qcompile_lanes() { return qcompile::has_tiles ? "AMX" : qcompile::lanes_name; }
extern "C" bool qcompile_use_tiles(bool on) { return qcompile::tiles_are_on.exchange(on && qcompile::has_tiles); }
#else
extern "C" const char* qcompile_lanes() { return qcompile::lanes_name; }
extern "C" bool qcompile_use_tiles(bool) { return false; }
#endif
