// Exponentials and GELU, where what follows rounds to bfloat16 or to int8.

#pragma once

#include "attention.h"

namespace qcompile {

// 2^x for x <= 0, where bfloat16 takes it: 2^n times a polynomial of degree 4, relative error 3e-6.
inline Floats rough_power_of_two(const Floats& given) {
  const Floats x = maximum(floats(-125.5f), given), magic = floats(12582912.0f);  // 1.5 * 2^23: rounds what is added to it
  const Floats n = add(x, magic);  // whose lowest bits are the integer
  const Floats f = subtract(x, subtract(n, magic));
  Floats p = floats(9.5701013e-3f);
  for (const float c : {5.5917859e-2f, 2.4024744e-1f, 6.9312179e-1f, 9.9999928e-1f}) {
    Floats next = floats(c);
    multiply_add(next, p, f), p = next;
  }
  return times_power_of_two(p, n);
}

template <bool Rough>
inline Floats power(const Floats& x) {  // e^x for x <= 0
  return Rough ? rough_power_of_two(multiply(x, floats(1.44269504088896341f))) : exp_of(x);
}

// gelu(x) = x P(x), with P the normal distribution, or its approximation by tanh. With c = P(-|x|), the smaller of its two
// tails, it is max(x, 0) - |x| c: relative errors of c are those of the result, however small.

// e^(-y^2 / 2) times a polynomial in t = 1 / (1 + 0.45 y / sqrt(2)), fitted to erfc(y / sqrt 2) / 2 on 0 <= y <= 13.2,
// relative error 3e-7 (the form of Abramowitz and Stegun 7.1.26).
template <bool Rough>
inline Floats normal_tail(const Floats& y) {
  Floats below = floats(1.0f);
  multiply_add(below, y, floats(0.45f * 0.70710678118654752f));
  const Floats t = divide(floats(1.0f), below);
  Floats p = floats(3.3101502e-2f);
  for (const float c : {-1.1869311e-1f, 1.0182709e-1f, 2.2636307e-2f, 9.2951730e-2f, 1.1447068e-1f, 1.2674667e-1f,
                        1.2695926e-1f}) {
    Floats next = floats(c);
    multiply_add(next, p, t), p = next;
  }
  return multiply(multiply(p, t), power<Rough>(multiply(multiply(y, y), floats(-0.5f))));
}

// 1 / (1 + e^(2 u)), u = sqrt(2 / pi) (y + 0.044715 y^3).
template <bool Rough>
inline Floats logistic_tail(const Floats& y) {
  Floats cubic = floats(1.0f);
  multiply_add(cubic, multiply(y, y), floats(0.044715f));
  const Floats tail = power<Rough>(multiply(multiply(cubic, y), floats(-1.5957691216057308f)));
  return divide(tail, add(tail, floats(1.0f)));
}

template <bool Rough, bool Tanh>
inline Floats gelu_of(const Floats& x) {
  const Floats y = largest_magnitude(floats(0), x);
  Floats result = maximum(floats(0), x);  // NaN stays
  multiply_add(result, multiply(y, floats(-1.0f)), Tanh ? logistic_tail<Rough>(y) : normal_tail<Rough>(y));
  return result;
}

}  // namespace qcompile
