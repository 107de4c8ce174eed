// Included like numerics.h, after it, <cstring> and, where there is SSE2, <emmintrin.h>.

// Writes past the caches: lines of a large output are not read before they are written. The task that
// streamed ends with a fence.
FL_INLINE void stream_bytes(const void* source, int64_t n, void* out) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(out);
#ifdef __SSE2__
  constexpr int64_t word = 16, line = 64;
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % word);
  int64_t i = misaligned == 0 ? 0 : n < word - misaligned ? n : word - misaligned;
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
