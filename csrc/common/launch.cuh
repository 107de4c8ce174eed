// What every CUDA kernel needs: elementary functions, launching, and reductions in a fixed order.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace fused_losses {

#include "numerics.h"

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

FL_INLINE float max_(float a, float b) { return fmaxf(a, b); }
FL_INLINE double max_(double a, double b) { return fmax(a, b); }

template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();
template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// The dynamic shared memory of a block, of which a launch asks for as many bytes as its kernel uses.
template <class V>
__device__ V* shared_memory() {
  alignas(16) extern __shared__ unsigned char block_memory[];
  return reinterpret_cast<V*>(block_memory);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// What is reduced has merge(other), which commutes bit for bit, and from_lane(offset), another lane's value.
template <class A>
struct Total {
  A value;

  FL_INLINE void merge(const Total& other) { value += other.value; }
  FL_INLINE Total from_lane(int offset) const { return {__shfl_xor_sync(kWholeWarp, value, offset)}; }
};

// Every lane gets the result.
template <class V>
__device__ __forceinline__ V warp_reduce(V value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value.merge(value.from_lane(offset));
  return value;
}

// Every thread gets the result. Needs block_reduce_bytes<V> of shared memory.
template <class V>
constexpr size_t block_reduce_bytes = sizeof(V) * (kThreads / kWarp);

template <class V>
__device__ __forceinline__ V block_reduce(V value) {
  V* parts = shared_memory<V>();
  value = warp_reduce(value);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = parts[0];
  for (int i = 1; i < kThreads / kWarp; ++i) value.merge(parts[i]);
  __syncthreads();  // the memory may be used again
  return value;
}

}  // namespace fused_losses
