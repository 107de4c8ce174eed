// Moves blocks between memory in any dtype and the accumulation type. Included like common/numerics.h.

FL_INLINE float from_bfloat16(uint16_t value) { return bits<float>(static_cast<uint32_t>(value) << 16); }

// Rounds to nearest even; a NaN keeps being one.
FL_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t u = bits<uint32_t>(value);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// Exponents are rebased by a multiplication, which also normalises denormals; 31 means inf or NaN.
FL_INLINE float from_half(uint16_t value) {
  const uint32_t magnitude = static_cast<uint32_t>(value & 0x7fffu) << 13;
  const float rebased = bits<float>(magnitude) * 0x1p112f;
  const uint32_t special = bits<uint32_t>(rebased) | 0x7f800000u;
  const uint32_t u = (value & 0x7c00u) == 0x7c00u ? special : bits<uint32_t>(rebased);
  return bits<float>(u | (static_cast<uint32_t>(value & 0x8000u) << 16));
}

FL_INLINE uint16_t to_half(float value) {
  const uint32_t u = bits<uint32_t>(value), magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14, adding 1/2 lets the hardware round to a multiple of 2^-24.
  const uint32_t denormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? denormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return static_cast<uint16_t>(result | ((u >> 16) & 0x8000u));
}

// Loops for adjacent elements apart from the others, so that they vectorise.
template <class T, class A, class Convert>
FL_INLINE void load_each(const T* source, int64_t stride, int64_t n, A* out, Convert convert) {
  if (stride == 1) {
    FL_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) out[i] = convert(source[i]);
  } else {
    FL_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) out[i] = convert(source[i * stride]);
  }
}

template <class T, class A, class Convert>
FL_INLINE void store_each(const A* source, int64_t stride, int64_t n, T* out, Convert convert) {
  if (stride == 1) {
    FL_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) out[i] = convert(source[i]);
  } else {
    FL_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) out[i * stride] = convert(source[i]);
  }
}

template <class A>
void load(Dtype dtype, const void* source, int64_t stride, int64_t n, A* out) {
  switch (dtype) {
    case Dtype::Float:
      return load_each(static_cast<const float*>(source), stride, n, out, [](float x) { return A(x); });
    case Dtype::Double:
      return load_each(static_cast<const double*>(source), stride, n, out, [](double x) { return A(x); });
    case Dtype::BFloat16:
      return load_each(static_cast<const uint16_t*>(source), stride, n, out,
                       [](uint16_t x) { return A(from_bfloat16(x)); });
    case Dtype::Half:
      return load_each(static_cast<const uint16_t*>(source), stride, n, out,
                       [](uint16_t x) { return A(from_half(x)); });
  }
}

template <class A>
void store(Dtype dtype, const A* source, int64_t stride, int64_t n, void* out) {
  switch (dtype) {
    case Dtype::Float:
      return store_each(source, stride, n, static_cast<float*>(out), [](A x) { return float(x); });
    case Dtype::Double:
      return store_each(source, stride, n, static_cast<double*>(out), [](A x) { return double(x); });
    case Dtype::BFloat16:
      return store_each(source, stride, n, static_cast<uint16_t*>(out),
                        [](A x) { return to_bfloat16(float(x)); });
    case Dtype::Half:
      return store_each(source, stride, n, static_cast<uint16_t*>(out),
                        [](A x) { return to_half(float(x)); });
  }
}

// Writes past the caches: lines of a large output are not read before they are written. The task that
// streamed ends with a fence.
FL_INLINE void stream_bytes(const void* source, int64_t n, void* out) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(out);
#ifdef __SSE2__
  constexpr int64_t word = 16, line = 64;
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % word);
  int64_t i = misaligned == 0 ? 0 : std::min(n, word - misaligned);
  std::memcpy(to, from, static_cast<size_t>(i));
  for (; i + line <= n; i += line) {
    for (int64_t j = i; j < i + line; j += word) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
    }
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(n - i));
#else
  std::memcpy(to, from, static_cast<size_t>(n));
#endif
}

template <class A>
void stream(Dtype dtype, const A* source, int64_t n, void* out) {
  constexpr int64_t block = 1024;
  alignas(64) char narrow[block * sizeof(A)];
  const int64_t size = element_size(dtype);
  if (dtype == kAccumulate<A>) return stream_bytes(source, n * size, out);
  for (int64_t i = 0; i < n; i += block) {
    const int64_t count = std::min(block, n - i);
    store(dtype, source + i, 1, count, narrow);
    stream_bytes(narrow, count * size, static_cast<char*>(out) + i * size);
  }
}
