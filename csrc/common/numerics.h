// Elementary functions for host and device. No include guard: the host includes this once per instruction
// set, inside that set's namespace, so that no function compiled for AVX-512 can be linked for everybody.
// The includer has included <cmath>, <cstdint>, <cstring> and <limits> before.

#ifdef __CUDACC__

#define FL_INLINE __device__ __forceinline__

FL_INLINE float fma_(float a, float b, float c) { return fmaf(a, b, c); }
FL_INLINE double fma_(double a, double b, double c) { return fma(a, b, c); }

#else

#ifndef FL_INLINE  // the emulation's, which has no hurry, only needs calls
#define FL_INLINE inline __attribute__((always_inline))
#endif
// Elements depend on no other element: vectorise without comparing pointers first.
#define FL_ELEMENTWISE _Pragma("GCC ivdep")

// a * b + c, rounded once where the processor can, whether or not the compiler contracts expressions.
#if defined(__FMA__) || defined(FL_TARGET_HAS_FMA)
FL_INLINE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FL_INLINE double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
template <class A>
FL_INLINE A fma_(A a, A b, A c) {
  return a * b + c;
}
#endif

#endif

template <class To, class From>
FL_INLINE To bits(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// expm1 on [-1/2, 1/2].
FL_INLINE float expm1_near_zero(float x) {
  float p = 1.f / 40320.f;
  p = fma_(p, x, 1.f / 5040.f);
  p = fma_(p, x, 1.f / 720.f);
  p = fma_(p, x, 1.f / 120.f);
  p = fma_(p, x, 1.f / 24.f);
  p = fma_(p, x, 1.f / 6.f);
  p = fma_(p, x, 0.5f);
  return fma_(p * x, x, x);
}

// log(1 + f) + exponent log(2) for 1 + f in [sqrt(1/2), sqrt(2)).
FL_INLINE float log_of_parts(float f, float exponent) {
  float p = 7.0376836292e-2f;
  p = fma_(p, f, -1.1514610310e-1f);
  p = fma_(p, f, 1.1676998740e-1f);
  p = fma_(p, f, -1.2420140846e-1f);
  p = fma_(p, f, 1.4249322787e-1f);
  p = fma_(p, f, -1.6668057665e-1f);
  p = fma_(p, f, 2.0000714765e-1f);
  p = fma_(p, f, -2.4999993993e-1f);
  p = fma_(p, f, 3.3333331174e-1f);
  const float square = f * f;
  const float tail = fma_(p * f, square, fma_(exponent, -2.12194440e-4f, -0.5f * square));
  return fma_(exponent, 0.693359375f, f + tail);
}

#ifdef __CUDACC__

FL_INLINE float exp_(float x) { return expf(x); }
// exp for x <= 0 in four instructions: 2^t with t below x / log(2), times 1 + d for what t is too small by.
// With log2(e) rounded up, d >= 0; it saturates, which makes 0 of the NaN that -inf gives. Right to 2^-22 +
// |x| 2^-28, below the smallest normal number 0; NaN stays NaN, and exp(0) is 1.
FL_INLINE float exp_nonpositive(float x) {
  const float t = __fmul_rd(x, 1.44269514f);
  const float d = __saturatef(fmaf(t, -0.693147182f, x));
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
  return fmaf(power, d, power);
}
FL_INLINE float log_(float x) { return logf(x); }
FL_INLINE float log1p_(float x) { return log1pf(x); }
FL_INLINE float log1p_unit(float x) { return log1pf(x); }
FL_INLINE float expm1_(float x) { return expm1f(x); }
FL_INLINE float tanh_(float x) { return tanhf(x); }
FL_INLINE float abs_(float x) { return fabsf(x); }
FL_INLINE float sqrt_(float x) { return sqrtf(x); }
FL_INLINE double exp_(double x) { return exp(x); }
FL_INLINE double exp_nonpositive(double x) { return exp(x); }
FL_INLINE double log_(double x) { return log(x); }
FL_INLINE double log1p_(double x) { return log1p(x); }
FL_INLINE double log1p_unit(double x) { return log1p(x); }
FL_INLINE double expm1_(double x) { return expm1(x); }
FL_INLINE double expm1_near_zero(double x) { return expm1(x); }
FL_INLINE double tanh_(double x) { return tanh(x); }
FL_INLINE double abs_(double x) { return fabs(x); }
FL_INLINE double sqrt_(double x) { return sqrt(x); }

#else

// 2^n for n in [-126, 127].
FL_INLINE float power_of_two(int32_t n) { return bits<float>((n + 127) << 23); }

// exp on [-log(2)/2, log(2)/2].
FL_INLINE float exp_near_zero(float r) {
  float p = 1.9875691500e-4f;
  p = fma_(p, r, 1.3981999507e-3f);
  p = fma_(p, r, 8.3334519073e-3f);
  p = fma_(p, r, 4.1665795894e-2f);
  p = fma_(p, r, 1.6666665459e-1f);
  p = fma_(p, r, 5.0000001201e-1f);
  return fma_(p, r * r, r) + 1.f;
}

// Adding 1.5 * 2^23 rounds to an integer that stands in the low bits; the rest is a polynomial on
// [-log(2)/2, log(2)/2]. Scaling in two steps reaches denormals and infinity. NaN stays NaN.
FL_INLINE float exp_(float x) {
  const float magic = 12582912.f;
  const bool vanishes = x < -104.f;
  x = vanishes ? 0.f : x;
  x = x > 89.f ? 89.f : x;
  const float shifted = fma_(x, 1.44269504f, magic);
  const int32_t n = bits<int32_t>(shifted) - bits<int32_t>(magic);
  const float whole = shifted - magic;
  const float r = fma_(-whole, 1.42860677e-6f, fma_(-whole, 0.693145752f, x));
  const float p = exp_near_zero(r);
  const int32_t half = n >> 1;
  const float result = p * power_of_two(half) * power_of_two(n - half);
  return vanishes ? 0.f : result;
}

// exp for x <= 0, where one scaling is enough; below the smallest normal number it is 0. NaN stays NaN.
FL_INLINE float exp_nonpositive(float x) {
  const float magic = 12582912.f;
  const float bounded = x < -87.33654f ? -87.33654f : x;
  const float shifted = fma_(bounded, 1.44269504f, magic);
  const float whole = shifted - magic;
  const float r = fma_(-whole, 1.42860677e-6f, fma_(-whole, 0.693145752f, bounded));
  const float p = exp_near_zero(r);
  // Adds n to the exponent; the magic number's own bits shift out.
  const float result = bits<float>(bits<int32_t>(p) + (bits<int32_t>(shifted) << 23));
  return x < -87.33654f ? 0.f : result;
}

// A series where exp(x) - 1 would cancel.
FL_INLINE float expm1_(float x) { return __builtin_fabsf(x) < 0.5f ? expm1_near_zero(x) : exp_(x) - 1.f; }

// Mantissa in [sqrt(1/2), sqrt(2)), polynomial in mantissa - 1. Zero gives -inf, negatives NaN.
FL_INLINE float log_(float x) {
  const float tiny = std::numeric_limits<float>::min();
  const bool denormal = x < tiny;
  const uint32_t u = bits<uint32_t>(denormal ? x * 8388608.f : x);
  const int32_t e = static_cast<int32_t>(u - 0x3f3504f3u) >> 23;
  const float exponent = static_cast<float>(e) - (denormal ? 23.f : 0.f);
  const float f = bits<float>(u - (static_cast<uint32_t>(e) << 23)) - 1.f;
  float result = log_of_parts(f, exponent);
  const float infinity = std::numeric_limits<float>::infinity();
  result = x == infinity ? infinity : result;
  result = x == 0.f ? -infinity : result;
  return x >= 0.f ? result : std::numeric_limits<float>::quiet_NaN();
}

// log(u) with u = 1 + x, times x / (u - 1): what the rounding of u lost is put back.
FL_INLINE float log1p_(float x) {
  const float u = 1.f + x;
  const float infinity = std::numeric_limits<float>::infinity();
  const float corrected = log_(u) * (x / (u - 1.f));
  const float result = u == 1.f ? x : corrected;
  return x == infinity ? infinity : result;
}

// log1p on [0, 1] only: 2 atanh(x / (2 + x)), whose series needs no table and no special case.
FL_INLINE float log1p_unit(float x) {
  const float s = x / (2.f + x), z = s * s;
  float p = 1.f / 17.f;
  p = fma_(p, z, 1.f / 15.f);
  p = fma_(p, z, 1.f / 13.f);
  p = fma_(p, z, 1.f / 11.f);
  p = fma_(p, z, 1.f / 9.f);
  p = fma_(p, z, 1.f / 7.f);
  p = fma_(p, z, 1.f / 5.f);
  p = fma_(p, z, 1.f / 3.f);
  return 2.f * fma_(s * z, p, s);
}

FL_INLINE float abs_(float x) { return __builtin_fabsf(x); }
FL_INLINE float sqrt_(float x) { return __builtin_sqrtf(x); }

// A polynomial where 1 - exp(-2|x|) would cancel.
FL_INLINE float tanh_(float x) {
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = fma_(p, z, 2.06390887954e-2f);
  p = fma_(p, z, -5.37397155531e-2f);
  p = fma_(p, z, 1.33314422036e-1f);
  p = fma_(p, z, -3.33332819422e-1f);
  const float near = fma_(p * z, x, x);
  const float e = exp_nonpositive(-2.f * abs_(x));
  const float far = __builtin_copysignf((1.f - e) / (1.f + e), x);
  return z < 0.390625f ? near : far;
}

FL_INLINE double exp_(double x) { return std::exp(x); }
FL_INLINE double exp_nonpositive(double x) { return std::exp(x); }
FL_INLINE double log_(double x) { return std::log(x); }
FL_INLINE double log1p_(double x) { return std::log1p(x); }
FL_INLINE double log1p_unit(double x) { return std::log1p(x); }
FL_INLINE double expm1_(double x) { return std::expm1(x); }
FL_INLINE double expm1_near_zero(double x) { return std::expm1(x); }
FL_INLINE double tanh_(double x) { return std::tanh(x); }
FL_INLINE double abs_(double x) { return __builtin_fabs(x); }
FL_INLINE double sqrt_(double x) { return __builtin_sqrt(x); }

#endif

// log(u) for a normal u of at most 1. below is u - 1, and keeps its digits where u has none left for them.
// NaN stays NaN.
FL_INLINE float log_below_one(float u, float below) {
  const float root_of_half = 0.70710677f;
  const uint32_t pattern = bits<uint32_t>(u);
  const int32_t e = static_cast<int32_t>(pattern - 0x3f3504f3u) >> 23;  // 0 from the root on
  const float f = bits<float>(pattern - (static_cast<uint32_t>(e) << 23)) - 1.f;
  return log_of_parts(u < root_of_half ? f : below, static_cast<float>(e));
}
FL_INLINE double log_below_one(double u, double below) { return u < 0.7 ? log_(u) : log1p_(below); }
