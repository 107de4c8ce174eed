// Functions of a block of lanes, and of one element apart from lanes: inlined, the long ones would only make
// builds longer. Included like common/numerics.h, after functions.h.

namespace blocks {

// Elements at computed places.
template <class T, class A>
FL_APART void gather(const T* data, const int64_t* places, int64_t n, A* out) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) out[i] = widen(data[places[i]]);
  padded(out, n);
}

// An argument is an array, or the same for every lane.
template <class X>
FL_INLINE auto lane(X x, int64_t i) {
  if constexpr (std::is_pointer_v<X>) {
    return x[i];
  } else {
    return x;
  }
}

#define FL_ONE(name)                                                                \
  template <class A>                                                                \
  FL_APART void name##_(const A* x, int64_t n, A* out) {                            \
    FL_ELEMENTWISE                                                                  \
    for (int64_t i = 0, lanes = whole(n); i < lanes; ++i) out[i] = ::name##_(x[i]); \
  }
#define FL_TWO(name)                                                                                  \
  template <class X, class Y, class A>                                                                \
  FL_APART void name##_(X x, Y y, int64_t n, A* out) {                                                \
    FL_ELEMENTWISE                                                                                    \
    for (int64_t i = 0, lanes = whole(n); i < lanes; ++i) out[i] = ::name##_(lane(x, i), lane(y, i)); \
  }
#include "long_functions.h"
#undef FL_ONE
#undef FL_TWO

// Far from 0 it takes more of pi than these have.
#define FL_TURNING(name)                                                                       \
  FL_APART void name##_(const float* x, int64_t n, float* out) {                               \
    constexpr float far = 1 << 20;                                                             \
    bool is_far = false;                                                                       \
    FL_ELEMENTWISE                                                                             \
    for (int64_t i = 0, lanes = whole(n); i < lanes; ++i)                                      \
      out[i] = ::name##_(x[i]), is_far |= abs_(x[i]) > far;                                    \
    for (int64_t i = 0; is_far && i < n; ++i) {                                                \
      if (abs_(x[i]) > far) out[i] = static_cast<float>(std::name(static_cast<double>(x[i]))); \
    }                                                                                          \
  }
FL_TURNING(sin)
FL_TURNING(cos)
FL_TURNING(tan)
#undef FL_TURNING

// Most blocks are positive, and need no reflection.
#define FL_REFLECTED(name)                                                            \
  FL_APART void name##_(const float* x, int64_t n, float* out) {                      \
    bool is_positive = true;                                                          \
    for (int64_t i = 0; i < n; ++i) is_positive &= x[i] > 0;                          \
    if (is_positive) {                                                                \
      FL_ELEMENTWISE                                                                  \
      for (int64_t i = 0, lanes = whole(n); i < lanes; ++i)                           \
        out[i] = static_cast<float>(name##_positive(static_cast<double>(x[i])));      \
    } else {                                                                          \
      FL_ELEMENTWISE                                                                  \
      for (int64_t i = 0, lanes = whole(n); i < lanes; ++i) out[i] = ::name##_(x[i]); \
    }                                                                                 \
  }
FL_REFLECTED(lgamma)
FL_REFLECTED(digamma)
#undef FL_REFLECTED

// x to half of `twice`.
template <int twice, class A>
FL_INLINE A half_power(A x) {
  if constexpr (twice < 0) {
    return A(1) / half_power<-twice>(x);
  } else if constexpr (twice == 0) {
    return A(1);
  } else if constexpr (twice == 1) {
    return sqrt_(x);
  } else if constexpr (twice == 2) {
    return x;
  } else if constexpr (twice % 4 == 0) {
    return half_power<twice / 2>(x * x);
  } else if constexpr (twice % 2 == 0) {
    return x * half_power<twice - 2>(x);
  } else {
    const A size = abs_(x), result = size * half_power<twice - 2>(size);
    return x < 0 && size <= std::numeric_limits<A>::max() ? std::numeric_limits<A>::quiet_NaN() : result;
  }
}

// Products of float are of double, so that they are rounded once.
template <int twice, class A>
FL_INLINE void half_powers(const A* x, int64_t n, A* out) {
  using Work = std::conditional_t<twice >= -2 && twice <= 4, A, Wide<A>>;
  FL_ELEMENTWISE
  for (int64_t i = 0, lanes = whole(n); i < lanes; ++i)
    out[i] = static_cast<A>(half_power<twice>(static_cast<Work>(x[i])));
}

// Every lane to the same power, of which losses mostly have small ones.
template <class A>
FL_APART void power_(const A* x, A exponent, int64_t n, A* out) {
  if constexpr (std::is_floating_point_v<A>) {
    const A twice = exponent + exponent;
    switch (abs_(twice) <= 10 && floor_(twice) == twice ? static_cast<int>(twice) : 11) {
#define FL_CASE(twice) \
  case twice: return half_powers<twice>(x, n, out);
      FL_CASE(-10)
      FL_CASE(-8)
      FL_CASE(-6)
      FL_CASE(-4)
      FL_CASE(-2)
      FL_CASE(-1)
      FL_CASE(0)
      FL_CASE(1)
      FL_CASE(2)
      FL_CASE(3)
      FL_CASE(4)
      FL_CASE(5)
      FL_CASE(6)
      FL_CASE(8)
      FL_CASE(10)
#undef FL_CASE
    }
  }
  // As an array: what is the same for all lanes of a choice keeps a loop from being vectorised.
  alignas(64) A exponents[kBlock];
  for (int64_t i = 0, lanes = whole(n); i < lanes; ++i) exponents[i] = exponent;
  pow_(x, exponents, n, out);
}

}  // namespace blocks

namespace apart {

#define FL_ONE(name)                 \
  template <class A>                 \
  FL_APART A name##_(A x) {          \
    alignas(64) A one[kWhole] = {x}; \
    blocks::name##_(one, 1, one);    \
    return one[0];                   \
  }
#define FL_TWO(name)                 \
  template <class A>                 \
  FL_APART A name##_(A x, A y) {     \
    alignas(64) A one[kWhole] = {x}; \
    blocks::name##_(one, y, 1, one); \
    return one[0];                   \
  }
#include "long_functions.h"
#undef FL_ONE
#undef FL_TWO

#define FL_ONE(name)        \
  template <class A>        \
  FL_APART A name##_(A x) { \
    return ::name##_(x);    \
  }
FL_ONE(exp)
FL_ONE(exp_nonpositive)
FL_ONE(expm1)
FL_ONE(log)
FL_ONE(log1p)
FL_ONE(tanh)
FL_ONE(sigmoid)
#undef FL_ONE

}  // namespace apart
