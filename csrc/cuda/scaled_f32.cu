#include "scaled.h"

#include "memory.cuh"

namespace fused_losses {

constexpr int kScaledWidth = 8;  // 16 bytes of the narrowest dtypes
constexpr int64_t kScaledMaxBlocks = 1 << 16;

static __global__ void __launch_bounds__(kThreads)
    scaled_kernel(const float* x, int64_t numel, int64_t packs, const void* factor, Dtype factor_dtype,
                  void* out, Dtype out_dtype) {
  const float by = load_one<float>(factor, factor_dtype, 0);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const auto move = [&](int64_t at, auto width) {
    float values[decltype(width)::value];
    load(x + at, values);
#pragma unroll
    for (float& value : values) value *= by;
    store_any(values, out, out_dtype, at);
  };
  for (int64_t i = thread; i < packs; i += step) move(i * kScaledWidth, Width<kScaledWidth>());
  for (int64_t i = packs * kScaledWidth + thread; i < numel; i += step) move(i, Width<1>());
}

cudaError_t scaled(const float* x, int64_t numel, const void* factor, Dtype factor_dtype, void* out,
                   Dtype out_dtype, cudaStream_t stream) {
  const auto starts_aligned = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % kWideAccess == 0;
  };
  const int64_t packs = starts_aligned(x) && starts_aligned(out) ? numel / kScaledWidth : 0;
  const int64_t blocks = (numel / kScaledWidth + kThreads) / kThreads;
  return launch(&scaled_kernel, static_cast<int>(blocks < kScaledMaxBlocks ? blocks : kScaledMaxBlocks), 0,
                stream, x, numel, packs, factor, factor_dtype, out, out_dtype);
}

}  // namespace fused_losses
