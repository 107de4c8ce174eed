// Moves blocks between memory in any dtype and the accumulation type. Included like common/numerics.h.

#include "../common/low_precision.h"
#include "../common/stream.h"

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

#ifdef __SSE2__
FL_INLINE void transpose_four(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + in_stride);
  __m128 c = _mm_loadu_ps(in + 2 * in_stride), d = _mm_loadu_ps(in + 3 * in_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a), _mm_storeu_ps(out + out_stride, b);
  _mm_storeu_ps(out + 2 * out_stride, c), _mm_storeu_ps(out + 3 * out_stride, d);
}
#endif

template <class A>
FL_INLINE void transpose_four(const A* in, int64_t in_stride, A* out, int64_t out_stride) {
  for (int64_t r = 0; r < 4; ++r) {
    for (int64_t c = 0; c < 4; ++c) out[c * out_stride + r] = in[r * in_stride + c];
  }
}

// out[c][r] = in[r][c], four by four where there are as many.
template <class A>
void transpose(const A* in, int64_t in_stride, int64_t rows, int64_t columns, A* out, int64_t out_stride) {
  const int64_t row_fours = rows / 4 * 4, column_fours = columns / 4 * 4;
  for (int64_t r = 0; r < row_fours; r += 4) {
    for (int64_t c = 0; c < column_fours; c += 4) {
      transpose_four(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < row_fours ? column_fours : 0; c < columns; ++c) {
      out[c * out_stride + r] = in[r * in_stride + c];
    }
  }
}
