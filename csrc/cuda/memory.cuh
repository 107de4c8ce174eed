// Loads and stores of several adjacent elements at once, converted to and from the accumulation type.
#pragma once
#include "../common/launch.cuh"
#include "types.h"

namespace fused_losses {

constexpr int kWideAccess = 16;  // bytes

template <int kBytes>
struct WordOfSize;
template <>
struct WordOfSize<2> {
  using Type = unsigned short;
};
template <>
struct WordOfSize<4> {
  using Type = unsigned;
};
template <>
struct WordOfSize<8> {
  using Type = uint2;
};
template <>
struct WordOfSize<16> {
  using Type = uint4;
};

// N elements as one word, or as several of the widest.
template <class T, int N>
struct Pack {
  static constexpr int kBytes = sizeof(T) * N;
  static constexpr int kWordBytes = kBytes < kWideAccess ? kBytes : kWideAccess;
  static constexpr int kWords = kBytes / kWordBytes;
  using Word = typename WordOfSize<kWordBytes>::Type;
  Word words[kWords];
};

template <class T>
constexpr int kWidth = kWideAccess / static_cast<int>(sizeof(T));

template <int N>
using Width = std::integral_constant<int, N>;

template <int N, class T, class A>
FL_INLINE void load(const T* source, A (&out)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(source);
  T values[N];
  memcpy(values, &pack, sizeof(pack));
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = static_cast<A>(values[k]);
}

// __stwb is an ordinary store that the compiler cannot split into narrower ones.
template <int N, class T, class A>
FL_INLINE void store(const A (&values)[N], T* destination) {
  T narrow[N];
#pragma unroll
  for (int k = 0; k < N; ++k) narrow[k] = static_cast<T>(values[k]);
  Pack<T, N> pack;
  memcpy(&pack, narrow, sizeof(pack));
  auto* words = reinterpret_cast<typename Pack<T, N>::Word*>(destination);
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kWords; ++i) __stwb(words + i, pack.words[i]);
}

// As one word or element by element, where the destination is not aligned for it.
template <int N, class T, class A>
FL_INLINE void store_pack(const A (&values)[N], T* destination, bool as_pack) {
  if (as_pack) return store(values, destination);
#pragma unroll
  for (int k = 0; k < N; ++k) destination[k] = static_cast<T>(values[k]);
}

// One element of a pack, by comparing rather than indexing, so that the pack stays in registers.
template <int N, class A>
FL_INLINE A element_of(const A (&values)[N], int64_t place) {
  A value = values[0];
#pragma unroll
  for (int k = 1; k < N; ++k) value = k == place ? values[k] : value;
  return value;
}

template <int N, class A>
FL_INLINE void replace_element(A (&values)[N], int64_t place, A value) {
#pragma unroll
  for (int k = 0; k < N; ++k) values[k] = k == place ? value : values[k];
}

// The dtype is the same for every thread, so these branches do not diverge.
template <int N, class A>
FL_INLINE void load_any(const void* source, Dtype dtype, int64_t at, A (&out)[N]) {
  switch (dtype) {
    case Dtype::Float: return load(static_cast<const float*>(source) + at, out);
    case Dtype::Double: return load(static_cast<const double*>(source) + at, out);
    case Dtype::BFloat16: return load(static_cast<const BFloat16*>(source) + at, out);
    case Dtype::Half: return load(static_cast<const Half*>(source) + at, out);
  }
}

template <int N, class A>
FL_INLINE void store_any(const A (&values)[N], void* destination, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::Float: return store(values, static_cast<float*>(destination) + at);
    case Dtype::Double: return store(values, static_cast<double*>(destination) + at);
    case Dtype::BFloat16: return store(values, static_cast<BFloat16*>(destination) + at);
    case Dtype::Half: return store(values, static_cast<Half*>(destination) + at);
  }
}

template <class A>
FL_INLINE A load_one(const void* source, Dtype dtype, int64_t at) {
  A value[1];
  load_any(source, dtype, at, value);
  return value[0];
}

template <class A>
FL_INLINE void store_one(A value, void* destination, Dtype dtype, int64_t at) {
  const A values[1] = {value};
  store_any(values, destination, dtype, at);
}

// The remainder of index / size; index becomes the quotient. A 64-bit division costs far more than a 32-bit
// one.
FL_INLINE int64_t split(int64_t& index, int64_t size) {
  if (((index | size) >> 32) == 0) {
    const auto narrow = static_cast<uint32_t>(index), divisor = static_cast<uint32_t>(size);
    index = narrow / divisor;
    return narrow % divisor;
  }
  const int64_t remainder = index % size;
  index /= size;
  return remainder;
}

}  // namespace fused_losses
