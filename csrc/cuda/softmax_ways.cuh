// Two ways of sharing the logits out among the threads of a block.
#pragma once
#include "memory.cuh"
#include "softmax.h"

namespace fused_losses {

// Classes are adjacent: threads read packs of them side by side, a warp or a whole block to a row.
template <class T, int kThreadsPerRow>
struct AlongClasses {
  static constexpr int kRows = kThreads / kThreadsPerRow;
  static constexpr size_t kSharedValues = kThreadsPerRow == kWarp ? 0 : kThreads / kWarp;

  FL_INLINE static int row_in_block() { return threadIdx.x / kThreadsPerRow; }
  FL_INLINE static int lane() { return threadIdx.x % kThreadsPerRow; }

  template <int N, class Source, class A>
  FL_INLINE static void load(const Source* source, int64_t c, int64_t, A (&out)[N]) {
    fused_losses::load(source + c, out);
  }
  template <int N, class A>
  FL_INLINE static void store(const A (&values)[N], T* destination, int64_t c, int64_t) {
    fused_losses::store(values, destination + c);
  }

  // Calls body(first class, Width<N>()), with packs from class `head` on.
  template <class Body>
  FL_INLINE static void for_each(int64_t head, int64_t classes, Body&& body) {
    const int64_t packs = (classes - head) / kWidth<T>, tail = head + packs * kWidth<T>;
    for (int64_t c = lane(); c < head; c += kThreadsPerRow) body(c, Width<1>());
    for (int64_t i = lane(); i < packs; i += kThreadsPerRow) body(head + i * kWidth<T>, Width<kWidth<T>>());
    for (int64_t c = tail + lane(); c < classes; c += kThreadsPerRow) body(c, Width<1>());
  }

  template <class V>
  FL_INLINE static V reduce(V value) {
    if constexpr (kThreadsPerRow == kWarp) {
      return warp_reduce(value);
    } else {
      return block_reduce(value);
    }
  }
};

// Any strides: neighbouring threads read neighbouring rows (the pixels of an image), and kSplit warps share
// the classes of the same rows.
template <class T, int kSplit>
struct AlongRows {
  static constexpr int kRows = kThreads / kSplit;
  static constexpr size_t kSharedValues = kSplit == 1 ? 0 : kThreads;
  static constexpr int kAtOnce = 16 / sizeof(Accumulate<T>);

  FL_INLINE static int row_in_block() { return threadIdx.x % kRows; }
  FL_INLINE static int lane() { return threadIdx.x / kRows; }

  template <int N, class Source, class A>
  FL_INLINE static void load(const Source* source, int64_t c, int64_t stride, A (&out)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = static_cast<A>(source[(c + k) * stride]);
  }
  template <int N, class A>
  FL_INLINE static void store(const A (&values)[N], T* destination, int64_t c, int64_t stride) {
#pragma unroll
    for (int k = 0; k < N; ++k) destination[(c + k) * stride] = static_cast<T>(values[k]);
  }

  template <class Body>
  FL_INLINE static void for_each(int64_t, int64_t classes, Body&& body) {
    const int64_t whole = classes / kAtOnce * kAtOnce;
    for (int64_t c = lane() * kAtOnce; c < whole; c += kSplit * kAtOnce) body(c, Width<kAtOnce>());
    for (int64_t c = whole + lane(); c < classes; c += kSplit) body(c, Width<1>());
  }

  template <class V>
  FL_INLINE static V reduce(V value) {
    if constexpr (kSplit > 1) {
      V* parts = shared_memory<V>();
      parts[threadIdx.x] = value;
      __syncthreads();
      value = parts[row_in_block()];
      for (int i = 1; i < kSplit; ++i) value.merge(parts[i * kRows + row_in_block()]);
      __syncthreads();  // the memory may be used again
    }
    return value;
  }
};

}  // namespace fused_losses
